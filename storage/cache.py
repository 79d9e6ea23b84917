"""A cache folder: its identity, its shards, their ledger. `open_cache` (storage/reading.py) reads one.

<workdir>/cache/<fingerprint>/
    cache.json             the identity spelled out, digests of attachments (sealed)
    hand_model.safetensors an attachment: what decodes the stored poses
    codec.safetensors      an attachment, of fitted encodings: what decodes the stored features
    shards/<input hash>.zarr   immutable, published by rename
    ledger/<input hash>.json   written after its shard: a shard counts as finished when its record stands (sealed)
    ledger/<input hash>.withdrawn   why `verify` took the record away, until the shard is whole again (sealed)
    snapshots/, HEAD.json      storage/snapshots.py
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.codecs import Codec, open_codec
from storage.durable import (
    partial_path,
    remove_tree,
    sealed_json,
    sha256_file,
    sweep_partial,
    sync_directory,
    write_bytes_atomic,
)
from storage.errors import DamageError, InputError
from storage.identity import CACHE_JSON, cache_document, fingerprint, read_description
from storage.ledger import WITHDRAWN, ShardRecord, read_record, withdrawal_path, write_record, write_withdrawal
from storage.reading import CacheReader, open_cache
from storage.shards import record_from_disk

__all__ = ["CACHE_JSON", "HAND_MODEL", "Adoption", "CacheFolder", "CacheReader", "fingerprint", "open_cache"]

HAND_MODEL = "hand_model.safetensors"
_FOLDERS = ("shards", "ledger", "snapshots")


@dataclass(frozen=True)
class Adoption:
    """What `CacheFolder.adopt` found among shards that had no record."""

    adopted: tuple[ShardRecord, ...]
    discarded: tuple[str, ...]
    """Input hashes of shards that were damaged and are gone: work to be done again."""


@dataclass(frozen=True)
class CacheFolder:
    """One cache on disk. Cheap to make and to send to another process."""

    root: Path

    @staticmethod
    def create(
        parent: Path, identity: Mapping[str, Any], attachments: Mapping[str, bytes] | None = None
    ) -> CacheFolder:
        """The folder of this identity under `parent`, made if needed; running it again changes nothing.

        `attachments`: small files that belong to the identity, by name. Damaged ones are written again.
        """
        folder = CacheFolder(parent / fingerprint(identity))
        for name in _FOLDERS:
            (folder.root / name).mkdir(parents=True, exist_ok=True)
        if not folder.intact(set(attachments or {})):
            for name, data in (attachments or {}).items():
                write_bytes_atomic(folder.root / name, data)
            write_bytes_atomic(folder.root / CACHE_JSON, sealed_json(cache_document(identity, attachments or {})))
        sync_directory(parent)
        return folder

    def intact(self, names: set[str]) -> bool:
        """Whether the folders are there, and cache.json and the attachments of these names as they were written."""
        if not all((self.root / name).is_dir() for name in _FOLDERS):
            return False
        try:
            listed = self.description()["attachments"]
        except (InputError, DamageError):
            return False
        return names <= listed.keys() and not self.damaged_attachments()

    def description(self) -> dict[str, Any]:
        """cache.json, checked: format, format_version, fingerprint, identity, attachments."""
        return read_description(self.root)

    @property
    def identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = self.description()["identity"]
        return identity

    def codec(self) -> Codec:
        """What encodes and decodes the features of this cache."""
        return open_codec(self.root, self.identity["features"])

    @property
    def fingerprint(self) -> str:
        return self.root.name

    @property
    def shards_dir(self) -> Path:
        return self.root / "shards"

    @property
    def ledger_dir(self) -> Path:
        return self.root / "ledger"

    @property
    def snapshots_dir(self) -> Path:
        return self.root / "snapshots"

    def shard_path(self, input_hash: str) -> Path:
        return self.shards_dir / f"{input_hash}.zarr"

    def record_path(self, input_hash: str) -> Path:
        return self.ledger_dir / f"{input_hash}.json"

    def withdrawal_path(self, input_hash: str) -> Path:
        return withdrawal_path(self.record_path(input_hash))

    def damaged_attachments(self) -> list[Path]:
        """Attachments that are gone or not what cache.json says."""
        listed = self.description()["attachments"]
        return [
            self.root / name
            for name, digest in listed.items()
            if not (self.root / name).is_file() or sha256_file(self.root / name) != digest["sha256"]
        ]

    def finished(self) -> dict[str, ShardRecord]:
        """Records by input hash. A damaged record counts for nothing: `adopt` writes it again from its shard."""
        found = {path.stem: self.finished_record(path.stem) for path in sorted(self.ledger_dir.glob("*.json"))}
        return {input_hash: record for input_hash, record in found.items() if record is not None}

    def finished_record(self, input_hash: str) -> ShardRecord | None:
        """The record of one shard; None when there is none, or no sound one."""
        try:
            return read_record(self.record_path(input_hash))
        except (FileNotFoundError, DamageError):
            return None

    def unrecorded(self, recorded: Collection[str] | None = None) -> list[str]:
        """Input hashes of published shards without a sound record: killed before recording, or withdrawn.

        recorded: the keys of `finished()`, where the caller knows them.
        """
        recorded = self.finished().keys() if recorded is None else recorded
        return sorted(path.stem for path in self.shards_dir.glob("*.zarr") if path.stem not in recorded)

    def adopt(self, recorded: Collection[str] | None = None) -> Adoption:
        """Check every unrecorded shard in full; record the whole ones, discard the damaged. Before a run's work.

        Notes about shards that are gone altogether go too: there is nothing left that could be damaged.
        """
        adopted, discarded = [], []
        for input_hash in self.unrecorded(recorded):
            try:
                adopted.append(self.adopt_shard(input_hash))
            except DamageError:
                self.discard(input_hash)
                discarded.append(input_hash)
        for note in self.ledger_dir.glob(f"*{WITHDRAWN}"):
            if not self.shard_path(note.stem).exists():
                note.unlink()
        return Adoption(tuple(adopted), tuple(discarded))

    def adopt_shard(self, input_hash: str) -> ShardRecord:
        """Record one published shard from its own bytes; DamageError unless it is whole."""
        record = record_from_disk(self.shard_path(input_hash))
        if record.input_hash != input_hash:
            raise DamageError(f"{self.shard_path(input_hash)} holds another shard ({record.input_hash})")
        self.record(record)
        return record

    def record(self, record: ShardRecord) -> None:
        """Record a published shard, which is finished from here on; what was held against an earlier one is void."""
        self.withdrawal_path(record.input_hash).unlink(missing_ok=True)  # first: a note never stands beside a record
        write_record(self.record_path(record.input_hash), record)

    def withdraw(self, input_hash: str, why: Sequence[str] = ()) -> None:
        """Take a shard's record away, so that the next run checks it in full and makes it again if it is damaged.

        why: kept beside the ledger until then, for whoever asks in between.
        """
        self.record_path(input_hash).unlink(missing_ok=True)
        sync_directory(self.ledger_dir)
        if why:
            write_withdrawal(self.withdrawal_path(input_hash), why)

    def discard(self, input_hash: str) -> None:
        """Remove a shard: its record first, then its name, then its bytes."""
        self.withdraw(input_hash)
        path = self.shard_path(input_hash)
        doomed = partial_path(path)
        try:
            path.rename(doomed)
        except FileNotFoundError:
            return  # it has no bytes, or another run discards it too
        sync_directory(self.shards_dir)
        remove_tree(doomed)
        self.withdrawal_path(input_hash).unlink(missing_ok=True)

    def sweep_temporary(self) -> int:
        """Remove what killed writers left; only while no writer is at work. Returns how many."""
        folders = [self.root, *(self.root / name for name in _FOLDERS)]
        return sum(sweep_partial(folder) for folder in folders if folder.is_dir())
