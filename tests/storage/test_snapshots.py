from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.cache import CacheFolder
from storage.errors import DamageError
from storage.ledger import Quarantined, ShardRecord
from storage.snapshots import (
    build_snapshot,
    publish_snapshot,
    read_head,
    read_info,
    read_snapshot,
    snapshot_digest,
    snapshot_path,
)
from tests.tiny_cache import TinyPlan, write_tiny_cache


def manifest(n: int, reasons: dict[int, str] | None = None) -> pa.Table:
    ids = [f"set:{index}#0" for index in range(n)]
    return pa.table(
        {
            "sample_id": ids,
            "dataset": ["set"] * n,
            "source": ["a.tar"] * n,
            "image_sha256": ["00" * 32] * n,
            "labels_sha256": ["11" * 32] * n,
            "reason": pa.array([(reasons or {}).get(index) for index in range(n)], pa.string()),
        }
    )


def record(input_hash: str, rows: int, bad: tuple[str, ...] = ()) -> ShardRecord:
    left_out = tuple(Quarantined(name, "undecodable") for name in bad)
    return ShardRecord(input_hash, "set", "train", rows + len(bad), rows, left_out, {}, {})


def snapshot() -> pa.Table:
    plans = [TinyPlan("aa", (0, 2, 3)), TinyPlan("bb", (4, 5))]
    records = {"aa": record("aa", 2, ("set:2#0",)), "bb": record("bb", 2)}
    return build_snapshot(manifest(6, {1: "no-label: x"}), plans, records)


def test_every_sample_is_cached_or_quarantined_with_its_reason() -> None:
    table = snapshot()
    assert table["shard"].to_pylist() == ["aa", None, None, "aa", "bb", "bb"]
    assert table["row"].to_pylist() == [0, None, None, 1, 0, 1]
    assert table["reason"].to_pylist() == [None, "no-label: x", "undecodable", None, None, None]


def test_a_sample_that_is_lost_stops_the_snapshot() -> None:
    with pytest.raises(AssertionError, match="neither cached nor quarantined"):
        build_snapshot(manifest(3), [TinyPlan("aa", (0, 1))], {"aa": record("aa", 2)})
    with pytest.raises(AssertionError):
        build_snapshot(manifest(2), [TinyPlan("aa", (0, 1))], {"aa": record("aa", 3)})


def test_digest_is_pinned_and_covers_content_but_not_the_place_of_sources() -> None:
    table = snapshot()
    digest = snapshot_digest("f" * 16, table)
    assert digest == "71ea53671a6f31d9"
    moved = table.set_column(table.schema.get_field_index("source"), "source", pa.array(["b.tar"] * 6))
    assert snapshot_digest("f" * 16, moved) == digest
    assert snapshot_digest("e" * 16, table) != digest
    for name in ("sample_id", "shard", "row", "image_sha256", "labels_sha256", "reason"):
        column = table[name].to_pylist()
        column[0] = 7 if name == "row" else "other"
        at = table.schema.get_field_index(name)
        assert snapshot_digest("f" * 16, table.set_column(at, name, pa.array(column, table.schema.types[at]))) != digest
    in_pieces = pa.concat_tables([table.slice(0, 2), table.slice(2)])
    assert snapshot_digest("f" * 16, in_pieces) == digest


def test_published_once_and_readable_by_any_parquet_tool(tmp_path: Path) -> None:
    root = write_tiny_cache(tmp_path, n=5, quarantined=2)
    cache = CacheFolder(root)
    (digest,) = read_head(root).values()
    path = snapshot_path(root, digest)
    table = read_snapshot(path)
    assert pq.read_table(path, partitioning=None).equals(table)
    info = read_info(path)
    assert (info.dataset, info.digest, info.cached, info.quarantined) == ("tiny", digest, 5, 2)
    before = path.stat().st_mtime_ns
    assert publish_snapshot(root, cache.fingerprint, "tiny", table) == digest
    assert path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamageError, match=digest):
        read_snapshot(path)
    publish_snapshot(root, cache.fingerprint, "tiny", table)
    assert read_snapshot(path).equals(table)


def test_a_snapshot_of_a_million_samples_takes_seconds() -> None:
    n, size = 1_000_000, 500
    ids = pa.array(np.char.add("set:", np.arange(n).astype(str)))
    same = pa.array(["00" * 32]).take(pa.array(np.zeros(n, np.int32)))
    names = dict.fromkeys(("dataset", "source", "image_sha256", "labels_sha256"), same)
    table = pa.table({"sample_id": ids, **names, "reason": pa.nulls(n, pa.string())})
    plans = [TinyPlan(f"{start:064d}", tuple(range(start, start + size))) for start in range(0, n, size)]
    built = build_snapshot(table, plans, {plan.input_hash: record(plan.input_hash, size) for plan in plans})
    assert built["row"].null_count == 0
    assert len(snapshot_digest("f" * 16, built)) == 16
