"""The train stage: one run a student and seed, each in a process of its own that never saw the teacher."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.caches import CacheState, cache_state
from pipeline.changes import by_change, student_changes
from pipeline.digests import digest_of
from pipeline.events import EventTail, append_event, told
from pipeline.experiment import Experiment
from pipeline.plan import Reason, StagePlan, StageResult, count_reasons
from pipeline.progress import StageProgress
from pipeline.reproduction import PIPELINE_YAML, keep_configuration
from pipeline.tables import bytes_below
from pipeline.workdir import Claim, claim_of
from pipeline.workers import Resources, network_resources, ray_session, run_units
from storage.durable import canonical_json, write_bytes_atomic
from storage.inputs import bring
from trainer.config import TRAINING_VERSION, StudentRecipe

if TYPE_CHECKING:
    from pipeline.config import ClusterConfig
    from pipeline.run_log import RunLog, StudentRun
    from trainer.job import TrainJob, TrainResult


PROGRESS_EVERY_S = 5.0
"""How often a training says in the event log which step it is at; metrics come every `train.log_every` steps."""


@dataclass(frozen=True)
class StudentState:
    """One student and seed, as the configuration and the caches are now."""

    name: str
    seed: int
    recipe: StudentRecipe
    identity: Mapping[str, Any] | None
    """What decides its weights; None: something upstream has still to be done, so it is not known yet."""
    parent: Path
    own: Mapping[str, Any]
    """The part of the identity that the configuration alone decides."""

    @property
    def label(self) -> str:
        return f"{self.name}-seed{self.seed}"

    @property
    def digest(self) -> str | None:
        return None if self.identity is None else digest_of(self.identity)

    @property
    def folder(self) -> Path:
        assert self.digest is not None, "asked for the folder of a student whose inputs are not known yet"
        return self.parent / self.digest[:16]

    @property
    def done(self) -> bool:
        return self.digest is not None and (self.folder / "result.json").is_file()

    def tags(self) -> dict[str, str]:
        """How MLflow and `compare` tell its run from others."""
        return {
            "handstill.kind": "student",
            "handstill.student": self.name,
            "handstill.seed": str(self.seed),
            "handstill.strategy": self.recipe.distill.strategy,
            "handstill.backbone": self.recipe.backbone,
            "handstill.identity": self.digest or "",
        }

    @property
    def trained_before(self) -> bool:
        """Whether some other version of this student was trained."""
        return any(self.parent.glob("*/result.json"))


def student_states(experiment: Experiment, cache: CacheState) -> list[StudentState]:
    """Every student of the matrix with its identity."""
    states = []
    for name, recipe in experiment.recipes().items():
        files = {
            "weights_sha256": _sha256(experiment, recipe.weights),
            "mocap_sha256": _sha256(experiment, None if recipe.prior is None else recipe.prior.mocap),
        }
        for seed in experiment.config.train.seeds:
            own = _own_identity(experiment, recipe, seed, files)
            parent = experiment.workdir.students / name / f"seed-{seed}"
            states.append(StudentState(name, seed, recipe, _identity(recipe, cache, own), parent, own))
    return states


def _identity(recipe: StudentRecipe, cache: CacheState, own: Mapping[str, Any]) -> dict[str, Any] | None:
    snapshots = {name: cache.digests[name] for name in recipe.on}
    if None in snapshots.values():
        return None
    return {"cache": cache.fingerprint, "snapshots": snapshots, **own}


def _own_identity(
    experiment: Experiment, recipe: StudentRecipe, seed: int, files: Mapping[str, str | None]
) -> dict[str, Any]:
    return {
        "training_version": TRAINING_VERSION,
        "mix": {name: experiment.datasets[name].weight for name in recipe.on},
        "recipe": recipe.identity(),
        "seed": seed,
        **files,
    }


def _sha256(experiment: Experiment, name: str | None) -> str | None:
    return None if name is None else experiment.digests.sha256(experiment.path(name))


def plan_train(experiment: Experiment) -> StagePlan:
    """Which students have no result for their recipe and for what their caches hold."""
    states = student_states(experiment, cache_state(experiment, "train"))
    todo = [state for state in states if not state.done]
    reasons: list[Reason] = ["changed" if state.trained_before else "new" for state in todo]
    changes = [
        change
        for state in todo
        for change in student_changes(experiment, state.name, state.label, state.parent, state.identity or state.own)
    ]
    why = [
        f"{reason}: {state.label}" + (" (its caches are not up to date)" if state.identity is None else "")
        for reason, state in zip(reasons, todo, strict=True)
    ]
    return StagePlan(
        total=len(states),
        todo=len(todo),
        unit="students",
        reasons=count_reasons(reasons),
        why=(*by_change(changes), *why),
        work=tuple({"unit": state.label, "reason": reason} for reason, state in zip(reasons, todo, strict=True)),
        changes=tuple(changes),
        units=tuple(todo),
        estimated=any(state.identity is None for state in todo),
    )


@dataclass(frozen=True)
class TrainUnit:
    """One student to train; picklable."""

    job: TrainJob
    run: StudentRun
    label: str
    events: Path
    registered_name: str | None
    """Of the student's model in the registry; None: its files are an artifact of its run."""
    system_metrics_s: float
    claim: Claim
    resources: Resources
    threads: int | None
    """That each worker computes with; None: as many as Ray lets it."""
    cluster: ClusterConfig


