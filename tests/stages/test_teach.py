from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from models.crops import STUDENT_BOX, TEACHER_BOX, Augmentation, crop, draw_augmentation, view_rng
from stages.pictures import decode
from stages.preparation import prepared_batches, read_photo
from stages.teach import recheck_rows, teach_shard
from storage.cache import CacheFolder, fingerprint, open_cache
from storage.config import CacheConfig, FeatureGrid, FeaturesConfig, PicturesConfig
from storage.encodings import decode_picture, encode_picture
from storage.errors import InputError
from storage.manifest import shards_of
from storage.snapshots import read_head, read_snapshot, snapshot_path
from storage.verification import verify_folder, verify_shard
from tests import tars
from tests.stages.teaching import (
    BATCH_SIZE,
    CACHE,
    DATASET,
    PROVENANCE,
    contents,
    forward,
    identity,
    jobs,
    run,
    settings,
    write_data,
)


class Counting:
    """A teacher that counts its batches, and answers NaN for the pictures it is told to."""

    def __init__(self, spoil: int | None = None, output: str = "cam") -> None:
        self.batches = 0
        self._spoil = spoil
        self._output = output

    def __call__(self, pictures: NDArray[np.uint8], grid: FeatureGrid) -> Mapping[str, NDArray[Any]]:
        outputs = {name: np.array(values) for name, values in forward(pictures, grid).items()}
        if self.batches == self._spoil:
            outputs[self._output][0, 0] = np.nan
        self.batches += 1
        return outputs


def test_samples_in_are_samples_cached_and_quarantined(tmp_path: Path) -> None:
    table = write_data(tmp_path)
    cache = run(tmp_path, tmp_path / "cache", table)
    assert verify_folder(cache) == []
    records = cache.finished().values()
    assert [verify_shard(cache, record) for record in records] == [[], [], []]
    assert sum(record.samples_in for record in records) == len(table) == 5
    quarantined = [sample for record in records for sample in record.quarantined]
    assert [(bad.sample_id, bad.reason) for bad in quarantined] == [
        (f"{DATASET}:000002#0", "undecodable-picture: 000002.jpg")
    ]
    reader = open_cache(cache.root)
    assert reader.ids == [f"{DATASET}:{name}" for name in ("000000#0", "000001#0", "000001#1", "000003#0")]
    snapshot = read_snapshot(snapshot_path(cache.root, read_head(cache.root)[DATASET]))
    assert snapshot["reason"].to_pylist() == [None, None, None, "undecodable-picture: 000002.jpg", None]


def test_stored_views_are_the_crops_and_the_teacher_saw_the_stored_pixels(tmp_path: Path) -> None:
    table = write_data(tmp_path)
    reader = open_cache(run(tmp_path, tmp_path / "cache", table).root)
    for row in (row for row in table.to_pylist() if row["key"] != "000002"):
        sample = reader[row["sample_id"]]
        photo = decode(read_photo(row, tmp_path))
        assert photo is not None
        for view in range(2):
            drawn = draw_augmentation(view_rng(0, row["sample_id"], view)) if view else Augmentation()
            cut = crop(photo, row["center"], STUDENT_BOX.side_px(row["scale"]), row["right"], drawn)
            pixels = decode_picture(encode_picture(cut.picture, "jpeg", 95))
            np.testing.assert_array_equal(sample["pictures"][view], pixels)
            np.testing.assert_array_equal(sample["views/affine"][view], cut.affine)
            assert sample["views/rotation_deg"][view] == drawn.rotation_deg
            assert sample["views/flip"][view] == (row["right"] == 0)
            batch = np.zeros((BATCH_SIZE, 256, 256, 3), np.uint8)
            batch[0] = pixels
            said = forward(batch, "8x6-geometric")
            np.testing.assert_array_equal(sample["teacher/cam"][view], said["cam"][0])
            features = said["features"][0]
            step = np.abs(features).max(axis=-1, keepdims=True) / 127
            assert (np.abs(sample["teacher/features"][view] - features) <= step * 0.51).all()


