"""The folders of a workdir, the lease that lets one run at a time write to it, and the claim its workers carry."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from pipeline.job_code import JOB_NAME, check_job_code
from pipeline.store_lease import holder_sentence, lease_document, pushing, read_lease, store_lease, was_ours
from storage.bucket import Bucket
from storage.cache import CacheFolder
from storage.disk_cache import default_folder
from storage.durable import is_partial, remove_tree, sha256_bytes, sweep_partial
from storage.errors import BusyError, InputError, WorkError
from storage.mirror import Mirror
from storage.objects import is_url

log = logging.getLogger("handstill")

ORPHANS_END_IN_S = 60.0
"""How long a run waits for workers of a run that was killed. Ray's own notice within about a second that their driver
is gone; those of a cluster whose node is slow, later."""


@dataclass(frozen=True)
class Workdir:
    """Every place that a run writes to, by name."""

    root: Path
    """The folder; of a workdir on an object store this machine's copy (storage/mirror.py)."""
    store: Mirror | None = None

    @property
    def place(self) -> str:
        """What a configuration calls it: the same on every machine."""
        return str(self.root) if self.store is None else self.store.url

    def address(self, path: Path) -> Path | str:
        """Where readers on any machine find a cache: its folder, or its URL."""
        return path if self.store is None else self.store.address(path)

    def below(self, name: str) -> Workdir:
        """A workdir of its own in this one."""
        store = None if self.store is None else Mirror(self.root / name, f"{self.store.url}/{name}")
        return Workdir(self.root / name, store)

    def refresh(self) -> None:
        """Before anything is read: of a workdir on a store, bring the copy up to date."""
        if self.store is not None:
            store = self.store
            store.pull(lambda: was_ours(store))

    def settle(self) -> None:
        """Between two stages: what this machine made is on the store, and what others made is here."""
        if self.store is not None:
            self.store.push()
            self.store.pull(lambda: True)

    def remove(self, path: Path) -> None:
        """Delete a file or folder of the workdir, or a shard with its record; only under the lease."""
        if self.store is not None:
            self.store.remove(path)
        elif path.suffix == ".zarr":
            CacheFolder(path.parent.parent).discard(path.stem)
        else:
            remove_tree(path)

    @property
    def manifests(self) -> Path:
        """One immutable Parquet file a source file and content."""
        return self.root / "manifests"

    @property
    def caches(self) -> Path:
        """Parent of the caches, one folder a fingerprint, unless `cache.root` names another."""
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
    def exports(self) -> Path:
        """One folder an export, for people to take away; `clean` leaves them."""
        return self.root / "exports"

    @property
    def audits(self) -> Path:
        """One folder an audit, named by what was audited."""
        return self.root / "audit"

    @property
    def state(self) -> Path:
        """What may be lost without harm: digests remembered by size and time."""
        return self.root / "state"

    @property
    def events(self) -> Path:
        """Append-only JSON lines: what was computed, when, by whom."""
        return self.root / "logs" / "events.jsonl"

    @property
    def summary(self) -> Path:
        """What the last run did and cost; `pipeline.summary`."""
        return self.root / "summary.json"

    @property
    def summaries(self) -> Path:
        """The same of every run, named by when it began."""
        return self.root / "summaries"

    @property
    def references(self) -> Path:
        """What each pipeline file with this workdir refers to; `pipeline.references`."""
        return self.root / "references"

    @property
    def lease(self) -> Path:
        """Locked by the run at work; says who that is."""
        return self.root / "lease.json"

    @property
    def workers_lock(self) -> Path:
        """Locked (shared) by every worker that writes."""
        return self.root / "workers.lock"

    @property
    def tracking_database(self) -> Path:
        return self.root / "mlflow.db"

    @property
    def tracking_artifacts(self) -> Path:
        return self.root / "mlflow-artifacts"

    @property
    def tracking_runs(self) -> Path:
        """Spools of the pipeline's own runs, one folder each, until they are delivered."""
        return self.root / "tracking"


def open_workdir(path: str, base: Path) -> Workdir:
    """The workdir that a configuration names; nothing is made yet.

    Raises:
        InputError: it is a URL of what a run cannot write to.
    """
    if is_url(path):
        url = Bucket(path.rstrip("/")).url
        name = f"{sha256_bytes(url.encode())[:16]}-{url.rpartition('/')[2]}"
        root = (default_folder() / "workdirs" / name).absolute()
        return Workdir(root, Mirror(root, url))
    return Workdir((base / Path(path).expanduser()).absolute())


