"""Snapshots: which samples a data set had at one moment, and in which shard and row each is cached.

    snapshots/<digest>.parquet   one row a sample, the quarantined ones too; immutable
    snapshots/<digest>.json      counts and the digest of the parquet file's bytes (sealed)
    HEAD.json                    data set -> digest of its current snapshot (sealed, replaced atomically)

The digest covers content, not parquet bytes: the cache's fingerprint and every column except `source`, so that data
moved to another folder keep their snapshot, and pyarrow's version does not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.durable import read_sealed_json, sealed_json, sha256_bytes, write_bytes_atomic
from storage.errors import DamageError, InputError
from storage.ledger import ShardRecord

HEAD_JSON = "HEAD.json"

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("shard", pa.string()),  # input hash; null: quarantined
        pa.field("row", pa.int32()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("image_sha256", pa.string()),
        pa.field("labels_sha256", pa.string()),
        pa.field("reason", pa.string()),  # null: cached
    ]
)

_DIGESTED = ("sample_id", "dataset", "shard", "row", "image_sha256", "labels_sha256", "reason")


class Plan(Protocol):
    """What a snapshot needs of a `storage.manifest.ShardPlan`."""

    @property
    def input_hash(self) -> str: ...
    @property
    def rows(self) -> Iterable[int]: ...


@dataclass(frozen=True)
class SnapshotInfo:
    """The sidecar of a snapshot."""

    dataset: str
    digest: str
    """The sixteen hex digits that name it."""
    cached: int
    quarantined: int
    bytes: int
    sha256: str


def build_snapshot(manifest: pa.Table, plans: Iterable[Plan], records: Mapping[str, ShardRecord]) -> pa.Table:
    """One row a manifest row: its place in the cache, or why it has none.

    manifest: of one data set. plans: all its shards, each of them in `records`. Every sample is accounted for or this
    stops (AssertionError): samples in = cached + quarantined.
    """
    shard = np.full(manifest.num_rows, None, dtype=object)
    row = np.full(manifest.num_rows, -1, dtype=np.int32)
    reason = np.array(manifest["reason"].to_pylist(), dtype=object)
    for plan in plans:
        _place(plan, records[plan.input_hash], manifest["sample_id"], shard, row, reason)
    cached = row >= 0
    assert (cached == (reason == None)).all(), "a sample is neither cached nor quarantined, or both"  # noqa: E711
    columns = {name: manifest[name] for name in ("sample_id", "dataset", "source", "image_sha256", "labels_sha256")}
    columns |= {"shard": pa.array(shard, pa.string()), "row": pa.array(row, pa.int32(), mask=~cached)}
    columns["reason"] = pa.array(reason, pa.string())
    return pa.table([columns[name].cast(SCHEMA.field(name).type) for name in SCHEMA.names], schema=SCHEMA)


def _place(plan: Plan, record: ShardRecord, sample_ids: Any, shard: Any, row: Any, reason: Any) -> None:
    """Fill in the places of one shard's samples: the rows of the shard are the plan's, less the quarantined ones."""
    rows = np.fromiter(plan.rows, dtype=np.int64)
    assert len(rows) == record.samples_in, plan.input_hash
    if record.quarantined:
        why = {sample.sample_id: sample.reason for sample in record.quarantined}
        ids = sample_ids.take(rows).to_pylist()
        kept = np.array([sample_id not in why for sample_id in ids])
        for index, sample_id in zip(rows[~kept], np.array(ids, dtype=object)[~kept], strict=True):
            reason[index] = why[sample_id]
        rows = rows[kept]
    assert len(rows) == record.rows, plan.input_hash
    shard[rows] = plan.input_hash
    row[rows] = np.arange(len(rows), dtype=np.int32)


def snapshot_digest(fingerprint: str, table: pa.Table) -> str:
    """Sixteen hex digits over the cache's fingerprint and the digested columns, values and nulls."""
    digest = hashlib.sha256(fingerprint.encode())
    for name in _DIGESTED:
        column = table[name]
        digest.update(f"\n{name} {len(column)}\n".encode())
        digest.update(_plain(pc.is_null(column)).astype(np.uint8).tobytes())
        if name == "row":
            digest.update(_plain(pc.fill_null(column, -1)).astype("<i4").tobytes())
            continue
        text = pc.fill_null(column, "").cast(pa.large_binary())
        digest.update(_plain(pc.binary_length(text)).astype("<i8").tobytes())
        for chunk in text.chunks:
            digest.update(_characters(chunk))
    return digest.hexdigest()[:16]


