"""One run of MLflow as those who do the work write to it: into its spool at once, from there by a thread.

Nobody waits for the store in the middle of the work. A store that does not answer is asked again, at growing intervals;
the end of a unit of work waits for it only so long. What is left stays in the spool, for `pipeline.delivery`.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.delivery import Courier
from pipeline.provenance import provenance_tags
from pipeline.registering import ModelRequest
from pipeline.spool import Spool
from pipeline.tracking import CacheInput, RefusedError, Tracker, TrackingTarget, UnreachableError, check_store
from pipeline.workdir import Workdir
from storage.durable import remove_tree

log = logging.getLogger("handstill")

GATHER_S = 1.0
"""Metrics are sent this often at most: a call costs the same for one value as for a hundred."""
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0
HURRIED_RETRY_S = 0.5
"""While somebody waits for the end."""
START_PATIENCE_S = 5.0
"""How long a unit of work waits for its run before it begins, so that the event log can name it."""


class RunLog:
    """A run whose spool has begun. Nothing here waits for the store, but for `flush` and `close`."""

    def __init__(self, spool: Spool, target: TrackingTarget) -> None:
        self._spool, self._target = spool, target
        self._began_s = next(spool.records()).fields["time_ms"] / 1000
        self._changed = threading.Condition()
        self._appended = 1
        self._delivered = 0
        """Counts; equal: nothing is left."""
        self._hurry = self._closing = False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once the store has it."""
        return self._spool.position().run_id

    @property
    def age_s(self) -> int:
        """Seconds since the run began, also if another process began it."""
        return int(time.time() - self._began_s)

    def params(self, values: Mapping[str, Any]) -> None:
        """The run's parameters; those that it was given first stay."""
        self._append("params", once="params", values={key: str(value) for key, value in values.items()})

    def metrics(self, values: Mapping[str, float], step: int = 0, *, once: str | None = None) -> None:
        """Some metrics at one step."""
        self._append("metrics", once=once, step=step, values={key: float(value) for key, value in values.items()})

    def inputs(self, caches: Sequence[CacheInput]) -> None:
        """Say which cache snapshots the run read, as MLflow's dataset inputs."""
        once = "/".join(["inputs", *sorted(f"{cache.dataset}-{cache.digest}" for cache in caches)])
        self._append("inputs", once=once, caches=[asdict(cache) for cache in caches])

    def artifact(self, path: Path, folder: str | None = None, *, once: str | None = None) -> None:
        """A file, or all that is in a folder; it stays where it is until it is delivered."""
        self._append("artifact", once=once, path=os.path.relpath(path, self._spool.folder), folder=folder)

    def model(self, path: Path, request: ModelRequest) -> None:
        """A student's folder as the run's model."""
        where = os.path.relpath(path, self._spool.folder)
        self._append("model", once="model", path=where, model=asdict(request))

    def status(self, status: str) -> None:
        """RUNNING, or one of spool.LAST_WORDS."""
        self._append("status", status=status)

    def flush(self, patience_s: float) -> bool:
        """Wait until everything is delivered, but not longer; whether it is."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._delivered == self._appended, patience_s)
            self._hurry = False
            return done

    def close(self, status: str) -> int:
        """Say how it ended (one of LAST_WORDS), wait as long as the configuration says; how many records are left.

        What failed, or was told to stop, does not wait long: the next run will go on with it.
        """
        self.status(status)
        patience_s = self._target.patience_s
        delivered = self.flush(patience_s if status == "FINISHED" else min(patience_s, START_PATIENCE_S))
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if not delivered:
            return self._spool.left()
        self._thread.join()  # it has nothing to do but to drop the lock
        return 0

    def _append(self, kind: str, *, once: str | None = None, **fields: Any) -> None:
        if self._spool.append(kind, once=once, **fields):
            with self._changed:
                self._appended += 1
                self._changed.notify_all()

    def _work(self) -> None:
        """Deliver what comes, until `close`: the thread's life."""
        courier: Courier | None = None
        retry_s = FIRST_RETRY_S
        with ExitStack() as lock:
            while (appended := self._work_there_is()) is not None:
                try:
                    courier = courier or self._courier(lock)
                    courier.deliver()
                except (UnreachableError, RefusedError) as error:
                    log.debug("tracking: %s", error)
                    self._rest(retry_s, HURRIED_RETRY_S)
                    retry_s = min(2 * retry_s, LAST_RETRY_S)
                except Exception:  # whatever it is: it stops neither the training nor the attempts
                    log.warning("tracking failed", exc_info=True)
                    self._rest(LAST_RETRY_S, HURRIED_RETRY_S)
                else:
                    retry_s = FIRST_RETRY_S
                    with self._changed:
                        self._delivered = appended
                        self._changed.notify_all()
                    self._rest(GATHER_S, 0.0)

    def _courier(self, lock: ExitStack) -> Courier:
        tracker = Tracker(self._target)
        with ExitStack() as attempt:
            if not attempt.enter_context(self._spool.delivering()):
                raise UnreachableError("another process is delivering this spool")
            lock.enter_context(attempt.pop_all())
        return Courier(self._spool, tracker)

    def _work_there_is(self) -> int | None:
        """Wait; how much had been appended, as soon as that is more than was delivered; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._appended > self._delivered)
            return None if self._closing else self._appended

    def _rest(self, seconds: float, hurried_s: float) -> None:
        """Wait; less long as soon as somebody waits for the end."""
        started = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._hurry, seconds)
            left_s = hurried_s - (time.monotonic() - started)
            if self._hurry and left_s > 0:
                self._changed.wait_for(lambda: self._closing, left_s)


@dataclass(frozen=True)
class StudentRun:
    """What the tracking of one student, or of the teacher, needs; picklable."""

    target: TrackingTarget
    parent: str | None
    """The spool of the pipeline's run that it belongs under."""
    name: str
    tags: dict[str, str]
    inputs: tuple[CacheInput, ...]
    folder: Path
    """The student's own folder: its spool is there, so that a resumed training goes on in its run."""

    def open(self) -> RunLog:
        """The student's run: the one it had, else a new one. Waits for the store, but not long."""
        spool = Spool(self.folder)
        run = _open(spool, self.target, self.name, self.tags, self.parent)
        run.inputs(self.inputs)
        run.flush(START_PATIENCE_S)
        return run


