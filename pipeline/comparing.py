"""`handstill compare`, and the compare stage: students side by side, from MLflow; a gate; the winner in the registry.

The stage compares the students that the configuration names now. The command does so too, looks at the gate and
promotes; or it compares whatever runs of whatever experiments and servers it is told, and then promotes nothing.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.digests import digest_of
from pipeline.evaluating import EvaluationState, evaluation_states
from pipeline.events import append_event
from pipeline.experiment import Experiment
from pipeline.plan import StagePlan, StageResult
from pipeline.tables import bytes_below, where_things_are
from storage.durable import canonical_json, write_bytes_atomic
from storage.errors import InputError
from trainer.config import REPORT_VERSION, CompareConfig

if TYPE_CHECKING:
    from pipeline.tracking import TrackingTarget
    from trainer.compare import Comparison

IDENTITY = "identity.json"
"""Written last into the report's folder: what it was made from."""


@dataclass(frozen=True)
class CompareRequest:
    """What `handstill compare` was told on the command line; nothing: the configuration's own students."""

    experiments: tuple[str, ...] = ()
    filter: str = ""
    tracking_uri: str | None = None
    out: Path | None = None

    @property
    def elsewhere(self) -> bool:
        """Whether it is about other runs than the configuration's own."""
        return bool(self.experiments or self.filter or self.tracking_uri)


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
    states = evaluation_states(experiment)
    identity = report_identity(experiment, states)
    made = experiment.workdir.report / IDENTITY
    if identity is not None and made.is_file() and made.read_bytes() == canonical_json(identity):
        return StagePlan(total=1, todo=0, unit="report")
    if not made.is_file():
        return StagePlan(1, 1, "report", {"new": 1}, why=("new: the report",), estimated=identity is None)
    why = f"changed: the report, which {_other_than(made, {state.label for state in states}, identity)}"
    return StagePlan(1, 1, "report", {"changed": 1}, why=(why,), estimated=identity is None)


def _other_than(made: Path, now: set[str], identity: dict[str, Any] | None) -> str:
    """In what the report that is there differs from the one that is wanted, which is about `now` and whose identity is
    None until all of them have scores."""
    try:
        before = json.loads(made.read_bytes())
        was = set(before["evaluations"])
    except (ValueError, KeyError, TypeError):
        return "is of another version"
    if not (was & now) - {"teacher"}:
        return "is about other students: another file with this workdir made it"
    if was != now:
        gone, more = ", ".join(sorted(was - now)), ", ".join(sorted(now - was))
        others = [f"has {gone}, which this file does not name" if gone else "", f"lacks {more}" if more else ""]
        return " and ".join(filter(None, others))
    if identity is None:
        return "has scores that are to be made again"
    parts = {"report_version": "its layout", "compare": "the section `compare`"}
    other = [told for key, told in parts.items() if before.get(key) != identity[key]]
    other += [
        f"the scores of {name}"
        for name in sorted(now)
        if was and before["evaluations"][name] != identity["evaluations"][name]
    ]
    return f"was made before a change of {', '.join(other)}"


def run_compare(experiment: Experiment, plan: StagePlan) -> StageResult:
    """Write the report where it is not up to date. Nothing is promoted: that is for whoever looks at the gate."""
    started = time.monotonic()
    if plan.todo:
        compare_now(experiment, promotes=False)
        size = bytes_below(experiment.workdir.report)
        append_event(experiment.workdir.events, "compare_done", unit="report", bytes=size)
    return StageResult(plan.todo, plan.total - plan.todo, seconds=time.monotonic() - started)


def compare_now(experiment: Experiment, *, promotes: bool = True) -> tuple[dict[str, Any], str]:
    """Compare what the configuration names, write the report, log it; the document and the text for a person.

    promotes: register the winner, where the configuration says so and the gate is passed.

    Raises:
        InputError: a student has no scores yet.
        WorkError: the store does not answer, or the alias was moved meanwhile.
    """
    from pipeline.promoting import Alias, version_behind
    from pipeline.tracking import tracking_target
    from trainer.compare import compare
    from trainer.runs import Selection

    states = evaluation_states(experiment)
    identity = report_identity(experiment, states)
    if identity is None:
        waiting = ", ".join(state.label for state in states if not state.done)
        raise InputError(f"compare: no scores yet for {waiting}; run `handstill run evaluate`")
    config = experiment.config
    target = tracking_target(config.tracking, experiment.workdir)
    selection = Selection((target.experiment,), identities=_identities(states))
    wanted = config.compare.promote
    alias = None if wanted is None else Alias(wanted.model or config.tracking.experiment, wanted.alias)
    before = None if alias is None else version_behind(target, alias)
    comparison = compare(target.uri, selection, config.compare, first_of=None if alias is None else alias.uri)
    if promotes and alias is not None:
        _promote(comparison, target, alias, before)
    report = experiment.workdir.report
    _write(comparison, report, target)
    write_bytes_atomic(report / IDENTITY, canonical_json(identity))
    return _plain(comparison), _text(comparison, report, where_things_are(experiment))


