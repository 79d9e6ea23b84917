"""`handstill status`: how far each stage is, from the plans and the event log; works beside a live run."""

from __future__ import annotations

from typing import Any

from pipeline.caches import cache_state, current_snapshots
from pipeline.events import EventTail
from pipeline.experiment import Experiment
from pipeline.ingesting import ingested, quarantined, reasons_to_leave_out
from pipeline.manifests import ManifestIndex
from pipeline.plan import StagePlan
from pipeline.retention import undelivered
from pipeline.run import plan_all
from pipeline.teaching import ROLES
from storage.errors import DamageError, InputError
from storage.snapshots import read_info, snapshot_path


def status(experiment: Experiment) -> dict[str, Any]:
    """Per stage: total, done, stale, quarantined, last_error (DESIGN section 7), and what a run is doing now."""
    plans = plan_all(experiment)
    errors, current = _from_events(experiment)
    tables = [table for group in ingested(experiment, ManifestIndex(experiment)).values() for table in group]
    bad = {"ingest": sum(quarantined(table) for table in tables), "teach": _quarantined_at_teach(experiment)}
    stages = {
        name: {
            "total": plan.total,
            "done": plan.total - plan.todo,
            "stale": _stale(plan),
            "quarantined": bad.get(name, 0),
            "last_error": errors.get(name),
        }
        for name, plan in plans.items()
    }
    workdir = experiment.workdir
    return {
        "stages": stages,
        "current_stage": current,
        "left_out_at_ingest": reasons_to_leave_out(tables),
        "undelivered_records": sum(map(undelivered, (workdir.tracking_runs, workdir.students, workdir.evaluations))),
    }


def _stale(plan: StagePlan) -> int:
    return sum(count for reason, count in plan.reasons.items() if reason != "new")


def _from_events(experiment: Experiment) -> tuple[dict[str, str], str | None]:
    """Each stage's last error, if no success came after it; and the stage that is running."""
    errors: dict[str, str] = {}
    current: str | None = None
    covered: list[str] = []
    for event in EventTail(experiment.workdir.events, from_start=True).new():
        if event["event"] == "run_started":
            covered = list(event["stages"])
        elif event["event"] == "run_done":  # a run with nothing to do begins no stage
            errors = {stage: error for stage, error in errors.items() if stage not in covered}
        elif event["event"] == "stage_started":
            current = str(event["stage"])
        elif event["event"] == "stage_done":
            errors.pop(str(event["stage"]), None)
            current = None
        elif event["event"] == "run_failed" and current is not None:
            errors[current] = str(event["error"])
            current = None
    return errors, current


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