def test_evaluation_sets_have_the_students_and_the_teachers_box(tmp_path: Path) -> None:
    table = write_data(tmp_path)
    rng = np.random.default_rng(0)
    given = {
        "truth_xyz": pa.array([rng.normal(size=63).tolist()] * 4 + [None], pa.list_(pa.float32())),
        "truth_vertices": pa.array([rng.normal(size=30).tolist()] * 4 + [None], pa.list_(pa.float32())),
        "scale": pa.array([[0.15, 0.2]] * 5, table.schema.field("scale").type),
    }
    for name, values in given.items():
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)
    reader = open_cache(run(tmp_path, tmp_path / "cache", table, settings("evaluate")).root)
    sample, last = reader[0], reader[3]
    assert sample["views/box_px"].tolist() == [STUDENT_BOX.side_px([0.15, 0.2]), TEACHER_BOX.side_px([0.15, 0.2])]
    assert sample["views/scale"].tolist() == [1, 1]
    assert sample["labels/truth_xyz"].shape == (21, 3)
    assert sample["labels/truth_vertices"].shape == (10, 3)
    assert (sample["labels/has_truth"], reader[2]["labels/has_truth"]) == (1, 1)
    assert "labels/truth_xyz" not in last  # its shard has no truth at all
    assert sample["labels/box_size"].tolist() == [30, 40]
    assert sample["labels/image_size"].tolist() == [60, 50]


def test_running_again_does_nothing(tmp_path: Path) -> None:
    table = write_data(tmp_path)
    cache = run(tmp_path, tmp_path / "cache", table)
    before = contents(cache.root)
    again = Counting()
    run(tmp_path, tmp_path / "cache", table, teacher=again)
    assert again.batches == 0
    assert contents(cache.root) == before
    events = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events == ["shard_started", "shard_committed"] * 3


def test_only_a_changed_shard_is_taught_again(tmp_path: Path) -> None:
    table = write_data(tmp_path)
    cache = run(tmp_path, tmp_path / "cache", table)
    first = read_head(cache.root)
    before = set(cache.finished())
    changed = table.to_pylist()[4] | {"labels_sha256": "ee" * 32, "betas": [0.5] * 10}
    table = pa.concat_tables([table.slice(0, 4), pa.Table.from_pylist([changed], table.schema)])
    counting = Counting()
    run(tmp_path, tmp_path / "cache", table, teacher=counting)
    assert len(set(cache.finished()) - before) == counting.batches == 1
    assert read_head(cache.root) != first
    assert open_cache(cache.root)[3]["labels/betas"][0, 0] == 0.5
    assert open_cache(cache.root, first[DATASET])[3]["labels/betas"][0, 0] != 0.5  # what was pinned stays readable


@pytest.mark.parametrize("output", ["cam", "features"])
def test_answers_that_are_not_finite_are_quarantined(tmp_path: Path, output: str) -> None:
    table = write_data(tmp_path)
    cache = run(tmp_path, tmp_path / "cache", table, teacher=Counting(spoil=1, output=output))
    reasons = {bad.sample_id: bad.reason for record in cache.finished().values() for bad in record.quarantined}
    assert reasons[f"{DATASET}:000001#0"] == f"not-finite: the teacher's {output}"
    assert len(reasons) == 2
    assert len(open_cache(cache.root)) == 3
    assert [damage for record in cache.finished().values() for damage in verify_shard(cache, record)] == []


def test_a_source_that_changed_since_ingest_stops_the_work(tmp_path: Path) -> None:
    table = write_data(tmp_path)
    (job, *_) = jobs(tmp_path, tmp_path / "cache", table, settings())
    tar = tmp_path / "data/000000.tar"
    whole = tar.read_bytes()
    at = table["image_offset"][0].as_py() + 300
    tar.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(InputError, match=r"000000\.jpg has changed since it was ingested"):
        list(prepared_batches(job))
    tar.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        list(prepared_batches(job))


def test_a_failed_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    table = write_data(tmp_path)

    def broken(pictures: NDArray[np.uint8], grid: FeatureGrid) -> Mapping[str, NDArray[Any]]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, tmp_path / "cache", table, teacher=broken)
    cache = CacheFolder.create(tmp_path / "cache", identity(settings()))
    assert list(cache.shards_dir.iterdir()) == list(cache.ledger_dir.iterdir()) == []


def test_two_attempts_at_one_shard_end_as_one(tmp_path: Path) -> None:
    """A worker thought dead finishes after its replacement: one shard, one record, whoever published."""
    table = write_data(tmp_path)
    cache = CacheFolder.create(tmp_path / "cache", identity(settings()))
    job = jobs(tmp_path, cache.root, table, settings())[0]
    batches = list(prepared_batches(job))

    def overtaken(pictures: NDArray[np.uint8], grid: FeatureGrid) -> Mapping[str, NDArray[Any]]:
        if not cache.shard_path(job.input_hash).exists():
            teach_shard(job, batches, forward, PROVENANCE | {"device": "the other"})
            cache.withdraw(job.input_hash)  # it dies before it records
        return forward(pictures, grid)

    record = teach_shard(job, batches, overtaken, PROVENANCE)
    assert record.provenance["device"] == "the other"
    assert cache.finished() == {job.input_hash: record}
    assert verify_shard(cache, record) == []
    assert [path.name for path in cache.shards_dir.iterdir()] == [f"{job.input_hash}.zarr"]


