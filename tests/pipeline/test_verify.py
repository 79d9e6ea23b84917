"""`handstill verify` on caches that are whole by their checksums: the teacher and the sources are asked again."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.verify import _choose
from storage.cache import CacheFolder, open_cache
from storage.manifest import read_manifest, write_manifest
from storage.reading import CacheReader
from tests.forging import Arrays, exchange, exchange_between, forge
from tests.pipeline.commands import as_json, handstill
from tests.pipeline.lab import Lab, Work
from tests.tiny_experiment import CONFIG, tar_path, write_teacher

ANSWERS = ["teacher/features", "teacher/features_scale", "teacher/global_orient", "teacher/hand_pose",
           "teacher/betas", "teacher/cam", "teacher/keypoints_2d", "teacher/keypoints_3d"]  # fmt: skip
SEEN = ["pictures/offset", "pictures/length", "pictures/crc32c"]
ROWS, PICTURES = 16, 32


def damaged(lab: Lab, *options: str) -> list[str]:
    """What a verify that must fail says."""
    answer = handstill("verify", "-c", lab.config, "--json", *options)
    assert answer.code == 1, answer.err
    assert answer.document["ok"] is False
    return cast(list[str], answer.document["damaged"])


def test_everything_is_asked_again(lab: Lab) -> None:
    document = as_json(lab.config, "verify")
    on_disk = sum(path.stat().st_size for path in lab.workdir.glob("cache/*/shards/**/*") if path.is_file())
    assert document.pop("seconds") > 0
    assert document == {
        "ok": True,
        "shards": 8,
        "bytes": on_disk,
        "damaged": [],
        "rows_rechecked": ROWS,
        "max_rel_error": 0.0,
        "rows_replayed": ROWS,
        "pictures_replayed": PICTURES,
        "pictures_identical": PICTURES,
        "max_pixel_difference": 0,
        "max_label_difference": 0.0,
        "sources_missing": 0,
        "sources_changed": [],
    }
    document = as_json(lab.config, "verify", "--no-teacher")
    assert (document["rows_rechecked"], document["rows_replayed"]) == (0, ROWS)
    document = as_json(lab.config, "verify", "--no-sources")
    assert (document["rows_rechecked"], document["rows_replayed"]) == (ROWS, 0)


def test_a_person_reads_how_long_it_took_and_what_was_held_together(lab: Lab) -> None:
    answer = handstill("verify", "-c", lab.config)
    assert answer.code == 0
    assert re.search(r"8 shards, \d+ kB read in [\d.]+ s \([\d.]+ s a GB\), 0 things damaged", answer.out)
    assert f"the teacher again on {ROWS} rows" in answer.out
    assert (
        f"{PICTURES} pictures of {ROWS} rows made again from their sources: {PICTURES} the same to the bit"
        in answer.out
    )
    assert "verify: 6/6 shards" in answer.err
    assert "teacher again: 12/12 rows" in answer.err
    assert "made again: 12/12 rows" in answer.err
    assert "verify: 4/4 source files" in answer.err


def test_a_cache_that_no_run_has_finished_is_read_as_far_as_it_goes(lab: Lab) -> None:
    cache = lab.shards("val")[0].parent.parent
    (cache / "HEAD.json").unlink()
    shutil.rmtree(cache / "snapshots")
    (cache / "snapshots").mkdir()
    document = as_json(lab.config, "verify")
    assert (document["ok"], document["shards"], document["rows_rechecked"], document["rows_replayed"]) == (
        True,
        8,
        ROWS - 4,
        ROWS - 4,
    )


def test_answers_of_another_teacher_are_found(lab: Lab) -> None:
    """Whole shards, every checksum right, made by another teacher and put in the place of ours."""
    ours = {path.parent.parent for path in lab.shards()}
    write_teacher(lab.folder / "teacher", seed=1)
    lab.run("teach")
    theirs = {path.parent.parent for path in lab.shards()} - ours
    for cache in theirs:
        role = CacheFolder(cache).identity["role"]
        mine = next(path for path in ours if CacheFolder(path).identity["role"] == role)
        for part in ("shards", "ledger"):
            shutil.rmtree(cache / part)
            shutil.copytree(mine / part, cache / part)
    answer = handstill("verify", "-c", lab.config, "--json")
    assert answer.code == 1
    assert answer.document["rows_rechecked"] == ROWS
    assert answer.document["max_rel_error"] > 0.1
    assert len(answer.document["damaged"]) == ROWS
    assert all("away from the stored one" in line for line in answer.document["damaged"])


def test_answers_that_changed_rows_are_found_by_the_teacher(lab: Lab) -> None:
    shard = lab.shards("alpha")[0]
    forge(shard, lambda arrays: exchange(arrays, ANSWERS))
    assert as_json(lab.config, "verify", "--no-teacher")["ok"] is True, "every checksum is right"
    lines = damaged(lab, "--no-sources")
    assert len(lines) == 2
    assert all(shard.name in line and "away from the stored one" in line for line in lines)
    shutil.rmtree(shard)  # as the message says
    assert lab.run() == Work(shards={"alpha": 1})
    assert as_json(lab.config, "verify")["ok"] is True


def test_answers_that_changed_shards_are_found_by_the_teacher(lab: Lab) -> None:
    one, other = lab.shards("alpha")[0], lab.shards("beta")[1]
    exchange_between(one, other, ANSWERS)
    lines = damaged(lab, "--no-sources")
    assert {name for name in (one.name, other.name) for line in lines if name in line} == {one.name, other.name}
    assert len(lines) == 2


def test_pictures_and_answers_that_changed_rows_together_are_found_by_the_sources(lab: Lab) -> None:
    """The teacher says of each picture what it said before; only the source knows whose picture it is."""
    shard = lab.shards("val")[1]
    forge(shard, lambda arrays: exchange(arrays, ANSWERS + SEEN))
    assert as_json(lab.config, "verify", "--no-sources")["ok"] is True
    lines = damaged(lab, "--no-teacher")
    assert len(lines) == 4
    assert all(shard.name in line and "is not what its source gives: the picture differs" in line for line in lines)


def test_ids_that_changed_rows_are_found_by_the_snapshot(lab: Lab) -> None:
    shard = lab.shards("alpha")[2]
    forge(shard, lambda arrays: exchange(arrays, ["sample_id"]))
    lines = damaged(lab, "--no-teacher", "--no-sources")
    assert len(lines) == 1
    assert f"{shard.name}/sample_id/" in lines[0]
    assert "row 0 is alpha:" in lines[0]


def test_a_changed_view_parameter_is_found_with_its_sample(lab: Lab) -> None:
    shard = lab.shards("beta")[0]
    position = 0

    def change(arrays: Arrays) -> None:
        arrays["views/rotation_deg"][position, 1] += 1

    forge(shard, change)
    reader = open_cache(shard.parent.parent)
    sample_id = next(name for at, name in enumerate(reader.ids) if reader.shard_path(at) == shard)
    (line,) = damaged(lab, "--no-teacher")
    assert f"{sample_id} view 1 is not what its source gives" in line
    assert "views/affine differs by" in line
    assert "the picture differs in" in line


def test_one_row_of_every_shard_is_asked_and_a_share_of_all() -> None:
    def choose(samples: int, n_shards: int) -> list[int]:
        class Reader:
            shards = np.arange(samples) * n_shards // samples

            def __len__(self) -> int:
                return samples

        return _choose(cast(CacheReader, Reader()), "0123456789abcdef")

    assert choose(20, 3) == list(range(20))
    for samples, shards, wanted in ((1000, 2, 32), (100_000, 3, 100), (2000, 50, 50)):
        rows = choose(samples, shards)
        assert len(rows) == len(set(rows)) == wanted
        assert {row * shards // samples for row in rows} == set(range(shards))
        assert rows == choose(samples, shards)


def test_sources_that_are_gone_are_no_damage(lab: Lab) -> None:
    tar_path(lab.folder, "alpha", 1).unlink()
    document = as_json(lab.config, "verify")
    assert (document["ok"], document["sources_missing"], document["sources_changed"]) == (True, 1, [])
    assert document["rows_replayed"] == ROWS - 4
    shutil.rmtree(lab.folder / "tars")
    document = as_json(lab.config, "verify")
    assert (document["ok"], document["sources_missing"], document["rows_replayed"]) == (True, 4, 0)
    assert document["rows_rechecked"] == ROWS
    assert "4 source files are not there" in handstill("verify", "-c", lab.config, "--no-teacher").out


def test_sources_that_changed_are_told_and_are_no_damage(lab: Lab) -> None:
    tar = lab.rewrite("beta", edits={2: 1})
    document = as_json(lab.config, "verify")
    assert (document["ok"], document["sources_missing"], document["sources_changed"]) == (True, 0, [str(tar)])
    assert document["rows_replayed"] == ROWS - 1, "the other hands of the tar are where they were"
    assert str(tar) in handstill("verify", "-c", lab.config, "--no-teacher").out


def test_sources_that_moved_are_found_once_they_are_ingested(lab: Lab) -> None:
    (lab.folder / "tars").rename(lab.folder / "elsewhere")
    for name in ("alpha", "beta", "val"):
        lab.configure({f"datasets.{name}.path": CONFIG["datasets"][name]["path"].replace("tars/", "elsewhere/")})
    assert as_json(lab.config, "verify", "--no-teacher")["sources_missing"] > 0
    lab.run("ingest")
    document = as_json(lab.config, "verify", "--no-teacher")
    assert (document["rows_replayed"], document["sources_missing"]) == (ROWS, 0)


def test_a_second_verify_says_what_the_first_found(lab: Lab) -> None:
    shard = lab.shards("alpha")[1]
    chunk = next(path for path in (shard / "teacher/cam").iterdir() if path.name.startswith("c"))
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"\0")
    named = str(chunk.relative_to(shard.parent.parent))
    first = damaged(lab, "--no-teacher", "--no-sources")
    assert [named in line for line in first] == [True]
    for _ in range(2):
        again = damaged(lab, "--no-teacher", "--no-sources")
        assert any(named in line and "record was withdrawn" in line for line in again), again
    assert lab.run() == Work(shards={"alpha": 1})
    assert as_json(lab.config, "verify")["ok"] is True
    assert not list(lab.workdir.glob("cache/*/ledger/*.withdrawn"))


@pytest.fixture
def with_pictures(lab: Lab) -> Lab:
    """The lab with an evaluation set of four photographs in a folder in the place of a tar."""
    write_npz_of(lab.folder, tar_path(lab.folder, "val"))
    lab.configure({"datasets.val": {"format": "hamer_npz", "path": "val/val.npz", "image_dir": "val/rgb"}})
    assert lab.run("teach").shards == {"val": 2}
    return lab


def write_npz_of(folder: Path, tar: Path) -> None:
    (folder / "val/rgb").mkdir(parents=True)
    with tarfile.open(tar) as archive:
        contents = {name: cast(Any, archive.extractfile(name)).read() for name in archive.getnames()}
    names = sorted(name for name in contents if name.endswith(".jpg"))
    hands = [pickle.loads(contents[name.replace(".jpg", ".data.pyd")])[0] for name in names]  # noqa: S301  made here
    for name in names:
        (folder / "val/rgb" / name).write_bytes(contents[name])
    columns = {name: np.stack([hand[name] for hand in hands]) for name in hands[0] if name != "extra_info"}
    columns |= {f"hand_{name}": columns.pop(name) for name in ("keypoints_2d", "keypoints_3d")}
    columns["scale"] = columns["scale"] * 200
    np.savez(folder / "val/val.npz", imgname=np.array(names), **columns)


def brighten(path: Path) -> None:
    """Another picture of as many bytes, with the old one's times: nothing but its content tells."""
    old, status = path.read_bytes(), path.stat()
    pixels = 255 - np.asarray(Image.open(io.BytesIO(old)))
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=30)
    new = encoded.getvalue()
    assert len(new) <= len(old)
    with path.open("r+b") as file:
        file.write(new.ljust(len(old), b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_picture_that_was_changed_in_secret_is_found_by_verify_and_by_a_rehash(with_pictures: Lab) -> None:
    lab = with_pictures
    document = as_json(lab.config, "verify")
    assert (document["rows_replayed"], document["pictures_identical"]) == (ROWS, PICTURES)
    assert lab.reasons("--rehash") == lab.reasons()
    picture = sorted((lab.folder / "val/rgb").iterdir())[2]
    brighten(picture)
    document = as_json(lab.config, "verify")
    assert (document["ok"], document["sources_changed"], document["rows_replayed"]) == (True, [str(picture)], ROWS - 1)
    assert lab.plan()["ingest"]["todo"] == 0, "size, time and inode are what they were"
    assert lab.plan("--rehash")["ingest"]["reasons"]["changed"] == 1
    assert lab.run("teach", "--rehash") == Work(scanned=["val.npz"], shards={"val": 1})
    assert lab.plan("--rehash")["ingest"]["todo"] == 0
    assert as_json(lab.config, "verify")["sources_changed"] == []


def test_a_damaged_manifest_is_found_and_written_again(lab: Lab) -> None:
    manifest = next(lab.workdir.glob("manifests/beta/*.parquet"))
    whole = manifest.read_bytes()
    table = read_manifest(manifest)
    labels = [[value + 1 for value in row] for row in table["betas"].to_pylist()]
    at = table.schema.get_field_index("betas")
    write_manifest(manifest, table.set_column(at, table.schema.field(at), pa.array(labels, table.schema.types[at])))
    lines = damaged(lab, "--no-teacher")
    assert len(lines) == 4
    assert all(str(manifest) in line and "are not those of their digest" in line for line in lines)
    manifest.write_bytes(whole[:-1])
    (line,) = damaged(lab, "--no-teacher")
    assert f"{manifest}: not a readable manifest" in line
    manifest.unlink()
    assert lab.run() == Work(scanned=["beta-000000.tar"])
    assert manifest.read_bytes() == whole
    assert as_json(lab.config, "verify")["ok"] is True
