"""The compare stage: the students that the configuration names now, side by side, from MLflow."""

from __future__ import annotations

import json
import time
from typing import Any

from pipeline.evaluating import EvaluationState, evaluation_states
from pipeline.events import append_event
from pipeline.experiment import Experiment
from pipeline.plan import Reason, StagePlan, StageResult
from pipeline.tables import bytes_below, where_things_are
from storage.durable import canonical_json, write_bytes_atomic
from storage.errors import InputError
from trainer.config import REPORT_VERSION

IDENTITY = "identity.json"
"""Written last into the report's folder: what it was made from."""


def report_identity(experiment: Experiment, states: list[EvaluationState]) -> dict[str, Any] | None:
    """What the report is made from; None: something has no scores yet."""
    if not all(state.done for state in states):
        return None
    return {
        "report_version": REPORT_VERSION,
        "evaluations": {state.label: [state.digest, state.run_id] for state in states},
        "compare": experiment.config.compare.model_dump(mode="json"),
    }


def plan_compare(experiment: Experiment) -> StagePlan:
    """Whether the report shows the students and scores that there are now."""
    identity = report_identity(experiment, evaluation_states(experiment))
    made = experiment.workdir.report / IDENTITY
    if identity is not None and made.is_file() and made.read_bytes() == canonical_json(identity):
        return StagePlan(total=1, todo=0, unit="report")
    reason: Reason = "changed" if made.is_file() else "new"
    return StagePlan(1, 1, "report", {reason: 1}, why=(f"{reason}: the report",), estimated=identity is None)


def run_compare(experiment: Experiment, plan: StagePlan) -> StageResult:
    """Write the report where it is not up to date."""
    started = time.monotonic()
    if plan.todo:
        compare_now(experiment)
        size = bytes_below(experiment.workdir.report)
        append_event(experiment.workdir.events, "compare_done", unit="report", bytes=size)
    return StageResult(plan.todo, plan.total - plan.todo, seconds=time.monotonic() - started)


def compare_now(experiment: Experiment) -> tuple[dict[str, Any], str]:
    """Compare what is in MLflow, write the report; the document and the table with its places.

    Raises:
        InputError: a student has no scores yet.
    """
    from pipeline.tracking import tracking_target
    from trainer.compare import compare
    from trainer.report import write_report

    states = evaluation_states(experiment)
    identity = report_identity(experiment, states)
    if identity is None:
        waiting = ", ".join(state.label for state in states if not state.done)
        raise InputError(f"compare: no scores yet for {waiting}; run `handstill run evaluate`")
    target = tracking_target(experiment.config.tracking, experiment.workdir)
    digests = {state.student.digest for state in states if state.student is not None and state.student.digest}
    comparison = compare(target.uri, target.experiment, experiment.config.compare, digests)
    report = experiment.workdir.report
    report.mkdir(parents=True, exist_ok=True)
    write_report(comparison, report)
    write_bytes_atomic(report / IDENTITY, canonical_json(identity))
    text = "\n".join([(report / "table.md").read_text(encoding="utf-8").rstrip(), "", *where_things_are(experiment)])
    document: dict[str, Any] = json.loads(json.dumps(comparison.document))
    return document, text
