"""The lease of a workdir on an object store: an object that its holder keeps changing, written on conditions only.

Nobody compares clocks of two machines: who finds the lease held watches whether it changes. One that stands still for
`TTL_S` of looks is taken over, by a write that succeeds only if it still stands still; one whose process is known to be
dead, because it ran on this machine, at once. A holder that finds another's name in it stops.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.repeating import repeated
from storage.bucket import Bucket
from storage.errors import BusyError, InputError, WorkError
from storage.mirror import LEASE, OWN, Mirror

log = logging.getLogger("handstill")

BEAT_S = 15.0
"""How often a holder changes the lease."""
TTL_S = 90.0
"""A lease that was seen unchanged for so long has a dead holder: six beats."""
LOOK_S = 2.0
PUSH_EVERY_S = 60.0
"""How often logs and checkpoints are put onto the store while the work that makes them goes on."""


@dataclass
class Held:
    """A lease in hand."""

    bucket: Bucket
    document: dict[str, Any]
    etag: str
    lost: str = ""
    """Why it is ours no more."""

    def beat(self) -> None:
        """Change it once; sets `lost` where another has it."""
        changed = self.document | {"beat": self.document["beat"] + 1}
        etag = self.bucket.write_if(LEASE, _bytes(changed), self.etag)
        if etag is None:
            now, etag = read_lease(self.bucket)
            if now.get("run") != self.document["run"] or now.get("released"):
                self.lost = f"another run took {self.bucket.url}: {holder_sentence(now)}. This one has stopped."
                return
        self.document, self.etag = changed, str(etag)

    def check(self) -> None:
        """Raises WorkError where it is ours no more."""
        if self.lost:
            raise WorkError(self.lost)

    def release(self) -> None:
        """Give it back; whoever comes next need not wait."""
        if not self.lost:
            self.bucket.write_if(LEASE, _bytes(self.document | {"released": True}), self.etag)


def read_lease(bucket: Bucket) -> tuple[dict[str, Any], str | None]:
    """(what the lease says, its ETag); ({}, None) where there never was one."""
    try:
        data, etag = bucket.read(LEASE)
    except FileNotFoundError:
        return {}, None
    return lease_document(data), etag


def lease_document(data: str | bytes) -> dict[str, Any]:
    """What a lease says; nothing where nobody of ours wrote it."""
    try:
        document = json.loads(data)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def was_ours(mirror: Mirror) -> bool:
    """Whether the last run that wrote to the store, or writes to it now, works in this copy."""
    return read_lease(mirror.bucket)[0].get("copy") == copy_id(mirror)


def is_held(mirror: Mirror) -> bool:
    """Whether some run has the store's workdir now, or died with it."""
    found, _ = read_lease(mirror.bucket)
    return bool(found) and not found.get("released")


def copy_id(mirror: Mirror) -> str:
    """What tells this copy from those of other machines."""
    path = mirror.root / OWN / "id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(secrets.token_hex(8))
        except FileExistsError:
            pass  # another process was faster
    return path.read_text(encoding="utf-8")


@contextmanager
def store_lease(mirror: Mirror, holder: Mapping[str, Any]) -> Iterator[Held]:
    """Hold the store's workdir alone, bring the copy up to date, and put everything onto the store in the end.

    holder: who that is, as the local lease.json says it; `run` tells it from all others.

    Raises:
        BusyError: another run holds it; the message names it.
        InputError: the store refuses access, or does not honour conditional writes.
        WorkError: the store does not answer; or another run took the lease over meanwhile.
    """
    held, before = _taken(mirror, dict(holder))
    try:
        with repeated(lambda: _beat(held), BEAT_S, "lease"):
            mirror.pull(lambda: before.get("copy") == copy_id(mirror))
            with pushing(mirror, leads=True, check=held.check):
                yield held
    except KeyboardInterrupt:
        held.check()
        raise
    finally:
        held.release()