@contextmanager
def lease(workdir: Workdir, orphans_end_in_s: float = ORPHANS_END_IN_S) -> Iterator[None]:
    """Hold the workdir alone: no other run, and no worker that a killed run left behind, writes to it meanwhile.

    The kernel drops a lock with its holder, so a killed run never blocks the next. On an object store a lease does
    what the lock does here (`store_lease`); at the end everything is there.

    Raises:
        InputError: the folder cannot be written to.
        BusyError: another run holds it; the message names it.
        WorkError: a killed run's worker does not end, or the store does not answer.
    """
    try:
        workdir.root.mkdir(parents=True, exist_ok=True)
        handle = workdir.lease.open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"workdir: cannot write to {workdir.root}: {error.strerror}. Choose another folder.") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            who = holder_sentence(lease_document(handle.read()))
            raise BusyError(f"another run holds {workdir.root}: {who}. Wait for it, or stop that process.") from None
        handle.truncate(0)
        holder = _holder()
        handle.write(json.dumps(holder))
        handle.flush()
        # From here on a worker of another run that begins is refused; those at work already are waited for.
        _wait_for_orphans(workdir, orphans_end_in_s)
        with nullcontext() if workdir.store is None else store_lease(workdir.store, holder):
            yield


def sweep_leftovers(workdir: Workdir) -> None:
    """Remove what killed runs were writing outside the caches, which sweep themselves. Only under the lease."""
    for folder in (workdir.root, workdir.state, workdir.report):
        if folder.is_dir():
            sweep_partial(folder)
    for tree in (workdir.manifests, workdir.students, workdir.evaluations, workdir.audits):
        for path in [path for path in tree.rglob(".*.partial") if is_partial(path)]:
            if path.exists():  # not one within another
                remove_tree(path)


def _holder() -> dict[str, str | int]:
    said: dict[str, str | int] = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": secrets.token_hex(8),
    }
    if job := os.environ.get(JOB_NAME):
        said["job"] = job
    return said


def run_of(workdir: Workdir) -> str | None:
    """The name of the run that has the workdir, or had it last."""
    run = lease_document(_said_by_holder(workdir)).get("run")
    return None if run is None else str(run)


def _wait_for_orphans(workdir: Workdir, patience_s: float) -> None:
    """Return when no worker holds the workers' lock, which only those of a run that is gone can do now."""
    waiting_since: float | None = None
    with workdir.workers_lock.open("a") as handle:
        while not _try_lock(handle):
            if waiting_since is None:
                waiting_since = time.monotonic()
                log.info("waiting for workers that an earlier run left behind to end")
            if time.monotonic() - waiting_since > patience_s:
                raise WorkError(
                    f"a worker of an earlier run still holds {workdir.workers_lock} after {patience_s:.0f} s. "
                    f"Stop it (`fuser {workdir.workers_lock}` names it on its machine), then run again."
                )
            time.sleep(0.1)


def _try_lock(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclass(frozen=True)
class Claim:
    """What a run's workers write under: void as soon as another run has the workdir. Picklable."""

    workdir: Workdir
    holder: str
    """What lease.json said when the run gave out the work; it differs in every run."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around everything that a worker writes: the next run waits until it is left, or until the worker is dead.

        Raises:
            WorkError: another run has the workdir now, and this work is not wanted any more; or the worker has other
                code than the job that was submitted.
        """
        check_job_code()
        store = self.workdir.store
        self.workdir.root.mkdir(parents=True, exist_ok=True)
        with self.workdir.workers_lock.open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH)
            self.check()
            if store is None:
                yield
                return
            if _said_by_holder(self.workdir) != self.holder:  # another machine than the run's: a copy of its own
                store.pull(lambda: True)
            with pushing(store, leads=False, check=self.check):
                yield

    def check(self) -> None:
        """Raises WorkError where another run has the workdir now: what this worker made is not wanted any more."""
        if self.workdir.store is None:
            valid = _said_by_holder(self.workdir) == self.holder
        else:
            valid = read_lease(self.workdir.store.bucket)[0].get("run") == json.loads(self.holder)["run"]
        if not valid:
            raise WorkError(f"this worker's run is over: another run holds {self.workdir.place}")


def claim_of(workdir: Workdir) -> Claim:
    """The claim of the run that holds the workdir, to be given to its workers."""
    workdir.root.mkdir(parents=True, exist_ok=True)
    return Claim(workdir, _said_by_holder(workdir))


def _said_by_holder(workdir: Workdir) -> str:
    return workdir.lease.read_text(encoding="utf-8") if workdir.lease.is_file() else ""
