"""The evaluate stage: every student, and the teacher from its cache, scored on every evaluation set."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.model_config import model_config_path
from pipeline.caches import CacheState, cache_state
from pipeline.changes import by_change, score_changes
from pipeline.digests import digest_of
from pipeline.events import append_event
from pipeline.experiment import Experiment
from pipeline.plan import Reason, StagePlan, StageResult, count_reasons
from pipeline.progress import StageProgress
from pipeline.reproduction import PIPELINE_YAML, keep_configuration
from pipeline.tables import bytes_below
from pipeline.training import StudentState, student_states
from pipeline.workdir import claim_of
from pipeline.workers import network_resources, ray_session, run_units
from storage.cache import HAND_MODEL
from storage.durable import canonical_json, sweep_partial, write_bytes_atomic
from storage.errors import WorkError
from storage.inputs import bring
from trainer.config import SCORING_VERSION, LatencyConfig

if TYPE_CHECKING:
    from pipeline.tracking import CacheInput, TrackingTarget
    from trainer.evaluate import EvaluationResult, EvaluationSet

LOGGED = "logged.json"
"""Written last: the scores are computed and MLflow has them."""
TEACHER = "teacher"


@dataclass(frozen=True)
class EvaluationState:
    """One network on all evaluation sets, as things are now."""

    label: str
    student: StudentState | None
    """None: the teacher."""
    identity: Mapping[str, Any] | None
    """What decides the scores; None: something upstream has still to be done."""
    parent: Path

    @property
    def digest(self) -> str:
        assert self.identity is not None, "asked for an evaluation whose inputs are not known yet"
        return digest_of(self.identity)

    @property
    def folder(self) -> Path:
        return self.parent / self.digest[:16]

    @property
    def done(self) -> bool:
        return self.identity is not None and (self.folder / LOGGED).is_file()

    @property
    def run_id(self) -> str:
        """The MLflow run that has the scores."""
        return str(json.loads((self.folder / LOGGED).read_text(encoding="utf-8"))["run_id"])


def evaluation_states(experiment: Experiment) -> list[EvaluationState]:
    """The teacher and every student, with what they are to be scored on."""
    cache = cache_state(experiment, "evaluate")
    students = student_states(experiment, cache_state(experiment, "train"))
    parent = experiment.workdir.evaluations
    teacher = EvaluationState(TEACHER, None, _identity(experiment, cache, "from the cache"), parent / TEACHER)
    return [
        teacher,
        *(
            EvaluationState(
                state.label,
                state,
                _identity(experiment, cache, state.digest if state.done else None),
                parent / state.label,
            )
            for state in students
        ),
    ]


def _identity(experiment: Experiment, cache: CacheState, network: str | None) -> dict[str, Any] | None:
    if network is None or None in cache.digests.values():
        return None
    return {
        "scoring_version": SCORING_VERSION,
        "network": network,
        "cache": cache.fingerprint,
        "snapshots": cache.digests,
        "protocols": {name: experiment.datasets[name].protocol for name in cache.datasets},
        "latency": experiment.config.evaluate.latency.model_dump(mode="json"),
    }


def plan_evaluate(experiment: Experiment) -> StagePlan:
    """Which networks have no scores for what they are and for what the evaluation sets hold."""
    states = evaluation_states(experiment)
    todo = [state for state in states if not state.done]
    reasons: list[Reason] = ["changed" if any(state.parent.glob(f"*/{LOGGED}")) else "new" for state in todo]
    changes = [
        change
        for state in todo
        if state.identity is not None
        for change in score_changes(state.label, state.parent.glob(f"*/{LOGGED}"), state.identity)
    ]
    return StagePlan(
        total=len(states),
        todo=len(todo),
        unit="networks",
        reasons=count_reasons(reasons),
        why=(
            *by_change(changes),
            *(f"{reason}: {state.label}" for reason, state in zip(reasons, todo, strict=True)),
        ),
        work=tuple({"unit": state.label, "reason": reason} for reason, state in zip(reasons, todo, strict=True)),
        changes=tuple(changes),
        units=tuple(todo),
        estimated=any(state.identity is None for state in todo),
    )


@dataclass(frozen=True)
class EvaluateUnit:
    """One network to score; picklable."""

    label: str
    name: str
    seed: int
    student: Path | None
    sets: tuple[EvaluationSet, ...]
    model_config: Path
    hand_model: Path
    out_dir: Path
    identity: str
    batch_size: int
    latency: LatencyConfig
    log_cases: bool
    target: TrackingTarget
    run_folder: Path
    """Where a student's training left the spool of its MLflow run."""
    tags: dict[str, str]
    inputs: tuple[CacheInput, ...]
    events: Path


def evaluate_unit(unit: EvaluateUnit) -> EvaluationResult:
    """Score one network and tell MLflow (runs in a worker)."""
    append_event(unit.events, "evaluate_started", unit=unit.label)
    unit.out_dir.mkdir(parents=True, exist_ok=True)
    sweep_partial(unit.out_dir)  # of an attempt that died
    result = _score(unit)
    run_id = _log(unit, result)
    write_bytes_atomic(unit.out_dir / LOGGED, canonical_json({"run_id": run_id}))
    append_event(unit.events, "evaluate_done", unit=unit.label, bytes=bytes_below(unit.out_dir))
    return result