@contextmanager
def pushing(mirror: Mirror, *, leads: bool, check: Callable[[], None]) -> Iterator[None]:
    """While work goes on, what it made so far is put onto the store every minute; at its end, however it ends, all.

    check: raises WorkError where the workdir is another run's now; then nothing is put any more.

    Raises:
        InputError, WorkError: the store does not take what the finished work made.
    """

    def push() -> None:
        check()
        mirror.push(leads=leads)

    def push_or_warn() -> None:
        try:
            push()
        except (InputError, WorkError, OSError) as error:
            log.warning("not everything is on the store: %s", error)

    try:
        with repeated(push_or_warn, PUSH_EVERY_S, "push"):
            yield
    except BaseException:
        push_or_warn()  # what failed has its own message
        raise
    push()


def _beat(held: Held) -> None:
    if held.lost:
        return
    try:
        held.beat()
    except (InputError, WorkError) as error:
        log.warning("the lease could not be renewed, and is tried again: %s", error)
    if held.lost:
        # As Ctrl-C does: it ends what the main thread waits for.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _taken(mirror: Mirror, holder: dict[str, Any]) -> tuple[Held, dict[str, Any]]:
    """(the lease, what it said before)."""
    ours = {**holder, "copy": copy_id(mirror), "process": _this_process(), "beat": 0, "released": False}
    bucket = mirror.bucket
    while True:
        before, etag = read_lease(bucket)
        if before and not before.get("released"):
            _wait_for_its_end(bucket, before, str(etag))
        if (taken := bucket.write_if(LEASE, _bytes(ours), etag)) is None:
            now, found = read_lease(bucket)
            if now.get("run") != ours["run"] or found is None:
                continue  # another was faster: look at who
            taken = found
        _check_conditions(bucket)
        return Held(bucket, ours, taken), before


def _check_conditions(bucket: Bucket) -> None:
    """A store that ignores conditions would give the same workdir to two runs."""
    if bucket.write_if(LEASE, b"{}", None) is not None or bucket.write_if(LEASE, b"{}", '"0"') is not None:
        raise InputError(
            f"{bucket.url}: the store does not honour conditional writes (If-None-Match, If-Match), without which two "
            "runs could have one workdir; use a store that does, or a workdir on a disk"
        )


def _wait_for_its_end(bucket: Bucket, held: dict[str, Any], etag: str) -> None:
    """Return when the holder is dead. Only looks that were answered count, so that an outage ends no lease."""
    alive = alive_here(str(held.get("process", "")))
    if alive is False:
        return
    looked_s = 0.0
    if alive is None:
        log.info("%s is held: %s; waiting to see whether it lives", bucket.url, holder_sentence(held))
    while alive is None and looked_s < TTL_S:
        time.sleep(LOOK_S)
        now, found = read_lease(bucket)
        if not now or now.get("released") or now.get("run") != held.get("run"):
            return  # the next look at it says what to do
        alive = True if found != etag else None
        looked_s += LOOK_S
    if alive:
        raise BusyError(f"another run holds {bucket.url}: {holder_sentence(held)}. Wait for it, or stop that process.")


def holder_sentence(holder: Mapping[str, Any]) -> str:
    """What a lease says of the run that holds a workdir, for a person."""
    try:
        since = datetime.fromisoformat(holder["since"]).astimezone(UTC)
        job = f" (job {holder['job']})" if "job" in holder else ""
        return f"process {holder['pid']} on {holder['host']}{job}, since {since:%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, KeyError, TypeError):
        return "it has not said who it is"


def _bytes(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True).encode()


def _this_process() -> str:
    """Names a process among all that this machine, as it was started, ever has; empty where the system cannot say."""
    return f"{_machine()} {os.getpid()} {_started(os.getpid())}" if _machine() else ""


def alive_here(process: str) -> bool | None:
    """Whether a process of this machine is alive; None: it is of another machine or container."""
    machine, _, rest = process.rpartition(" ")[0].rpartition(" ")
    if not machine or machine != _machine():
        return None
    return _started(int(rest)) == process.rpartition(" ")[2]


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process was started, in ticks since the machine was; empty where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