def compare_elsewhere(config_path: Path, request: CompareRequest) -> tuple[dict[str, Any], str]:
    """Compare the runs that the request names, by the `compare` section of the configuration where there is a file.

    Raises:
        InputError: nothing says where MLflow is, or which experiments are meant; or no run is there.
        WorkError: the store does not answer.
    """
    from pipeline.tracking import TrackingTarget, limit_requests
    from trainer.compare import compare
    from trainer.runs import Selection

    target, config = _target_elsewhere(config_path, request)
    limit_requests()
    experiments = request.experiments or (target.experiment,)
    comparison = compare(target.uri, Selection(tuple(dict.fromkeys(experiments)), request.filter), config)
    out = request.out or Path("comparison")
    _write(comparison, out, TrackingTarget(target.uri, experiments[0], target.artifacts, target.patience_s))
    return _plain(comparison), _text(comparison, out, [f"report:        {out / 'report.html'}"])


def _target_elsewhere(config_path: Path, request: CompareRequest) -> tuple[TrackingTarget, CompareConfig]:
    from pipeline.experiment import open_experiment
    from pipeline.tracking import TrackingTarget, named_by, tracking_target
    from pipeline.tracking_uri import URI_VARIABLE, checked, existing, named_in_environment

    elsewhere = checked(request.tracking_uri, "--tracking-uri")
    if elsewhere:
        existing(elsewhere, "--tracking-uri")
    if config_path.is_file():
        experiment = open_experiment(config_path)
        target = tracking_target(experiment.config.tracking, experiment.workdir)
        config = experiment.config.compare
        if not elsewhere:
            existing(target.uri, named_by(experiment.config.tracking))
    else:
        uri = elsewhere or named_in_environment()
        if not uri or not request.experiments:
            wanted = "--experiment NAME" if uri else f"--tracking-uri URI (or {URI_VARIABLE}) and --experiment NAME"
            raise InputError(
                f"{config_path}: not found. Give another one with -c FILE, or say which runs are meant: {wanted}"
            )
        target, config = TrackingTarget(existing(uri, URI_VARIABLE), request.experiments[0]), CompareConfig()
    if elsewhere:
        target = TrackingTarget(elsewhere, target.experiment, None, target.patience_s)
    return target, config.model_copy(update={"promote": None})


def _identities(states: list[EvaluationState]) -> frozenset[str]:
    """What the runs of the students, and of the teacher, are known by."""
    return frozenset(s.digest if s.student is None else s.student.digest or "" for s in states)


def _promote(comparison: Comparison, target: TrackingTarget, alias: Any, before: str | None) -> None:
    from pipeline.promoting import promote, stays

    gate = comparison.document["gate"]
    if not gate["passed"]:
        gate["promoted"] = stays(alias, before)
    elif gate["winner"] is None:
        sentence = "No single seed passes the gate by itself, only their mean does: nothing was registered."
        gate["promoted"] = {"model": alias.model, "alias": alias.alias, "version": None, "sentence": sentence}
    else:
        gate["promoted"] = promote(target, alias, gate["winner"], before)
    gate["sentences"].append(gate["promoted"]["sentence"])


def _write(comparison: Comparison, folder: Path, target: TrackingTarget) -> None:
    """The report's files, and a run of MLflow that has them: one a comparison, however often it is made."""
    from pipeline.mlflow_views import keep_views
    from pipeline.run_log import log_files
    from trainer.report import COMPARISON_JSON, TABLE_MD, write_report
    from trainer.report_tables import warnings

    folder.mkdir(parents=True, exist_ok=True)
    (folder / IDENTITY).unlink(missing_ok=True)
    files = write_report(comparison, folder)
    document = comparison.document
    said = json.loads((folder / COMPARISON_JSON).read_text(encoding="utf-8"))
    identity = digest_of({"report_version": REPORT_VERSION, "comparison": said})
    scores, *_ = (folder / TABLE_MD).read_text(encoding="utf-8").partition("\n\n")
    tags = {
        "handstill.kind": "comparison",
        "handstill.identity": identity,
        "mlflow.note.content": "\n\n".join([*document["gate"]["sentences"], *warnings(document), scores]),
    }
    values = {"gate/passed": float(comparison.passed)} if document["gate"]["checks"] else {}
    keep_views(target, document)
    log_files(target, _outcome(document), identity, tags, values, files)


def _outcome(document: dict[str, Any]) -> str:
    """The name of a comparison's run, by which one is told from the other in a list."""
    from trainer.compare import best_of

    count, gate = len(document["by_student"]), document["gate"]
    who = "1 student" if count == 1 else f"{count} students"
    verdict = f", gate {'passed' if gate['passed'] else 'failed'}" if gate["checks"] else ""
    return f"{best_of(document) or 'none scored'}{verdict}: comparison of {who}"  # lists cut the end off


def _plain(comparison: Comparison) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(comparison.document))
    return document


def _text(comparison: Comparison, folder: Path, places: list[str]) -> str:
    table = (folder / "table.md").read_text(encoding="utf-8").rstrip()
    gate = comparison.document["gate"]
    verdict = f"\ngate: {'passed' if gate['passed'] else 'FAILED'}" if gate["sentences"] else ""
    return "\n".join([table + verdict, "", *places])