def test_jobs_and_batches_travel_between_processes(tmp_path: Path) -> None:
    table = write_data(tmp_path)
    cache = run(tmp_path, tmp_path / "cache", table)
    elsewhere = CacheFolder.create(tmp_path / "elsewhere", identity(settings()))
    for job in jobs(tmp_path, elsewhere.root, table, settings()):
        job = pickle.loads(pickle.dumps(job))  # noqa: S301  made here
        batches = pickle.loads(pickle.dumps(list(prepared_batches(job))))  # noqa: S301  made here
        teach_shard(job, batches, forward, PROVENANCE)
    assert contents(elsewhere.shards_dir) == contents(cache.shards_dir)


def test_batches_are_full_within_a_shard(tmp_path: Path) -> None:
    table = write_data(tmp_path)
    (job,) = jobs(tmp_path, tmp_path, table, settings(), per_shard=100)
    assert [len(batch.views) for batch in prepared_batches(job)] == [3, 3, 2]


def test_recheck_finds_the_same_teacher_equal_and_another_one_not(tmp_path: Path) -> None:
    table = write_data(tmp_path)
    reader = open_cache(run(tmp_path, tmp_path / "cache", table).root)
    same = list(recheck_rows(reader, range(4), forward))
    assert [(check.sample_id, check.view) for check in same] == list(zip(reader.ids, [0, 1, 0, 1], strict=True))
    assert max(check.max_rel_error for check in same) == 0

    def drifted(pictures: NDArray[np.uint8], grid: FeatureGrid) -> Mapping[str, NDArray[Any]]:
        outputs = dict(forward(pictures, grid))
        return outputs | {"betas": outputs["betas"] * 1.01}

    for check in recheck_rows(reader, range(4), drifted, view=1):
        assert (check.view, check.worst) == (1, "betas")
        assert check.max_rel_error == pytest.approx(0.01, rel=1e-3)


def test_identity_covers_what_decides_answers_and_nothing_else() -> None:
    base = identity(settings())
    other = {
        "views": CACHE.model_copy(update={"views": 3}),
        "augmentation": CACHE.model_copy(update={"augmentation": "none"}),
        "grid": CACHE.model_copy(update={"features": FeaturesConfig(grid="full", encoding="int8")}),
        "encoding": CACHE.model_copy(update={"features": FeaturesConfig(grid="8x6-geometric", encoding="float16")}),
        "quality": CACHE.model_copy(update={"pictures": PicturesConfig(quality=90)}),
    }
    prints = {name: fingerprint(identity(settings(cache=cache))) for name, cache in other.items()}
    assert len({fingerprint(base), *prints.values()}) == 6
    assert identity(settings(cache=CACHE.model_copy(update={"samples_per_shard": 7}))) == base
    assert identity(settings(seed=1)) != base
    plain = CacheConfig(views=1)
    assert identity(settings(cache=plain, seed=1)) == identity(settings(cache=plain, seed=0))  # nothing is drawn
    png = [CACHE.model_copy(update={"pictures": PicturesConfig(codec="png", quality=q)}) for q in (50, 95)]
    assert identity(settings(cache=png[0])) == identity(settings(cache=png[1]))
    evaluate = [identity(settings("evaluate", cache, seed)) for cache, seed in ((CACHE, 0), (other["views"], 1))]
    assert evaluate[0] == evaluate[1] != base


def test_an_untouched_shard_survives_a_neighbour_that_appears(tmp_path: Path) -> None:
    """Ids and bytes decide: a sample more in one tar leaves the other chunk's shard alone."""
    table = write_data(tmp_path)
    members = {**tars.sample("000000", seed=0), **tars.sample("000001", seed=1), **tars.sample("000003", seed=3)}
    grown = write_data(tmp_path / "other", {**members, **tars.sample("000004", seed=4)})
    shorter = write_data(tmp_path / "another", members)
    plans = [{plan.input_hash for plan in shards_of(some, "train", 2)} for some in (table, grown, shorter)]
    assert len(plans[1] & plans[2]) == 1


def test_moved_sources_need_no_teaching(tmp_path: Path) -> None:
    table = write_data(tmp_path / "here")
    cache = run(tmp_path / "here", tmp_path / "cache", table)
    before = contents(cache.root)
    shutil.move(tmp_path / "here", tmp_path / "there")
    counting = Counting()
    run(tmp_path / "there", tmp_path / "cache", table, teacher=counting)
    assert counting.batches == 0
    assert contents(cache.root) == before
