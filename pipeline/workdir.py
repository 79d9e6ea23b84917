"""The folders of a workdir, and the lease that lets one run at a time write to it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from storage.errors import InputError, WorkError


@dataclass(frozen=True)
class Workdir:
    """Every place that a run writes to, by name."""

    root: Path

    @property
    def manifests(self) -> Path:
        """One immutable Parquet file a source file and content."""
        return self.root / "manifests"

    @property
    def caches(self) -> Path:
        """Parent of the caches, one folder a fingerprint."""
        return self.root / "cache"

    @property
    def students(self) -> Path:
        """students/<name>/seed-<n>/<identity>/."""
        return self.root / "students"

    @property
    def evaluations(self) -> Path:
        """One folder an evaluation identity."""
        return self.root / "evaluations"

    @property
    def report(self) -> Path:
        """The comparison: report.html, table.md, table.csv, comparison.json."""
        return self.root / "report"

    @property
    def state(self) -> Path:
        """What may be lost without harm: digests remembered by size and time."""
        return self.root / "state"

    @property
    def events(self) -> Path:
        """Append-only JSON lines: what was computed, when, by whom."""
        return self.root / "logs" / "events.jsonl"

    @property
    def tracking_database(self) -> Path:
        return self.root / "mlflow.db"

    @property
    def tracking_artifacts(self) -> Path:
        return self.root / "mlflow-artifacts"


def open_workdir(path: str, base: Path) -> Workdir:
    """The workdir that a configuration names; nothing is made yet.

    Raises:
        InputError: it is an object-store URL, which this version does not write to.
    """
    if "://" in path:
        raise InputError(
            f"workdir: found {path!r}; this version writes to local (or mounted) folders only. Give a path."
        )
    return Workdir((base / Path(path).expanduser()).absolute())


@contextmanager
def lease(workdir: Workdir) -> Iterator[None]:
    """Hold the workdir alone. The kernel drops the lock with its holder, so a killed run never blocks the next.

    Raises:
        InputError: the folder cannot be written to.
        WorkError: another run holds it; the message names it.
    """
    path = workdir.root / "lease.json"
    try:
        workdir.root.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"workdir: cannot write to {workdir.root}: {error.strerror}. Choose another folder.") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise WorkError(
                f"another run holds {workdir.root}: {handle.read().strip() or 'it has not said who'}. "
                "Wait for it, or stop that process."
            ) from None
        handle.truncate(0)
        handle.write(json.dumps(_holder()))
        handle.flush()
        yield


def _holder() -> dict[str, str | int]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
