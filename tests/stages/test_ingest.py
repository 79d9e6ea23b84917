"""Scanning sources: every hand in is a row out, damaged ones with their reason, damaged files not at all."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stages.config import HamerNpzDataset, HamerTarDataset
from stages.ingest import (
    expand_braces,
    ingest_identity,
    scan_source,
    shared_pictures,
    source_files,
    without_repeated_ids,
)
from storage.errors import InputError
from storage.manifest import SCHEMA, shards_of, write_manifest
from tests import hostile_pickles
from tests.shared import REAL_HANDS, needs_shared
from tests.tars import annotation, picture, sample, write_tar


def _tar_config(path: str = "0.tar", **options: Any) -> HamerTarDataset:
    return HamerTarDataset(format="hamer_tar", path=path, **options)


def _scan(folder: Path, members: dict[str, bytes], **options: Any) -> pa.Table:
    return scan_source("set", _tar_config(**options), write_tar(folder / "0.tar", members), folder)


# tars


def test_a_row_a_hand(tmp_path: Path) -> None:
    members = sample("set/a", annotation(), annotation(right=0, center=np.array([20.0, 30.0]))) | sample(
        "set/b", seed=1
    )
    table = _scan(tmp_path, members)
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    assert [row["sample_id"] for row in rows] == ["set:set/a#0", "set:set/a#1", "set:set/b#0"]
    assert [row["ordinal"] for row in rows] == [0, 1, 2]
    assert [row["reason"] for row in rows] == [None] * 3
    data = (tmp_path / "0.tar").read_bytes()
    for row in rows:
        content = data[row["image_offset"] : row["image_offset"] + row["image_length"]]
        assert content == members[row["image_name"]]
        assert row["image_sha256"] == hashlib.sha256(content).hexdigest()
        assert (row["width"], row["height"]) == (60, 50)
        assert (row["source"], row["source_sha256"]) == ("0.tar", hashlib.sha256(data).hexdigest())
    second = rows[1]
    assert (second["right"], second["center"], second["scale"]) == (0, [20.0, 30.0], [0.2, 0.15])
    hand = annotation()
    assert np.array_equal(np.reshape(second["keypoints_2d"], (21, 3)), hand["keypoints_2d"])
    assert np.array_equal(np.reshape(second["keypoints_3d"], (21, 4)), hand["keypoints_3d"])
    assert np.array_equal(second["hand_pose"], hand["hand_pose"])
    assert np.array_equal(second["betas"], hand["betas"])


BAD_MEMBERS: dict[str, tuple[dict[str, bytes], list[str]]] = {
    "picture without labels": ({"b.jpg": picture()}, ["no-label: b.jpg has no .data.pyd"]),
    "labels without picture": (
        {"b.data.pyd": pickle.dumps([annotation(), annotation()])},
        ["no-picture: b.data.pyd has no picture"] * 2,
    ),
    "empty picture": (sample("b") | {"b.jpg": b""}, ["bad-picture: b.jpg is empty"]),
    "no picture at all": (sample("b") | {"b.jpg": b"<html>" * 99}, ["bad-picture: b.jpg is no picture"]),
    "picture cut in its header": (sample("b") | {"b.jpg": picture()[:100]}, ["bad-picture: b.jpg is no picture"]),
    "picture too large": (sample("b") | {"b.jpg": picture(40000, 2, kind="PNG")}, ["bad-picture: b.jpg is too large"]),
    "no hands": (sample("b") | {"b.data.pyd": pickle.dumps([])}, ["no-hands: b.data.pyd lists none"]),
    "labels cut off": (sample("b") | {"b.data.pyd": pickle.dumps([annotation()])[:-50]}, ["bad-label: b.data.pyd: "]),
    "labels of another kind": (
        sample("b") | {"b.data.pyd": pickle.dumps({"a": 1})},
        ["bad-label: b.data.pyd: found dict"],
    ),
    "one hand of two is bad": (
        sample("b", annotation(center=np.full(2, np.nan)), annotation()),
        ["bad-label: center holds values that are not finite", ""],
    ),
    "wrong shape": (sample("b", annotation(betas=np.zeros(3))), ["bad-label: betas has shape (3,), wanted (10,)"]),
    "box of no size": (sample("b", annotation(scale=np.zeros(2))), ["no-box: its box has no size"]),
    "box outside": (sample("b", annotation(center=np.array([500.0, 25.0]))), ["outside: its box around"]),
    "too few keypoints": (sample("b", annotation(keypoints_2d=np.zeros((21, 3)))), ["filtered: min_keypoints"]),
    "twice": (sample("b") | {"b.png": picture()}, ["duplicate: b.png stands twice"]),
}


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_bad_members_become_reasons_and_touch_nothing_else(tmp_path: Path, name: str) -> None:
    members, reasons = BAD_MEMBERS[name]
    rows = _scan(tmp_path, sample("a") | members | sample("c", seed=1)).to_pylist()
    assert len(rows) == len(reasons) + 2
    assert rows[0]["reason"] is rows[-1]["reason"] is None
    for row, reason in zip(rows[1:-1], reasons, strict=True):
        assert (row["reason"] or "").startswith(reason)
        assert row["sample_id"].startswith("set:b#")
        assert (row["reason"] is None) == (reason == "")
    assert [row["ordinal"] for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize("name", hostile_pickles.NAMES)
def test_hostile_labels_are_left_out_and_run_nothing(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    hostile = hostile_pickles.every_one(marker)[name]
    rows = _scan(tmp_path, sample("a") | sample("b") | {"b.data.pyd": hostile}).to_pylist()
    assert rows[0]["reason"] is None
    assert rows[1]["reason"].startswith(("unsafe-label: b.data.pyd", "bad-label: b.data.pyd"))
    assert not marker.exists()


def test_a_pair_may_stand_apart_and_other_members_are_ignored(tmp_path: Path) -> None:
    a, b = sample("a"), sample("b", seed=1)
    apart = {"a.jpg": a["a.jpg"], **b, "README": b"x", "b.detection.npz": b"y", "a.data.pyd": a["a.data.pyd"]}
    rows = _scan(tmp_path, apart).to_pylist()
    assert [(row["key"], row["reason"]) for row in rows] == [("a", None), ("b", None)]


def test_a_damaged_tar_stops(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", sample("a") | sample("b"))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"0\.tar: the tar is cut off: it ends at byte 3000"):
        scan_source("set", _tar_config(), path, tmp_path)


def test_the_same_source_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    for place in ("here", "there"):
        table = _scan(tmp_path / place, sample("a") | sample("b"))
        write_manifest(tmp_path / f"{place}.parquet", table)
    assert (tmp_path / "here.parquet").read_bytes() == (tmp_path / "there.parquet").read_bytes()


def test_filtering_is_the_data_sets_own(tmp_path: Path) -> None:
    members = sample("a", annotation(betas=np.full(10, 3.5)))
    kept = _scan(tmp_path, members, filtering={"suppress_betas": None}).to_pylist()[0]
    assert (kept["has_betas"], kept["has_hand_pose"], kept["betas"][0]) == (1, 1, 3.5)
    assert _scan(tmp_path, members).to_pylist()[0]["has_hand_pose"] == 0


def test_changing_one_hand_changes_one_shard(tmp_path: Path) -> None:
    members = {name: content for number in range(6) for name, content in sample(f"{number}", seed=number).items()}
    before = [shard.input_hash for shard in shards_of(_scan(tmp_path, members), "train", 2)]
    members["3.data.pyd"] = pickle.dumps([annotation(right=0)])
    after = [shard.input_hash for shard in shards_of(_scan(tmp_path, members), "train", 2)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


@needs_shared
def test_real_photographs() -> None:
    base = REAL_HANDS.parent
    found, reasons = 0, []
    for name in ("interhand26m-real", "cocow-real", "freihand-real"):
        config = _tar_config(f"real-hands/{name}/{{000000..000000}}.tar")
        (source,) = source_files(config, base)
        table = scan_source(name, config, source, base)
        found += len(table)
        reasons += [reason for reason in table.column("reason").to_pylist() if reason is not None]
    assert found == 24
    # two gloved hands have three keypoints and none: HaMeR's rules leave them out as well
    assert [reason.partition(":")[0] for reason in reasons] == ["filtered", "filtered"]


# evaluation npz


def _npz(folder: Path, count: int = 3, **changes: Any) -> HamerNpzDataset:
    (folder / "rgb").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / "rgb" / f"{number}.jpg").write_bytes(picture(seed=number))
    arrays: dict[str, Any] = {
        "imgname": np.array([f"{number}.jpg" for number in range(count)]),
        "center": np.tile([30.0, 25.0], (count, 1)),
        "scale": np.tile([40.0, 30.0], (count, 1)),
    } | changes
    np.savez(folder / "val.npz", **{name: array for name, array in arrays.items() if array is not None})
    return HamerNpzDataset(format="hamer_npz", path="val.npz", image_dir="rgb", protocol="freihand")


def _scan_npz(config: HamerNpzDataset, folder: Path) -> pa.Table:
    (source,) = source_files(config, folder)
    return scan_source("val", config, source, folder)


def test_npz_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keypoints = rng.uniform(0, 1, (3, 21, 3)).astype(np.float32)
    config = _npz(tmp_path, right=np.array([1, 0, 1]), hand_keypoints_2d=keypoints)
    rows = _scan_npz(config, tmp_path).to_pylist()
    assert [row["sample_id"] for row in rows] == [f"val:{number}.jpg#{number}" for number in range(3)]
    assert [row["right"] for row in rows] == [1, 0, 1]
    for number, row in enumerate(rows):
        content = (tmp_path / row["image_path"]).read_bytes()
        assert (row["image_offset"], row["image_length"]) == (-1, len(content))
        assert row["image_sha256"] == hashlib.sha256(content).hexdigest()
        assert row["scale"] == [0.2, 0.15]  # / 200, as in a tar
        assert np.array_equal(np.reshape(row["keypoints_2d"], (21, 3)), keypoints[number])
        assert (row["has_hand_pose"], row["has_betas"], row["truth_xyz"], row["reason"]) == (0, 0, None, None)
        assert row["protocol"] == "freihand"


def test_nothing_of_an_evaluation_set_is_filtered(tmp_path: Path) -> None:
    config = _npz(
        tmp_path, hand_keypoints_2d=np.full((3, 21, 3), 0.1), betas=np.full((3, 10), 9.0), has_betas=np.ones(3)
    )
    rows = _scan_npz(config, tmp_path).to_pylist()
    assert {row["reason"] for row in rows} == {None}
    assert rows[0]["keypoints_2d"][2] == pytest.approx(0.1)
    assert (rows[0]["has_betas"], rows[0]["betas"][0]) == (1, 9)
    strict = config.model_copy(update={"filtering": config.filtering.model_copy(update={"min_keypoints": 30})})
    assert all(row["reason"].startswith("filtered: ") for row in _scan_npz(strict, tmp_path).to_pylist())


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_square_boxes_may_be_one_number(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rows = _scan_npz(_npz(tmp_path, scale=np.full(shape, 40.0)), tmp_path).to_pylist()
    assert {tuple(row["scale"]) for row in rows} == {(0.2, 0.2)}


def test_names_may_be_bytes_or_objects(tmp_path: Path) -> None:
    ids = [
        _scan_npz(_npz(tmp_path, imgname=names), tmp_path).column("sample_id").to_pylist()
        for names in (np.array([b"0.jpg", b"1.jpg", b"2.jpg"]), np.array(["0.jpg", "1.jpg", "2.jpg"], object))
    ]
    assert ids[0] == ids[1] == ["val:0.jpg#0", "val:1.jpg#1", "val:2.jpg#2"]


def test_truth_comes_from_the_authors_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    xyz, verts = rng.normal(size=(3, 21, 3)), rng.normal(size=(3, 30, 3))
    (tmp_path / "xyz.json").write_text(json.dumps(xyz.tolist()))
    (tmp_path / "verts.json").write_text(json.dumps(verts.tolist()))
    config = _npz(tmp_path).model_copy(update={"truth_xyz": "xyz.json", "truth_verts": "verts.json"})
    rows = _scan_npz(config, tmp_path).to_pylist()
    for number, row in enumerate(rows):
        np.testing.assert_array_equal(np.reshape(row["truth_xyz"], (21, 3)), xyz[number].astype(np.float32))
        np.testing.assert_array_equal(np.reshape(row["truth_vertices"], (30, 3)), verts[number].astype(np.float32))
    without = _scan_npz(_npz(tmp_path), tmp_path).to_pylist()
    assert all(a["labels_sha256"] != b["labels_sha256"] for a, b in zip(rows, without, strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(np.zeros((2, 21, 3)).tolist()), r"has shape \(2, 21, 3\), wanted 3 x 21 x 3"),
        (json.dumps(np.zeros((3, 20, 3)).tolist()), r"has shape \(3, 20, 3\), wanted 3 x 21 x 3"),
        ("[[[1, 2], [3]]]", "is no JSON list of equal lists"),
        ("{}", "is no JSON list"),
        ("[[[", "is no JSON list"),
        ("[" * 100_000, "is no JSON list"),
    ],
)
def test_bad_truth_stops(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "xyz.json").write_text(content)
    config = _npz(tmp_path).model_copy(update={"truth_xyz": "xyz.json"})
    with pytest.raises(InputError, match=f"truth_xyz: .*{message}"):
        _scan_npz(config, tmp_path)


def test_bad_rows_of_an_npz_become_reasons(tmp_path: Path) -> None:
    names = np.array(["0.jpg", "gone.jpg", "../0.jpg", "3.jpg", "4.jpg"])
    centers = np.tile([30.0, 25.0], (5, 1))
    centers[3] = np.nan
    config = _npz(tmp_path, 5, imgname=names, center=centers)
    (tmp_path / "rgb" / "4.jpg").write_bytes(b"")
    (tmp_path / "xyz.json").write_text(json.dumps(np.zeros((5, 21, 3)).tolist()).replace("0.0", "NaN", 1))
    truth = config.model_copy(update={"truth_xyz": "xyz.json"})
    reasons = [str(reason) for reason in _scan_npz(config, tmp_path).column("reason").to_pylist()]
    words = ["None", "no-picture", "no-picture", "bad-label", "bad-picture"]
    assert [reason.partition(":")[0] for reason in reasons] == words
    assert _scan_npz(truth, tmp_path).column("reason").to_pylist()[0].startswith("bad-truth: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"center": None}, "has no array 'center'"),
        ({"center": np.zeros((2, 2))}, r"array 'center' has shape \(2, 2\), wanted \(3, 2\)"),
        ({"scale": np.zeros((3, 3))}, r"array 'scale' has shape \(3, 3\), wanted \(3, 2\)"),
        ({"scale": np.array(["a", "b", "c"])}, "array 'scale' holds str"),
        ({"right": np.ones(4)}, r"array 'right' has shape \(4,\), wanted \(3,\)"),
        ({"hand_pose": np.zeros((3, 45))}, r"array 'hand_pose' has shape \(3, 45\), wanted \(3, 48\)"),
    ],
)
def test_an_npz_of_other_arrays_stops(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = _npz(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        _scan_npz(config, tmp_path)


def test_a_wrong_image_dir_stops(tmp_path: Path) -> None:
    config = _npz(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="none of its 3 pictures"):
        _scan_npz(config.model_copy(update={"image_dir": "empty"}), tmp_path)
    with pytest.raises(InputError, match=r"image_dir .* is no folder"):
        _scan_npz(config.model_copy(update={"image_dir": "gone"}), tmp_path)


# paths, identity, duplicates


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("a/{000008..000011}.tar", ["a/000008.tar", "a/000009.tar", "a/000010.tar", "a/000011.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "b/0.tar", "a/1.tar", "b/1.tar"]),
        ("plain.tar", ["plain.tar"]),
        ("odd{.tar", ["odd{.tar"]),
    ],
)
def test_braces(pattern: str, wanted: list[str]) -> None:
    assert sorted(expand_braces(pattern)) == sorted(wanted)


def test_too_many_files_are_a_mistake() -> None:
    with pytest.raises(InputError, match="more than"):
        list(expand_braces("{0..99999999999}"))


def test_source_files_start_at_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARS", str(tmp_path / "elsewhere"))
    for name in ("sub/00.tar", "sub/01.tar", "elsewhere/x.tar"):
        write_tar(tmp_path / name, {})
    config = HamerTarDataset(format="hamer_tar", path=["sub/{00..01}.tar", "$TARS/x.tar"])
    names = ["sub/00.tar", "sub/01.tar", "elsewhere/x.tar"]
    assert source_files(config, tmp_path) == [tmp_path / name for name in names]


def test_missing_source_files_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {})
    with pytest.raises(InputError, match=r"5 of 6 source files do not exist: .*1\.tar, .*2\.tar, .*3\.tar and 2 more"):
        source_files(_tar_config("{0..5}.tar"), tmp_path)


def test_a_source_file_named_twice_is_a_mistake(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {})
    with pytest.raises(InputError, match=r"0\.tar is named twice"):
        source_files(HamerTarDataset(format="hamer_tar", path=["0.tar", "{0..0}.tar"]), tmp_path)


def test_identity_holds_what_decides_a_manifest_and_no_more() -> None:
    same = [ingest_identity("set", _tar_config(path, weight=weight)) for path, weight in (("a.tar", 1), ("b.tar", 2))]
    assert same[0] == same[1]
    others = [
        ingest_identity("other", _tar_config()),
        ingest_identity("set", _tar_config(protocol="ho3d")),
        ingest_identity("set", _tar_config(filtering={"min_keypoints": None})),
    ]
    assert all(other != same[0] for other in others)
    json.dumps(others)


def test_pictures_in_training_and_evaluation_are_found(tmp_path: Path) -> None:
    train = [_scan(tmp_path / "t", sample("a", seed=1) | sample("b", annotation(), annotation(), seed=2))]
    evaluation = [_scan(tmp_path / "e", sample("x", seed=3) | sample("y", seed=2))]
    assert shared_pictures(train, evaluation) == [("set:b#0", "set:y#0")]
    assert shared_pictures(train, []) == shared_pictures([], evaluation) == []


def test_an_id_of_an_earlier_source_is_left_out(tmp_path: Path) -> None:
    first = _scan(tmp_path / "1", sample("a") | sample("b"))
    second = _scan(tmp_path / "2", sample("b", seed=5) | sample("c"))
    kept, marked = without_repeated_ids([first, second])
    assert kept.equals(first)
    assert [str(reason)[:9] for reason in marked.column("reason").to_pylist()] == ["duplicate", "None"]
    assert marked.schema.equals(SCHEMA)
    assert without_repeated_ids([first]) == [first]
    assert without_repeated_ids([]) == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_of_common_kinds_are_taken(tmp_path: Path, kind: str) -> None:
    row = _scan(tmp_path, sample("a") | {"a.jpg": picture(33, 44, kind=kind)}, filtering={}).to_pylist()[0]
    assert (row["width"], row["height"], row["reason"]) == (33, 44, None)