def _plain(column: Any) -> Any:
    return column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()


def _characters(chunk: pa.Array) -> bytes:
    """All strings of a chunk, one after the other."""
    _, offsets_buffer, data = chunk.buffers()
    if data is None or not len(chunk):
        return b""
    offsets = np.frombuffer(offsets_buffer, "<i8")[chunk.offset : chunk.offset + len(chunk) + 1]
    return bytes(memoryview(data)[offsets[0] : offsets[-1]])


def publish_snapshot(root: Path, fingerprint: str, dataset: str, table: pa.Table) -> str:
    """Write the snapshot unless it stands already, whole; returns its digest."""
    digest = snapshot_digest(fingerprint, table)
    path = snapshot_path(root, digest)
    if _stands(path):
        return digest
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    data = sink.getvalue().to_pybytes()
    write_bytes_atomic(path, data)
    quarantined = table.num_rows - table["reason"].null_count
    write_bytes_atomic(
        path.with_suffix(".json"),
        sealed_json(
            {
                "dataset": dataset,
                "digest": digest,
                "cached": table.num_rows - quarantined,
                "quarantined": quarantined,
                "bytes": len(data),
                "sha256": sha256_bytes(data),
            }
        ),
    )
    return digest


def _stands(path: Path) -> bool:
    try:
        read_snapshot(path)
    except (InputError, DamageError):
        return False
    return True


def snapshot_path(root: Path, digest: str) -> Path:
    """Where the snapshot of that digest stands."""
    return root / "snapshots" / f"{digest}.parquet"


def read_info(path: Path) -> SnapshotInfo:
    """The sidecar of the snapshot at `path` (the parquet file), its seal checked."""
    sidecar = path.with_suffix(".json")
    if not path.is_file() or not sidecar.is_file():
        raise InputError(
            f"no snapshot {path.stem} in {path.parent}; found {_known(path.parent)}. Run `handstill run teach`."
        )
    info = SnapshotInfo(**read_sealed_json(sidecar))
    if info.digest != path.stem:
        raise DamageError(f"{sidecar} belongs to another snapshot ({info.digest}); run `handstill run`")
    return info


def _known(folder: Path) -> str:
    return ", ".join(sorted(path.stem for path in folder.glob("*.parquet"))) or "none"


def read_snapshot(path: Path) -> pa.Table:
    """A snapshot's table, every byte of its file checked against the sidecar."""
    info = read_info(path)
    data = path.read_bytes()
    if len(data) != info.bytes or sha256_bytes(data) != info.sha256:
        raise DamageError(f"{path} is damaged: its bytes are not those that were written; run `handstill run`")
    return pq.read_table(pa.BufferReader(data), schema=SCHEMA)


def write_head(root: Path, digests: Mapping[str, str]) -> None:
    """Point at the current snapshots, all of them at once: data set -> digest."""
    write_bytes_atomic(root / HEAD_JSON, sealed_json({"snapshots": dict(digests)}))


def read_head(root: Path) -> dict[str, str]:
    """The current snapshots, data set -> digest; empty when none was published yet."""
    path = root / HEAD_JSON
    if not path.is_file():
        return {}
    digests: dict[str, str] = read_sealed_json(path)["snapshots"]
    return digests
