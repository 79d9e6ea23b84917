"""The record of a finished shard: what went in, what is stored, what was left out and why, and its bytes' digests.

A record holds nothing that differs between an undisturbed run and one that was killed and resumed: no time, no host.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.durable import of_this_format, read_sealed_json, sealed_json, write_bytes_atomic
from storage.errors import DamageError

WITHDRAWN = ".withdrawn"
"""Ending of the note that stands in the place of a record which `verify` took away."""
_REASONS_KEPT = 20


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a file's bytes must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Quarantined:
    """A sample that was left out, and why."""

    sample_id: str
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """One finished shard. samples_in == rows + len(quarantined), always."""

    input_hash: str
    dataset: str
    role: str
    samples_in: int
    rows: int
    quarantined: tuple[Quarantined, ...]
    provenance: Mapping[str, Any]
    """Device kind, torch version, threads: what only moves the last bits."""
    files: Mapping[str, FileDigest]
    """Every file of the shard, by its path inside the shard's folder."""

    def __post_init__(self) -> None:
        assert self.samples_in == self.rows + len(self.quarantined), self.input_hash

    @property
    def bytes(self) -> int:
        """Size of the shard on disk."""
        return sum(digest.bytes for digest in self.files.values())


def record_document(record: ShardRecord) -> dict[str, Any]:
    """The record as it is written."""
    return {
        "input_hash": record.input_hash,
        "dataset": record.dataset,
        "role": record.role,
        "samples_in": record.samples_in,
        "rows": record.rows,
        "quarantined": quarantine_list(record.quarantined),
        "provenance": dict(record.provenance),
        "files": {
            name: {"bytes": digest.bytes, "sha256": digest.sha256} for name, digest in sorted(record.files.items())
        },
    }


def quarantine_list(quarantined: tuple[Quarantined, ...]) -> list[dict[str, str]]:
    """As it is written in records and shards."""
    return [{"sample_id": sample.sample_id, "reason": sample.reason} for sample in quarantined]


def read_quarantine(listed: list[dict[str, str]]) -> tuple[Quarantined, ...]:
    """What `quarantine_list` wrote."""
    return tuple(Quarantined(sample["sample_id"], sample["reason"]) for sample in listed)


def write_record(path: Path, record: ShardRecord) -> None:
    """Write the record atomically; after this the shard counts as finished."""
    write_bytes_atomic(path, sealed_json(record_document(record)))


def read_record(path: Path) -> ShardRecord:
    """Read a record and check its seal; DamageError when it is not as written."""
    fields = read_sealed_json(path)
    if fields.get("input_hash") != path.stem:
        raise DamageError(f"{path} holds the record of another shard ({fields.get('input_hash')})")
    with of_this_format(str(path)):
        return record_of_document(fields)


def record_of_document(fields: Mapping[str, Any]) -> ShardRecord:
    """What `record_document` made; the seal has been checked. KeyError and TypeError where it is another's."""
    return ShardRecord(
        input_hash=fields["input_hash"],
        dataset=fields["dataset"],
        role=fields["role"],
        samples_in=fields["samples_in"],
        rows=fields["rows"],
        quarantined=read_quarantine(fields["quarantined"]),
        provenance=fields["provenance"],
        # Interned: all shards have the same sixty names, and the real job's records are all in memory at once.
        files={sys.intern(name): FileDigest(**digest) for name, digest in fields["files"].items()},
    )


def withdrawal_path(record_path: Path) -> Path:
    """Where the note stands that says why a shard has lost its record."""
    return record_path.with_suffix(WITHDRAWN)


def write_withdrawal(path: Path, why: Sequence[str]) -> None:
    """Note why a shard lost its record; of very many reasons the first ones."""
    more = [f"and {len(why) - _REASONS_KEPT} more"] if len(why) > _REASONS_KEPT else []
    write_bytes_atomic(path, sealed_json({"input_hash": path.stem, "why": [*why[:_REASONS_KEPT], *more]}))


def read_withdrawal(path: Path) -> list[str]:
    """Why a shard lost its record; empty when nothing is noted. DamageError when the note is not as written."""
    if not path.is_file():
        return []
    with of_this_format(str(path)):
        return [str(reason) for reason in read_sealed_json(path)["why"]]
