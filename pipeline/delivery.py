"""Delivering spools to MLflow: one of them record by record, and all that earlier runs left in a workdir."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.spool import LAST_WORDS, Position, Record, Spool, unfinished_spools
from pipeline.tracking import MAX_METRICS, RefusedError, Tracker, TrackingTarget, UnreachableError
from pipeline.workdir import Workdir
from storage.durable import remove_tree
from storage.errors import DamageError

log = logging.getLogger("handstill")


class Courier:
    """Delivers one spool, record by record, and remembers each. For the holder of its lock.

    without_parent: begin a run whose parent the store does not know all the same, beside the others and not under it.
    """

    def __init__(self, spool: Spool, tracker: Tracker, *, without_parent: bool = False) -> None:
        self._spool, self._tracker, self._without_parent = spool, tracker, without_parent
        self._position = spool.position()
        self._sure = False
        """Whether the store is known to hold what the position says, and nothing after it."""
        self._all_in_doubt = False
        """Whether it may hold anything: it had the run already, and nobody knows what was put there."""

    def deliver(self) -> None:
        """Deliver all that the spool holds now.

        Raises:
            UnreachableError: the store does not answer; what was delivered is remembered.
            DamageError: the spool holds what is no record.
        """
        sure, self._sure = self._sure, False
        run_id = self._position.run_id
        if not sure and run_id is not None and not self._tracker.has(run_id):
            self._position = Position()  # deleted, or another store than before: it gets the whole story
        while batch := self._next_batch():
            self._spool.sync()
            self._position = self._delivered(batch, in_doubt=self._all_in_doubt or not sure)
            self._spool.remember(self._position)
            sure = True
        self._sure, self._all_in_doubt = True, False

    def _next_batch(self) -> list[Record]:
        """As many metrics records as one call takes, or one record of another kind."""
        batch: list[Record] = []
        values = 0
        for record in self._spool.records(self._position.offset):
            values += len(record.fields["values"]) if record.kind == "metrics" else 0
            if batch and (record.kind != "metrics" or values > MAX_METRICS):
                break
            batch.append(record)
            if record.kind != "metrics":
                break
        return batch

    def _delivered(self, batch: list[Record], *, in_doubt: bool) -> Position:
        """The position after sending a batch."""
        position, record = self._position, batch[0]
        try:
            if record.kind == "start":
                run_id = position.run_id or self._begin(record)
                position = replace(position, run_id=run_id, status="RUNNING")
            else:
                assert position.run_id is not None, f"{self._spool.path} does not begin with its run"
                if record.kind == "metrics":
                    self._tracker.metrics(position.run_id, batch, in_doubt=in_doubt)
                else:
                    self._tracker.put(position.run_id, record, self._spool.folder)
                position = replace(position, status=record.fields.get("status", position.status))
        except RefusedError as refused:
            position = self._without(position, record, refused)
        return replace(position, offset=batch[-1].end)

    def _without(self, position: Position, record: Record, refused: RefusedError) -> Position:
        """Go on without a record that the store will never take; the run itself it must take."""
        if position.run_id is None or not self._tracker.has(position.run_id):
            raise UnreachableError(f"the store has no run for it: {refused}") from refused
        return replace(position, refused=(*position.refused, f"{record.kind}: {refused}"))

    def _begin(self, start: Record) -> str:
        found = self._tracker.run_of(start.fields["spool"])
        self._all_in_doubt = found is not None
        return found or self._tracker.begin(start, self._parent(start))

    def _parent(self, start: Record) -> str | None:
        parent = start.fields["parent"]
        found = None if parent is None else self._tracker.run_of(parent)
        if parent is not None and found is None and not self._without_parent:
            raise UnreachableError("the pipeline's own run is not there yet")
        return found


def deliver_leftovers(workdir: Workdir, target: TrackingTarget, *, all_dead: bool = False) -> None:
    """Deliver what the spools of a workdir still hold; warns of what stays there.

    all_dead: nobody works in the workdir, so a run that did not say its end was killed.
    """
    parents, others = unfinished_spools(workdir.tracking_runs), []
    for folder in (workdir.students, workdir.evaluations):
        others += unfinished_spools(folder)
    if all_dead:
        for spool in [*parents, *others]:
            if spool.status() not in LAST_WORDS:
                spool.append("status", status="KILLED")
    waiting = [spool for spool in [*parents, *others] if spool.left()]
    problem = _deliver_each(waiting, target) if waiting else ""
    for spool in waiting:
        if left := spool.left():
            log.warning(
                "%d records of %s are not in MLflow (%s); the next `handstill run` delivers them",
                *(left, spool.path, problem or "another process is at it"),
            )
    for spool in parents:
        if not spool.left() and spool.position().status in LAST_WORDS:
            remove_tree(spool.folder)


def _deliver_each(spools: Sequence[Spool], target: TrackingTarget) -> str:
    """Deliver what can be delivered; why something could not, or nothing."""
    problem = ""
    try:
        tracker = Tracker(target)
        for spool in spools:
            with spool.delivering() as ours:
                if not ours:
                    continue
                try:
                    Courier(spool, tracker, without_parent=True).deliver()
                except DamageError as error:
                    problem = str(error)
    except (UnreachableError, RefusedError) as error:
        return str(error)
    return problem


def warn_of_refused(folder: Path) -> None:
    """Say what the store would not take of the spool in a folder."""
    spool = Spool(folder)
    for refused in spool.position().refused:
        log.warning("MLflow did not take a record of %s: %s", spool.path, refused)