class _Reporter:
    """Carries what the training loop reports to MLflow and to the event log.

    A step that is trained again, after a death between two checkpoints, is not told again.
    """

    def __init__(self, unit: TrainUnit, run: RunLog) -> None:
        self._unit, self._run = unit, run
        self._last_progress = time.monotonic()

    def on_start(self, params: Mapping[str, Any]) -> None:
        self._run.params(params)
        configuration = self._unit.run.folder / PIPELINE_YAML
        if configuration.is_file():  # not of a unit that was begun by an earlier version
            self._run.artifact(configuration, "configuration", once="configuration")
        append_event(self._unit.events, "train_started", unit=self._unit.label, mlflow_run=self._run.run_id)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.metrics(metrics, step, once=f"step/{step}")
        append_event(self._unit.events, "train_step", unit=self._unit.label, step=step)

    def on_progress(self, step: int) -> None:
        if time.monotonic() - self._last_progress >= PROGRESS_EVERY_S:
            self._last_progress = time.monotonic()
            append_event(self._unit.events, "train_progress", unit=self._unit.label, step=step)

    def on_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {f"validation/{key}": value for key, value in metrics.items()}
        self._run.metrics(values, step, once=f"validation/{step}")

    def on_pictures(self, step: int, path: Path) -> None:
        self._run.artifact(path, "pictures", once=f"pictures/{step}")

    def on_end(self, result: TrainResult) -> None:
        self._keep(result)
        append_event(
            self._unit.events,
            "train_done",
            unit=self._unit.label,
            step=result.steps,
            bytes=bytes_below(result.student),
            teacher_imported="models.teacher" in sys.modules,
        )

    def _keep(self, result: TrainResult) -> None:
        """The student's files, as a model or as they are."""
        from pipeline.registering import ModelRequest

        name = self._unit.registered_name
        if name is None:
            self._run.artifact(result.student, "student", once="student")
        else:
            self._run.model(result.student, ModelRequest("student", name, self._unit.run.tags, result.best_step))


def train_unit(unit: TrainUnit) -> TrainResult:
    """Train one student, or go on with it (runs in a worker of its own)."""
    for path in (unit.job.weights, unit.job.mocap):
        bring(path, fresh=True)
    if unit.resources.workers > 1:
        return _train_together(unit)
    import torch

    from trainer.loop import train

    if unit.threads is not None:
        torch.set_num_threads(unit.threads)
    with _reporting(unit) as reporter:
        return train(unit.job, reporter)


def _train_together(unit: TrainUnit) -> TrainResult:
    from pipeline.training_group import GroupWork, train_together

    work = GroupWork(unit.job, unit.label, unit.claim, unit.events, partial(_reporting, unit), unit.threads, told())
    loopback = unit.cluster.address == "local"
    return train_together(work, unit.resources, max_retries=unit.cluster.max_retries, loopback=loopback)


@contextmanager
def _reporting(unit: TrainUnit) -> Iterator[_Reporter]:
    """The student's MLflow run while it trains, and who tells it what happens."""
    from pipeline.system_metrics import measuring

    run = unit.run.open()
    status = "FAILED"
    try:
        with measuring(run, unit.system_metrics_s):
            yield _Reporter(unit, run)
        status = "FINISHED"
    finally:
        run.close(status)


