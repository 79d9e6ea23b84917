"""The synthesise stage: data sets of a rendered open hand, written where `datasets` expects them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pipeline.events import append_event
from pipeline.experiment import Experiment
from pipeline.plan import Reason, StagePlan, StageResult, count_reasons
from pipeline.progress import StageProgress
from pipeline.tables import bytes_below
from pipeline.workdir import claim_of
from pipeline.workers import Resources, ray_session, run_units
from stages.config import SynthesiseConfig
from stages.synthesise import SynthesiseUnit, run_unit, synthesise_units, unit_done


def _config(experiment: Experiment) -> SynthesiseConfig:
    config = experiment.config.synthesise
    assert config is not None, "the stage is left out where there is no synthesise section"
    if experiment.limit is None:
        return config
    limited = {
        name: made.model_copy(update={"hands": min(made.hands, experiment.limit)}) for name, made in config.sets.items()
    }
    return config.model_copy(update={"sets": limited})


def plan_synthesise(experiment: Experiment) -> StagePlan:
    """Which files of which sets are not there, or were made by other settings."""
    units: Sequence[SynthesiseUnit] = synthesise_units(_config(experiment), experiment.datasets, experiment.base)
    todo = tuple(unit for unit in units if not unit_done(unit))
    reasons: list[Reason] = ["changed" if unit.path.exists() else "new" for unit in todo]
    return StagePlan(
        total=len(units),
        todo=len(todo),
        unit="files",
        reasons=count_reasons(reasons),
        why=tuple(f"{reason}: {unit.path}" for reason, unit in zip(reasons, todo, strict=True)),
        units=todo,
    )


def run_synthesise(experiment: Experiment, plan: StagePlan) -> StageResult:
    """Render what the plan names."""
    started = time.monotonic()
    hands = sum(unit.hands for unit in plan.units)
    if plan.todo:
        cluster = experiment.config.cluster
        with (
            ray_session(cluster),
            StageProgress("synthesise", hands, "hands", events=experiment.workdir.events) as progress,
        ):
            for unit, _ in run_units(
                run_unit,
                list(plan.units),
                cluster=cluster,
                claim=claim_of(experiment.workdir),
                resources=Resources(),
                while_waiting=lambda: progress.advance(0),
            ):
                size = unit.path.stat().st_size + (bytes_below(unit.image_dir) if unit.image_dir is not None else 0)
                append_event(experiment.workdir.events, "synthesise_done", unit=str(unit.path), bytes=size)
                progress.advance(unit.hands)
    return StageResult(
        plan.todo, plan.total - plan.todo, samples_in=hands, samples_done=hands, seconds=time.monotonic() - started
    )
