"""Runs of several workdirs at once on one folder of caches: who may sweep, who may delete, who makes which shard.

All of it is kernel locks on files in `references/`, which die with their holder. Publication is atomic without them:
they save work and protect what is being written or read.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pipeline.digests import digest_of
from storage.errors import BusyError, InputError

USERS = "users.lock"
"""Shared by every run from its beginning to its end; `clean` and `verify` hold it alone."""
WRITERS = "writers.lock"
"""Shared by runs that write shards; held alone for a moment by a run that removes what dead ones left."""
CLAIMS = "claims.lock"
"""For each shard that is being made, one byte of this empty file is locked."""

POLL_S = 0.5
PATIENCE_S = 600.0
"""How long to wait for a shard that another run makes before making it too."""
_CLAIM_DIGITS = 15  # 60 bits: offsets of files are 63

Item = TypeVar("Item")


@contextmanager
def using(folder: Path) -> Iterator[None]:
    """Around a run: nothing that it may read is deleted meanwhile.

    Raises:
        InputError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / USERS).touch()
    except OSError as error:
        raise InputError(f"cache.root: cannot write to {folder}: {error.strerror}. Choose another folder.") from None
    with _lock(folder / USERS, fcntl.LOCK_SH):
        yield


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Around what must not meet a run of another workdir.

    Raises:
        BusyError: such a run is at work.
    """
    try:
        with _lock(folder / USERS, fcntl.LOCK_EX | fcntl.LOCK_NB):
            yield
    except BlockingIOError:
        raise BusyError(
            f"{what}: a run of another workdir is at work on the caches that {folder} belongs to. Wait for it."
        ) from None


@contextmanager
def writing(folder: Path, sweep: Callable[[], None]) -> Iterator[None]:
    """Around the writing of shards. Before and after it, if no other run writes, removes what dead writers left."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / WRITERS).open("a") as handle:
        _sweep_if_alone(handle.fileno(), sweep)
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield
        _sweep_if_alone(handle.fileno(), sweep)


def _sweep_if_alone(descriptor: int, sweep: Callable[[], None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    sweep()


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Around a read-modify-write of a file that several runs change; waits for its turn."""
    with _lock(path, fcntl.LOCK_EX):
        yield


@contextmanager
def _lock(path: Path, how: int) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        fcntl.flock(handle, how)
        yield


class ShardClaims:
    """The shards that this run is making, claimed before other runs; a context manager, in the run's own process.

    Locks of bytes, not files of their own: nothing is left behind, and a claim ends with the process that holds it.
    """

    def __init__(self, folder: Path, patience_s: float = PATIENCE_S) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(folder / CLAIMS, os.O_RDWR | os.O_CREAT, 0o644)
        self._patience_s = patience_s
        self._held: set[Path] = set()

    def __enter__(self) -> ShardClaims:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)  # and with it every claim

    def take_turns(self, items: Iterable[Item], record_of: Callable[[Item], Path]) -> Iterator[Item]:
        """The items that nobody else makes; those that another run makes come last, if it does not finish them.

        record_of: the path of a shard's record, which is there when the shard is finished.
        """
        later: list[Item] = []
        for item in items:
            record = record_of(item)
            self._release()
            if record.is_file():
                continue
            if self._claim(record):
                yield item
            else:
                later.append(item)
        for item in later:
            if not self._made_by_another(record_of(item)):
                yield item

    def _made_by_another(self, record: Path) -> bool:
        """Wait for the run that makes it. False: that run is gone, or takes too long."""
        give_up = time.monotonic() + self._patience_s
        while not record.is_file():
            self._release()
            if self._claim(record):
                return record.is_file()
            if time.monotonic() > give_up:
                return False
            time.sleep(POLL_S)
        return True

    def _claim(self, record: Path) -> bool:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(record))
        except (BlockingIOError, PermissionError):  # POSIX allows either
            return False
        self._held.add(record)
        return True

    def _release(self) -> None:
        done = {record for record in self._held if record.is_file()}
        for record in done:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, _place(record))
        self._held -= done


def _place(record: Path) -> int:
    """A byte for each shard of each cache: from the digest of fingerprint and input hash."""
    return int(digest_of([record.parent.parent.name, record.stem])[:_CLAIM_DIGITS], 16)