def _score(unit: EvaluateUnit) -> EvaluationResult:
    from trainer.evaluate import EvaluateJob, TeacherJob, evaluate_student, evaluate_teacher

    if unit.student is None:
        bring(unit.model_config)
        return evaluate_teacher(
            TeacherJob(
                sets=unit.sets,
                hand_model=unit.hand_model,
                out_dir=unit.out_dir,
                identity=unit.identity,
                model_config=unit.model_config,
                latency=unit.latency,
            )
        )
    return evaluate_student(
        EvaluateJob(
            name=unit.name,
            seed=unit.seed,
            student=unit.student,
            sets=unit.sets,
            out_dir=unit.out_dir,
            identity=unit.identity,
            batch_size=unit.batch_size,
            latency=unit.latency,
        )
    )


def _log(unit: EvaluateUnit, result: EvaluationResult) -> str:
    from pipeline.run_log import StudentRun
    from trainer.evaluate import CASES, EVALUATION, SAMPLES

    values = {f"{name}/{key}": value for name, scores in result.metrics.items() for key, value in scores.items()}
    values |= {
        f"mean_pose/{name}/{key}": value for name, scores in result.mean_pose.items() for key, value in scores.items()
    }
    values |= {f"latency_ms/{size}": value for size, value in result.latency_ms.items()}
    optional = {
        "fps": result.fps,
        "params_m": result.params_m,
        "gflop": result.gflop,
        "peak_memory_mb": result.peak_memory_mb,
        "latency_whole_path_ms": None if result.whole_path is None else result.whole_path.p50_ms,
    }
    values |= {key: value for key, value in optional.items() if value is not None}
    measured = digest_of({"identity": unit.identity, "values": values})[:16]  # repeated, latencies differ
    run = StudentRun(unit.target, None, unit.label, unit.tags, unit.inputs, unit.run_folder).open()
    run.metrics(values, once=f"evaluation/{measured}")
    run.artifact(unit.out_dir / EVALUATION, "evaluation")
    if unit.student is None:
        run.artifact(unit.out_dir / PIPELINE_YAML, "configuration", once="configuration")
    for each in unit.sets:  # not pred.json: hundreds of megabytes on the real sets
        for table in (SAMPLES, CASES) if unit.log_cases else (SAMPLES,):
            run.artifact(unit.out_dir / each.dataset / table, f"evaluation/{each.dataset}")
    left, run_id = run.close("FINISHED"), run.run_id
    if left or run_id is None:
        raise WorkError(
            f"tracking.uri: {unit.label} is scored, and MLflow at {unit.target.uri} did not take it within "
            f"{unit.target.patience_s:g} s. Nothing is lost: run again when the server is there."
        )
    return run_id


def run_evaluate(experiment: Experiment, plan: StagePlan) -> StageResult:
    """Score what the plan names."""
    started = time.monotonic()
    if plan.todo:
        cluster = experiment.config.cluster
        cache = cache_state(experiment, "evaluate")
        units = [_unit(experiment, cache, state) for state in plan.units]
        with (
            ray_session(cluster),
            StageProgress("evaluate", len(units), "networks", events=experiment.workdir.events) as progress,
        ):
            for _ in run_units(
                evaluate_unit,
                units,
                cluster=cluster,
                claim=claim_of(experiment.workdir),
                resources=network_resources(),
                while_waiting=partial(progress.advance, 0),
                fresh_process=True,
            ):
                progress.advance()
    return StageResult(plan.todo, plan.total - plan.todo, seconds=time.monotonic() - started)


def _unit(experiment: Experiment, cache: CacheState, state: EvaluationState) -> EvaluateUnit:
    from pipeline.tracking import CacheInput, tracking_target
    from trainer.evaluate import EvaluationSet

    assert state.identity is not None
    state.folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(state.folder / "identity.json", canonical_json(state.identity))
    config = experiment.config
    digests = {name: digest or "" for name, digest in cache.digests.items()}
    sets = tuple(
        EvaluationSet(name, cache.address, digest, experiment.datasets[name].protocol)
        for name, digest in digests.items()
    )
    student = state.student
    return EvaluateUnit(
        label=state.label,
        name=TEACHER if student is None else student.name,
        seed=0 if student is None else student.seed,
        student=None if student is None else student.folder / "student",
        sets=sets,
        model_config=model_config_path(experiment.path(config.teacher.checkpoint)),
        hand_model=cache.root / HAND_MODEL,
        out_dir=state.folder,
        identity=state.digest,
        batch_size=config.evaluate.batch_size,
        latency=config.evaluate.latency,
        log_cases=config.evaluate.log_cases,
        target=tracking_target(config.tracking, experiment.workdir),
        run_folder=state.folder if student is None else student.folder,
        tags=keep_configuration(experiment, state.folder)
        | ({"handstill.kind": "teacher", "handstill.identity": state.digest} if student is None else student.tags()),
        inputs=tuple(
            CacheInput(name, str(cache.address), cache.fingerprint, digest, "evaluation")
            for name, digest in digests.items()
        ),
        events=experiment.workdir.events,
    )
