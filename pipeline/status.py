"""`handstill status`: how far each stage is, from the plans and the event log; works beside a live run."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.caches import cache_state, current_snapshots
from pipeline.events import EventTail
from pipeline.experiment import Experiment
from pipeline.ingesting import ingested, quarantined, reasons_to_leave_out
from pipeline.manifests import ManifestIndex
from pipeline.plan import StagePlan
from pipeline.retention import undelivered
from pipeline.run import plan_all
from pipeline.store_lease import TTL_S, alive_here, lease_document, read_lease
from pipeline.teaching import ROLES
from pipeline.workdir import Workdir
from storage.errors import DamageError, InputError
from storage.mirror import LEASE, Mirror
from storage.snapshots import read_info, snapshot_path

SILENT_FOR_S = 300.0
"""A run on another machine that has noted nothing for so long is not taken to be alive: its workers note what they use
every half minute."""


@dataclass
class _Told:
    """What the event log says of the runs so far."""

    errors: dict[str, str] = field(default_factory=dict)
    """Each stage's last error, if no success came after it."""
    stage: str | None = None
    """The one that a run was at when it said something last."""
    progress: dict[str, Any] = field(default_factory=dict)
    """Of that stage, as it was noted last."""
    run: str | None = None
    ended: bool = True
    last_s: float = 0.0
    workers: dict[str, str] = field(default_factory=dict)
    """The kind of work at which each node was seen last."""
    covered: list[str] = field(default_factory=list)
    """The stages that the last run was to go through."""

    def hear(self, event: dict[str, Any]) -> None:
        """Take in the next event."""
        kind = event["event"]
        self.last_s = float(event.get("time", 0.0))
        if kind == "run_started":
            self.covered, self.run = list(event["stages"]), event.get("run")
            self.stage, self.progress, self.workers, self.ended = None, {}, {}, False
        elif kind == "run_done":  # a run with nothing to do begins no stage
            self.errors = {stage: error for stage, error in self.errors.items() if stage not in self.covered}
            self.ended = True
        elif kind == "stage_started":
            self.stage, self.progress, self.ended = str(event["stage"]), {}, False
        elif kind == "stage_done":
            self.errors.pop(str(event["stage"]), None)
            self.stage = None
        elif kind == "run_failed":
            if self.stage is not None:
                self.errors[self.stage] = str(event["error"])
            self.stage, self.ended = None, True
        elif kind == "progress":
            self.progress = event
        elif kind == "usage" and event["what"] != "driver":
            self.workers[str(event.get("node"))] = str(event["what"])


def status(experiment: Experiment) -> dict[str, Any]:
    """Per stage: total, done, stale, quarantined, last_error (DESIGN section 7), and what a run is doing now."""
    plans = plan_all(experiment)
    told = _Told()
    for event in EventTail(experiment.workdir.events, from_start=True).new():
        told.hear(event)
    tables = [table for group in ingested(experiment, ManifestIndex(experiment)).values() for table in group]
    bad = {"ingest": sum(quarantined(table) for table in tables), "teach": _quarantined_at_teach(experiment)}
    stages = {
        name: {
            "total": plan.total,
            "done": plan.total - plan.todo,
            "stale": _stale(plan),
            "quarantined": bad.get(name, 0),
            "last_error": told.errors.get(name),
        }
        for name, plan in plans.items()
    }
    workdir = experiment.workdir
    running = _running(workdir, told)
    known = running is not None and told.run in (None, running["run"])  # else the log has not come here yet
    return {
        "stages": stages,
        "current_stage": told.stage if known else None,
        "running": running,
        "progress": _progress(told.progress) if known and told.progress else None,
        "left_out_at_ingest": reasons_to_leave_out(tables),
        "undelivered_records": sum(map(undelivered, (workdir.tracking_runs, workdir.students, workdir.evaluations))),
    }


def _stale(plan: StagePlan) -> int:
    return sum(count for reason, count in plan.reasons.items() if reason != "new")


def _progress(event: dict[str, Any]) -> dict[str, Any]:
    keys = ("done", "total", "unit_name", "per_second", "eta_s", "utilisation")
    age_s = round(max(0.0, time.time() - float(event["time"])), 1)
    return {"stage": event["what"], **{key: event.get(key) for key in keys}, "age_s": age_s}


def _running(workdir: Workdir, told: _Told) -> dict[str, Any] | None:
    """Who is at work in the workdir, as far as that can be seen without asking for its lease; None: nobody."""
    if workdir.store is not None:
        return _running_on(workdir.store, told)
    if told.ended:
        return None
    try:
        holder = lease_document(workdir.lease.read_bytes())
    except OSError:
        holder = {}  # a log without a lease: of a copied workdir
    said = _said(holder) | {"nodes": told.workers}
    if told.run is not None and holder.get("run") != told.run:
        return None  # the run that began last is not the one that has the workdir
    if holder.get("host") == socket.gethostname():
        return said if _alive(int(holder["pid"])) else None
    return said if time.time() - told.last_s < SILENT_FOR_S else None


def _running_on(store: Mirror, told: _Told) -> dict[str, Any] | None:
    """The same of a workdir on a store: by its lease, which a living run has changed within the last beats. The log is
    younger than the store's copy of it by up to `PUSH_EVERY_S`, so that it may still be of the run before."""
    holder, etag = read_lease(store.bucket)
    if etag is None or not holder or holder.get("released") or store.bucket.age_s(LEASE) > TTL_S:
        return None
    if alive_here(str(holder.get("process", ""))) is False:
        return None
    nodes = told.workers if told.run == holder.get("run") else {}
    return _said(holder) | {"nodes": nodes}


def _said(holder: Mapping[str, Any]) -> dict[str, Any]:
    """Who holds a workdir; `job`: the one that `submit --stop` ends, None where it is no job."""
    return {key: holder.get(key) for key in ("pid", "host", "since", "run", "job")}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def _quarantined_at_teach(experiment: Experiment) -> int:
    """Samples that the current snapshots leave out, those of ingest included."""
    total = 0
    for role in ROLES:
        state = cache_state(experiment, role)
        for name in state.datasets:
            digest = current_snapshots(state).get(name)
            try:
                total += 0 if digest is None else read_info(snapshot_path(state.root, digest)).quarantined
            except (DamageError, InputError):
                continue  # `plan` names what is damaged
    return total
