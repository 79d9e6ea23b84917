"""Manifests: their bytes, and the shards that follow from them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from storage import manifest
from storage.errors import DamageError
from storage.manifest import (
    LABEL_COLUMNS,
    PLAN_COLUMNS,
    SCHEMA,
    labels_sha256,
    manifest_name,
    manifest_table,
    read_manifest,
    read_plan_columns,
    shards_of,
    write_manifest,
)


def _row(number: int, source: str = "0.tar", **changes: Any) -> dict[str, Any]:
    return {
        "sample_id": f"set:{source}/{number}#0",
        "dataset": "set",
        "source": source,
        "source_sha256": "0" * 64,
        "key": f"{number}",
        "hand": 0,
        "ordinal": number,
        "image_name": f"{number}.jpg",
        "image_path": None,
        "image_offset": 512,
        "image_length": 100,
        "image_sha256": f"{number:064x}",
        "width": 60,
        "height": 50,
        "center": [30.0, 25.0],
        "scale": [0.2, 0.15],
        "right": 1.0,
        "keypoints_2d": np.zeros(63),
        "keypoints_3d": np.zeros(84),
        "hand_pose": np.zeros(48),
        "betas": np.zeros(10),
        "has_hand_pose": 0.0,
        "has_betas": 0.0,
        "protocol": "",
        "truth_xyz": None,
        "truth_vertices": None,
        "reason": None,
    } | changes


def _table(*sizes: int, **changes: dict[str, Any]) -> pa.Table:
    """Sources of these sizes; `r<row>` changes that row."""
    rows = [_row(number, f"{source}.tar") for source, size in enumerate(sizes) for number in range(size)]
    return manifest_table([row | changes.get(f"r{index}", {}) for index, row in enumerate(rows)])


def test_a_manifest_comes_back_and_has_the_same_bytes_twice(tmp_path: Path) -> None:
    table = _table(3, r1={"reason": "no-label: x", "truth_xyz": np.zeros(63), "truth_vertices": np.ones(2334)})
    write_manifest(tmp_path / "a", table)
    write_manifest(tmp_path / "b", _table(3, r1={"reason": "no-label: x", "truth_xyz": np.zeros(63)}))
    write_manifest(tmp_path / "c", read_manifest(tmp_path / "a"))
    assert read_manifest(tmp_path / "a").equals(table)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes() != (tmp_path / "b").read_bytes()
    assert read_manifest(tmp_path / "a", PLAN_COLUMNS).column_names == PLAN_COLUMNS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_every_column_says_what_it_holds() -> None:
    assert all(field.metadata[b"what"] for field in SCHEMA)


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"", lambda data: b"x" * 5000])
def test_a_damaged_manifest_says_so(tmp_path: Path, damage: Any) -> None:
    write_manifest(tmp_path / "a.parquet", _table(3))
    (tmp_path / "a.parquet").write_bytes(damage((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(DamageError, match=r"a\.parquet.*handstill run"):
        read_manifest(tmp_path / "a.parquet")


def test_the_labels_digest_covers_every_label_and_nothing_else() -> None:
    changes: dict[str, Any] = {
        "center": [30.0, 25.5],
        "scale": [0.2, 0.16],
        "right": 0.0,
        "keypoints_2d": np.ones(63),
        "keypoints_3d": np.ones(84),
        "hand_pose": np.ones(48),
        "betas": np.ones(10),
        "has_hand_pose": 1.0,
        "has_betas": 1.0,
        "protocol": "hint",
        "truth_xyz": np.zeros(63),
        "truth_vertices": np.zeros(9),
    }
    assert sorted(changes) == sorted(LABEL_COLUMNS)
    digests = {labels_sha256(_row(0, **{name: value})) for name, value in changes.items()}
    assert len(digests | {labels_sha256(_row(0))}) == len(changes) + 1
    assert labels_sha256(_row(0, "1.tar", image_sha256="", reason="x: y")) == labels_sha256(_row(0))


def test_a_manifests_name_follows_its_content() -> None:
    names = {
        manifest_name(table)
        for table in (_table(3), _table(4), _table(3, r0={"reason": "x"}), _table(3, r0={"betas": np.ones(10)}))
    }
    assert len(names) == 4
    assert manifest_name(_table(3)) == manifest_name(_table(3)) in names


def test_shards_never_span_sources_and_hold_every_usable_row_once() -> None:
    table = _table(5, 2, 3, r6={"reason": "no-label: x"})
    shards = shards_of(table, "train", 2)
    assert [shard.rows.tolist() for shard in shards] == [[0, 1], [2, 3], [4], [5], [7, 8], [9]]
    assert [shard.n_samples for shard in shards] == [2, 2, 1, 1, 2, 1]
    assert {(shard.dataset, shard.role) for shard in shards} == {("set", "train")}
    assert len({shard.input_hash for shard in shards}) == 6


def test_leaving_a_hand_out_touches_its_shard_only() -> None:
    before = [shard.input_hash for shard in shards_of(_table(8), "train", 2)]
    after = [shard.input_hash for shard in shards_of(_table(8, r2={"reason": "x: y"}), "train", 2)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True, True]
    gone = shards_of(_table(8, r2={"reason": "x: y"}, r3={"reason": "x: y"}), "train", 2)
    assert [shard.input_hash for shard in gone] == [before[0], *before[2:]]


def test_adding_a_source_before_another_touches_no_shard_of_it() -> None:
    one = pa.concat_tables([_table(4)])
    two = pa.concat_tables([manifest_table([_row(n, "aa.tar") for n in range(3)]), _table(4)])
    assert {s.input_hash for s in shards_of(one, "train", 3)} < {s.input_hash for s in shards_of(two, "train", 3)}


@pytest.mark.parametrize("change", [{"image_sha256": "f" * 64}, {"right": 0.0}, {"sample_id": "set:other#0"}])
def test_what_a_shard_holds_is_in_its_hash(change: dict[str, Any]) -> None:
    (before,), (after,) = shards_of(_table(3), "train", 4), shards_of(_table(3, r1=change), "train", 4)
    assert before.input_hash != after.input_hash


def test_role_and_order_are_in_the_hash() -> None:
    table = _table(3)
    (train,), (evaluate,) = shards_of(table, "train", 4), shards_of(table, "evaluate", 4)
    (turned,) = shards_of(table.take([1, 0, 2]), "train", 4)
    assert len({train.input_hash, evaluate.input_hash, turned.input_hash}) == 3


def test_the_hash_is_the_documented_one() -> None:
    table = _table(2)
    lines = "".join(f"{row['image_sha256']} {row['labels_sha256']} {row['sample_id']} \n" for row in table.to_pylist())
    assert shards_of(table, "train", 9)[0].input_hash == hashlib.sha256(f"train\n{lines}".encode()).hexdigest()


def test_no_usable_row_no_shard() -> None:
    assert shards_of(_table(2, r0={"reason": "x"}, r1={"reason": "y"}), "train", 2) == []
    assert shards_of(SCHEMA.empty_table(), "train", 2) == []


def test_tables_in_pieces_are_cut_alike() -> None:
    table = _table(5, 3)
    pieces = pa.concat_tables([table.slice(0, 1), table.slice(1, 5), table.slice(6)])
    assert [s.input_hash for s in shards_of(pieces, "train", 2)] == [s.input_hash for s in shards_of(table, "train", 2)]
    part = shards_of(table.slice(5), "train", 2)
    assert [s.input_hash for s in part] == [s.input_hash for s in shards_of(table, "train", 2)][3:]


def test_the_columns_of_a_plan_are_those_of_the_manifest(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, _table(3, 2))
    assert read_plan_columns(path).to_pylist() == read_manifest(path, PLAN_COLUMNS).to_pylist()
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(DamageError, match=r"not a readable manifest .* `handstill run` writes it again"):
        read_plan_columns(path)


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_shards_do_not_depend_on_how_many_rows_are_hashed_at_once(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {"reason": "no-label: x"}
    table = _table(11, r2=bad, r7=bad, r8=bad)
    wanted = [(plan.input_hash, plan.rows.tolist()) for plan in shards_of(table, "train", 3)]
    assert [rows for _, rows in wanted] == [[0, 1], [3, 4, 5], [6], [9, 10]]
    monkeypatch.setattr(manifest, "_BLOCK_ROWS", block)
    assert [(plan.input_hash, plan.rows.tolist()) for plan in shards_of(table, "train", 3)] == wanted