def run_train(experiment: Experiment, plan: StagePlan) -> StageResult:
    """Train the students that the plan names, side by side where the cluster has room."""
    started = time.monotonic()
    if plan.todo:
        _train(experiment, list(plan.units))
    return StageResult(plan.todo, plan.total - plan.todo, seconds=time.monotonic() - started)


def _train(experiment: Experiment, states: list[StudentState]) -> None:
    from pipeline.delivery import warn_of_refused
    from pipeline.run_log import pipeline_run
    from pipeline.tracking import tracking_target

    cache = cache_state(experiment, "train")
    target = tracking_target(experiment.config.tracking, experiment.workdir)
    tail = EventTail(experiment.workdir.events)
    config = experiment.config
    with (
        ray_session(config.cluster),
        pipeline_run(experiment.workdir, target, config.name, {"handstill.stage": "train"}) as parent,
        StageProgress(
            "train", sum(state.recipe.steps for state in states), "steps", events=experiment.workdir.events
        ) as progress,
    ):
        units = [_unit(experiment, state, cache, parent) for state in states]
        steps: dict[str, int] = {}
        for unit, _ in run_units(
            train_unit,
            units,
            cluster=config.cluster,
            claim=claim_of(experiment.workdir),
            resources=lambda unit: unit.resources,
            while_waiting=lambda: _follow(tail, steps, progress),
            fresh_process=True,
        ):
            _follow(tail, steps, progress)
            warn_of_refused(unit.run.folder)


def _follow(tail: EventTail, steps: dict[str, int], progress: StageProgress) -> None:
    """Turn the workers' step events into progress; a resumed student starts where it was."""
    for event in tail.new():
        progress.note(event)
        if event["event"] in ("train_step", "train_progress", "train_done"):
            label, step = event["unit"], int(event["step"])
            progress.advance(max(0, step - steps.get(label, 0)))
            steps[label] = max(step, steps.get(label, 0))
    progress.advance(0)


def _unit(experiment: Experiment, state: StudentState, cache: CacheState, parent: str) -> TrainUnit:
    from pipeline.registering import registered_name
    from pipeline.run_log import StudentRun
    from pipeline.tracking import CacheInput, tracking_target
    from trainer.job import TrainJob

    assert state.digest is not None
    assert state.identity is not None
    resources = network_resources(state.recipe.workers, experiment.config.cluster)
    folder = state.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(folder / "identity.json", canonical_json(state.identity))
    snapshots = tuple(
        (name, cache.address, cache.digests[name] or "", experiment.datasets[name].weight) for name in state.recipe.on
    )
    job = TrainJob(
        name=state.name,
        seed=state.seed,
        recipe=state.recipe,
        snapshots=snapshots,
        hand_model=cache.root / "hand_model.safetensors",
        out_dir=folder,
        identity=state.digest,
        weights=_path(experiment, state.recipe.weights),
        mocap=_path(experiment, None if state.recipe.prior is None else state.recipe.prior.mocap),
        device="auto" if resources.gpus else "cpu",
    )
    inputs = tuple(
        CacheInput(name, str(root), cache.fingerprint, digest, "training") for name, root, digest, _ in snapshots
    )
    run = StudentRun(
        target=tracking_target(experiment.config.tracking, experiment.workdir),
        parent=parent,
        name=state.label,
        tags=state.tags() | keep_configuration(experiment, folder),
        inputs=inputs,
        folder=folder,
    )
    tracking = experiment.config.tracking
    cpus = state.recipe.workers.cpus
    return TrainUnit(
        job=job,
        run=run,
        label=state.label,
        events=experiment.workdir.events,
        registered_name=registered_name(tracking.experiment, state.name) if tracking.register_models else None,
        system_metrics_s=tracking.system_metrics_s,
        claim=claim_of(experiment.workdir),
        resources=resources,
        threads=None if cpus == "auto" else max(1, int(cpus)),
        cluster=experiment.config.cluster,
    )


def _path(experiment: Experiment, name: str | None) -> Path | None:
    return None if name is None else experiment.path(name)
