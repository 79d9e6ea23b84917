"""The spool: everything that a run tells MLflow, kept first in a file of its own, and what of it has been delivered.

    tracking.jsonl      one record a line, appended and never changed; a line that a killed process tore does not count
    mlflow_run.json     which run of MLflow has them, and up to which byte of tracking.jsonl
    tracking.lock       locked by whoever delivers

The three files stand in the folder of the student (or of what else has a run). Whoever does the work appends, whoever
has the lock delivers (`pipeline.delivery`); the two may be threads of one process, or processes a week apart.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storage.durable import canonical_json, write_bytes_atomic
from storage.errors import DamageError

SPOOL = "tracking.jsonl"
POSITION = "mlflow_run.json"
LOCK = "tracking.lock"
LAST_WORDS = ("FINISHED", "FAILED", "KILLED")
"""The states in which MLflow leaves a run alone."""


@dataclass(frozen=True)
class Record:
    """One line of the spool."""

    kind: str
    fields: dict[str, Any]
    end: int
    """The byte after its line."""


@dataclass(frozen=True)
class Position:
    """How far a spool has been delivered."""

    run_id: str | None = None
    """The MLflow run that has the records; None: none yet."""
    offset: int = 0
    """Every record up to this byte has been delivered, and no record after it, but for those of the batch that was on
    its way when the writer died."""
    status: str = ""
    """The state that MLflow was last told."""
    refused: tuple[str, ...] = ()
    """What the store would not take, and why; it stays in the spool."""


class Spool:
    """The records of one run, in a folder. One process appends at a time: the holder of the workdir's claim."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / SPOOL
        self._lock = threading.Lock()
        self._known: set[str] | None = None

    def append(self, kind: str, *, once: str | None = None, **fields: Any) -> bool:
        """Add a record; False, and nothing added, where one of the same `once` is there already.

        `once` names what is recorded: a step that a resumed training repeats is told once.
        """
        with self._lock:
            known = self._known_names()
            if once is not None and once in known:
                return False
            record = {"kind": kind, "time_ms": int(time.time() * 1000), **fields}
            line = json.dumps(record if once is None else record | {"once": once}).encode() + b"\n"
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                written = os.write(descriptor, line)
            finally:
                os.close(descriptor)
            if written != len(line):
                self._known = None  # a full disk: what was torn is cut off before the next record
                raise OSError(f"{self.path}: {written} of {len(line)} bytes written: is the disk full?")
            if once is not None:
                known.add(once)
            return True

    def sync(self) -> None:
        """Force what was appended to the disk, so that a position never goes past what survives a power cut."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def records(self, offset: int = 0) -> Iterator[Record]:
        """The records from that byte on; a torn last line is not one. DamageError where a whole line is no record."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                try:
                    fields = json.loads(line)
                    yield Record(str(fields.pop("kind")), fields, offset)
                except (ValueError, KeyError, AttributeError) as error:
                    raise DamageError(
                        f"{self.path} is damaged before byte {offset}: {error}. Take that line out; the rest is kept."
                    ) from error

    def left(self) -> int:
        """How many records have not been delivered."""
        return sum(1 for _ in self.records(self.position().offset))

    def status(self) -> str:
        """The state that the run was last given, delivered or not."""
        told = self.position()
        states = [r.fields["status"] for r in self.records(told.offset) if r.kind == "status"]
        return states[-1] if states else told.status or "RUNNING"

    def position(self) -> Position:
        """How far it has been delivered."""
        path = self.folder / POSITION
        if not path.is_file():
            return Position()
        try:
            fields = json.loads(path.read_bytes())
            return Position(**fields | {"refused": tuple(fields.get("refused", ()))})
        except (ValueError, TypeError) as error:
            raise DamageError(f"{path} is damaged ({error}); delete it: all records are delivered again") from error

    def remember(self, position: Position) -> None:
        """Keep a position, durably."""
        write_bytes_atomic(self.folder / POSITION, canonical_json(asdict(position)))

    @contextmanager
    def delivering(self) -> Iterator[bool]:
        """Be the one that delivers; False while somebody else is. The kernel drops the lock with its holder."""
        with (self.folder / LOCK).open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _known_names(self) -> set[str]:
        """The `once` of every record; cuts off what a killed process left of a line."""
        if self._known is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            whole = 0
            self._known = set()
            for record in self.records():
                whole = record.end
                if "once" in record.fields:
                    self._known.add(record.fields["once"])
            if self.path.is_file() and self.path.stat().st_size > whole:
                os.truncate(self.path, whole)
        return self._known


def unfinished_spools(folder: Path) -> list[Spool]:
    """The spools below a folder that hold what is not delivered, or of whose run MLflow was not told the end."""
    spools = [Spool(path.parent) for path in sorted(folder.rglob(SPOOL))]
    return [spool for spool in spools if spool.left() or spool.position().status not in LAST_WORDS]
