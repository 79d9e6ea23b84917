"""Snapshots: which samples a data set had at one moment, and in which shard and row each is cached.

    snapshots/<digest>.parquet   one row a sample, the quarantined ones too; immutable
    snapshots/<digest>.json      counts and the digest of the parquet file's bytes (sealed)
    HEAD.json                    data set -> digest of its current snapshot (sealed, replaced atomically)

The digest covers content, not parquet bytes: the cache's fingerprint and every column except `source`, so that data
moved to another folder keep their snapshot, and pyarrow's version does not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage.durable import of_this_format, read_sealed_json, sealed_json, sha256_bytes, write_bytes_atomic
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
    def rows(self) -> Sequence[int] | NDArray[np.int64]: ...


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


def build_snapshot(manifest: pa.Table, plans: Sequence[Plan], records: Mapping[str, ShardRecord]) -> pa.Table:
    """One row a manifest row: its place in the cache, or why it has none.

    manifest: of one data set. plans: all its shards, each of them in `records`. Every sample is accounted for or this
    stops (AssertionError): samples in = cached + quarantined.
    """
    shards = [plan.input_hash for plan in plans]
    shard = np.zeros(manifest.num_rows, dtype=np.int32)
    row = np.full(manifest.num_rows, -1, dtype=np.int32)
    left_out: dict[int, str] = {}
    for number, plan in enumerate(plans):
        rows = _kept_rows(plan, records[plan.input_hash], manifest["sample_id"], left_out)
        shard[rows] = number
        row[rows] = np.arange(len(rows), dtype=np.int32)
    missing = row < 0
    reason = _reasons(manifest["reason"], left_out)
    assert (missing == _plain(pc.is_valid(reason))).all(), "a sample is neither cached nor quarantined, or both"
    columns = {name: manifest[name] for name in ("sample_id", "dataset", "source", "image_sha256", "labels_sha256")}
    places = pa.DictionaryArray.from_arrays(pa.array(shard, mask=missing), pa.array(shards, pa.string()))
    columns |= {"shard": places, "row": pa.array(row, mask=missing), "reason": reason}
    return pa.table([columns[name].cast(SCHEMA.field(name).type) for name in SCHEMA.names], schema=SCHEMA)


def _kept_rows(plan: Plan, record: ShardRecord, sample_ids: Any, left_out: dict[int, str]) -> NDArray[np.int64]:
    """The manifest's rows that a shard holds, in its order: the plan's, less the quarantined, noted in `left_out`."""
    rows = np.asarray(plan.rows, dtype=np.int64)
    assert len(rows) == record.samples_in, plan.input_hash
    if record.quarantined:
        why = {sample.sample_id: sample.reason for sample in record.quarantined}
        ids = sample_ids.take(rows).to_pylist()
        left_out |= {int(row): why[name] for row, name in zip(rows, ids, strict=True) if name in why}
        rows = rows[[name not in why for name in ids]]
    assert len(rows) == record.rows, plan.input_hash
    return rows


def _reasons(column: Any, left_out: Mapping[int, str]) -> Any:
    """The manifest's reasons, and those that the teacher found."""
    if not left_out:
        return column
    reasons = column.to_pylist()
    for row, reason in left_out.items():
        assert reasons[row] is None, f"row {row} was left out twice"
        reasons[row] = reason
    return pa.array(reasons, pa.string())


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
    if snapshot_stands(root, digest):
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


def snapshot_stands(root: Path, digest: str) -> bool:
    """Whether the snapshot is published, every byte of its file as it was written."""
    try:
        _checked_bytes(snapshot_path(root, digest))
    except (InputError, DamageError):
        return False
    return True


def snapshot_path(root: Path, digest: str) -> Path:
    """Where the snapshot of that digest stands."""
    return root / "snapshots" / f"{digest}.parquet"


def read_info(path: Path) -> SnapshotInfo:
    """The sidecar of the snapshot at `path` (the parquet file), its seal checked."""
    sidecar = path.with_suffix(".json")
    there = [item for item in (path, sidecar) if item.is_file()]
    if not there:
        raise InputError(
            f"no snapshot {path.stem} in {path.parent}; found {_known(path.parent)}. Run `handstill run teach`."
        )
    if len(there) == 1:
        gone = sidecar if there == [path] else path
        raise DamageError(f"{gone} is gone; run `handstill run`, which writes the current snapshots again")
    with of_this_format(str(sidecar)):
        info = SnapshotInfo(**read_sealed_json(sidecar))
    if info.digest != path.stem:
        raise DamageError(f"{sidecar} belongs to another snapshot ({info.digest}); run `handstill run`")
    return info


def _known(folder: Path) -> str:
    return ", ".join(known_snapshots(folder.parent)) or "none"


def known_snapshots(root: Path) -> list[str]:
    """Digests of all snapshots that stand in a cache, current or not."""
    return sorted(path.stem for path in (root / "snapshots").glob("*.parquet"))


def read_snapshot(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A snapshot's table, every byte of its file checked against the sidecar. columns: these only, in less memory."""
    wanted = None if columns is None else list(columns)
    try:
        return pq.read_table(pa.BufferReader(_checked_bytes(path)), schema=SCHEMA, columns=wanted)
    except (pa.ArrowException, OSError) as error:  # a forged one: its bytes are those of its sidecar
        raise DamageError(f"{path} is damaged: no snapshot ({error}); run `handstill run`") from error


def _checked_bytes(path: Path) -> bytes:
    info = read_info(path)
    data = path.read_bytes()
    if len(data) != info.bytes or sha256_bytes(data) != info.sha256:
        raise DamageError(f"{path} is damaged: its bytes are not those that were written; run `handstill run`")
    return data


def write_head(root: Path, digests: Mapping[str, str]) -> None:
    """Point at the current snapshots, all of them at once: data set -> digest."""
    write_bytes_atomic(root / HEAD_JSON, sealed_json({"snapshots": dict(digests)}))


def read_head(root: Path) -> dict[str, str]:
    """The current snapshots, data set -> digest; empty when none was published yet."""
    path = root / HEAD_JSON
    if not path.is_file():
        return {}
    with of_this_format(str(path)):
        return {str(dataset): str(digest) for dataset, digest in read_sealed_json(path)["snapshots"].items()}
