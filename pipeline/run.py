"""Plan and run the stages in order: what a whole run does, from the list of stages to the summary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

import pyarrow as pa

from pipeline.caches import forget_caches
from pipeline.checking import check_inputs
from pipeline.comparing import plan_compare, run_compare
from pipeline.evaluating import plan_evaluate, run_evaluate
from pipeline.events import append_event
from pipeline.experiment import Experiment
from pipeline.ingesting import plan_ingest, run_ingest
from pipeline.plan import Stage, StagePlan, StageResult
from pipeline.referring import refer
from pipeline.sharing import using
from pipeline.spool import unfinished_spools
from pipeline.synthesising import plan_synthesise, run_synthesise
from pipeline.teaching import plan_teach, run_teach
from pipeline.training import plan_train, run_train
from pipeline.workdir import lease, sweep_leftovers
from pipeline.workers import ray_session
from storage.errors import InputError

STAGES = (
    Stage("synthesise", plan_synthesise, run_synthesise),
    Stage("ingest", plan_ingest, run_ingest),
    Stage("teach", plan_teach, run_teach),
    Stage("train", plan_train, run_train),
    Stage("evaluate", plan_evaluate, run_evaluate),
    Stage("compare", plan_compare, run_compare),
)


def stages_until(experiment: Experiment, last: str | None) -> Sequence[Stage]:
    """The stages that a command is about: up to and with `last`, without those the configuration does not use."""
    names = [stage.name for stage in STAGES]
    end = len(STAGES) if last is None else names.index(last) + 1
    wanted = [stage for stage in STAGES[:end] if stage.name != "synthesise" or experiment.config.synthesise is not None]
    if not wanted:
        raise InputError("the configuration has no synthesise section, so there is nothing to synthesise")
    return wanted


def plan_all(experiment: Experiment, last: str | None = None) -> dict[str, StagePlan]:
    """What each stage would do now; writes nothing."""
    # Arrow's own allocator gives pages back that are asked for again at once: half of the real plan's system time.
    pa.set_memory_pool(pa.system_memory_pool())
    check_inputs(experiment, backbones=False)
    return {stage.name: stage.plan(experiment) for stage in stages_until(experiment, last)}


def run_all(experiment: Experiment, last: str | None = None) -> dict[str, StageResult]:
    """Run every stage that has something to do, in order, one run at a time in a workdir.

    Raises:
        InputError: before anything starts, where the configuration names what is not there or costs too much.
        WorkError: the work failed; what is finished is kept.
    """
    stages = stages_until(experiment, last)
    plans = plan_all(experiment, last)
    if any(plan.todo for plan in plans.values()):
        check_inputs(experiment)
    _check_cost(experiment, plans)
    with lease(experiment.workdir), using(experiment.cache_references):
        sweep_leftovers(experiment.workdir)
        experiment.digests.save()
        append_event(experiment.workdir.events, "run_started", stages=[stage.name for stage in stages])
        _deliver_leftovers(experiment)
        try:
            return _run_stages(experiment, stages, plans)
        except BaseException as error:
            with suppress(OSError):  # a full disk must not hide why the run failed
                told = (
                    "stopped by a signal"
                    if isinstance(error, KeyboardInterrupt)
                    else f"{type(error).__name__}: {error}"
                )
                append_event(experiment.workdir.events, "run_failed", error=told[:2000])
            raise


def _deliver_leftovers(experiment: Experiment) -> None:
    """Give MLflow what earlier runs could not; also of students that were killed in the middle."""
    workdir = experiment.workdir
    if any(unfinished_spools(folder) for folder in (workdir.tracking_runs, workdir.students, workdir.evaluations)):
        from pipeline.delivery import deliver_leftovers
        from pipeline.tracking import tracking_target

        deliver_leftovers(workdir, tracking_target(experiment.config.tracking, workdir), all_dead=True)


def _run_stages(experiment: Experiment, stages: Sequence[Stage], plans: dict[str, StagePlan]) -> dict[str, StageResult]:
    results: dict[str, StageResult] = {}
    if not any(plan.todo or plan.reasons for plan in plans.values()):
        for stage in stages:
            results[stage.name] = stage.run(experiment, plans[stage.name])
    else:
        forget_caches(experiment)  # another run may have had the workdir between the plan and the lease
        with ray_session(experiment.config.cluster):  # one Ray for all stages
            for stage in stages:
                results[stage.name] = _run_stage(experiment, stage)
    if "ingest" in results:
        refer(experiment)
    append_event(experiment.workdir.events, "run_done")
    return results


def _run_stage(experiment: Experiment, stage: Stage) -> StageResult:
    plan = stage.plan(experiment)  # again: what ran upstream may have changed what is to be done
    _check_cost(experiment, {stage.name: plan})  # sources that were never scanned had no price before
    append_event(experiment.workdir.events, "stage_started", stage=stage.name, todo=plan.todo, total=plan.total)
    started = time.monotonic()
    result = stage.run(experiment, plan)
    append_event(
        experiment.workdir.events,
        "stage_done",
        stage=stage.name,
        wall_s=round(time.monotonic() - started, 3),
        **result.as_json(),
    )
    return result


def _check_cost(experiment: Experiment, plans: dict[str, StagePlan]) -> None:
    allowed = experiment.config.cluster.max_gpu_hours
    cost = sum(plan.gpu_hours for plan in plans.values())
    if allowed is not None and cost > allowed:
        raise InputError(
            f"cluster.max_gpu_hours: this run would take about {cost:.3g} GPU-hours, {allowed:g} are allowed. "
            "Raise the limit, or look at `handstill plan` for what makes it so much."
        )