def log_files(
    target: TrackingTarget,
    name: str,
    identity: str,
    tags: Mapping[str, str],
    values: Mapping[str, float],
    files: Sequence[Path],
) -> str | None:
    """Have a run of this identity with some values and files, once however often it is called; its id. A run that is
    whole is left as it is, with the end that it had. None, and a warning, where the store does not take it in time:
    the files stay where they are.

    files: those of one folder, which is the first one's; what lies deeper keeps its folder's name.
    """
    with suppress(UnreachableError, RefusedError):  # what is wrong comes up again below, with more patience
        if (whole := Tracker(target).run_of(identity, finished=True)) is not None:
            return whole
    root = files[0].parent
    with tempfile.TemporaryDirectory() as spool:
        run = _open(Spool(Path(spool)), target, name, tags, None, identity)
        run.metrics(values)
        for file in files:
            run.artifact(file, None if file.parent == root else str(file.parent.relative_to(root)))
        left, run_id = run.close("FINISHED"), run.run_id
        if left or run_id is None:
            log.warning("tracking.uri: %s did not take %s; its files are in %s", target.uri, name, root)
            return None
        return run_id


def _open(
    spool: Spool,
    target: TrackingTarget,
    name: str,
    tags: Mapping[str, str],
    parent: str | None,
    identity: str | None = None,
) -> RunLog:
    """identity: a run that the store has by that name is gone on with; None: it is a new one."""
    name_of_spool = identity or secrets.token_hex(8)
    fields = {"name": name, "spool": name_of_spool, "parent": parent, "tags": {**provenance_tags(), **tags}}
    begins = spool.append("start", once="start", **fields)
    run = RunLog(spool, target)
    if not begins:
        run.status("RUNNING")
    return run


_CURRENT: list[tuple[str, RunLog]] = []
"""The pipeline's run that this process has begun, and the name of its spool."""


def current_run() -> RunLog | None:
    """The pipeline's run, where this process is inside `pipeline_run`."""
    return _CURRENT[-1][1] if _CURRENT else None


@contextmanager
def pipeline_run(workdir: Workdir, target: TrackingTarget, name: str, tags: Mapping[str, str]) -> Iterator[str]:
    """The parent run of one `handstill run`: the name of its spool, for `StudentRun.parent`. Inside it: the same again.

    Raises:
        WorkError: the store answers that it cannot be used. One that does not answer is warned of, and work goes on.
    """
    if _CURRENT:
        yield _CURRENT[-1][0]
        return
    problem = check_store(target)
    if problem is not None:
        log.warning(
            "tracking.uri: %s does not answer (%s). The work goes on; what it logs is kept in %s and delivered when "
            "the store is there, at the latest by the next `handstill run`.",
            *(target.uri, problem, workdir.root),
        )
    spool = Spool(workdir.tracking_runs / secrets.token_hex(8))
    run = _open(spool, target, name, {"handstill.kind": "pipeline", **tags}, None)
    if problem is None:
        run.flush(START_PATIENCE_S)
    status = "FAILED"
    parent = str(next(spool.records()).fields["spool"])
    _CURRENT.append((parent, run))
    try:
        yield parent
        status = "FINISHED"
    finally:
        _CURRENT.pop()
        if run.close(status) == 0:
            remove_tree(spool.folder)  # whatever belongs under it finds it in the store
