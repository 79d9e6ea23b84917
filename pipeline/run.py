"""Plan and run the stages in order: what a whole run does, from the list of stages to the summary."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa

from pipeline.caches import forget_caches
from pipeline.checking import check_inputs
from pipeline.clean import clean_up
from pipeline.comparing import plan_compare, run_compare
from pipeline.evaluating import plan_evaluate, run_evaluate
from pipeline.events import append_event, telling
from pipeline.experiment import Experiment
from pipeline.ingesting import plan_ingest, run_ingest
from pipeline.notifying import notify
from pipeline.plan import Stage, StagePlan, StageResult
from pipeline.referring import refer
from pipeline.retention import cut_events
from pipeline.sharing import using
from pipeline.spool import unfinished_spools
from pipeline.stopping import NOTICE
from pipeline.summary import RunSummary, kind_of, told_of
from pipeline.synthesising import plan_synthesise, run_synthesise
from pipeline.teaching import plan_teach, run_teach
from pipeline.training import plan_train, run_train
from pipeline.workdir import lease, run_of, sweep_leftovers
from pipeline.workers import ray_session
from storage.errors import BusyError, DamageError, InputError

log = logging.getLogger("handstill")

STAGES = (
    Stage("synthesise", plan_synthesise, run_synthesise),
    Stage("ingest", plan_ingest, run_ingest),
    Stage("teach", plan_teach, run_teach),
    Stage("train", plan_train, run_train),
    Stage("evaluate", plan_evaluate, run_evaluate),
    Stage("compare", plan_compare, run_compare),
)


TRACKED = ("teach", "train", "evaluate")
"""The stages whose work MLflow hears of."""


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


def run_all(experiment: Experiment, last: str | None, summary: RunSummary) -> dict[str, StageResult]:
    """Run every stage that has something to do, in order, one run at a time in a workdir; tell whoever wants to know.

    summary: of this run; its document is there when this has ended, in whatever way.

    Raises:
        InputError: before anything starts, where the configuration names what is not there or costs too much.
        BusyError: another run has the workdir.
        WorkError: the work failed; what is finished is kept.
    """
    try:
        results = _run_all(experiment, last, summary)
    except BaseException as error:
        summary.end(error)
        notify(experiment.config.notify, summary.document)
        raise
    notify(experiment.config.notify, summary.document)
    return results


def _run_all(experiment: Experiment, last: str | None, summary: RunSummary) -> dict[str, StageResult]:
    NOTICE.within_s = experiment.config.cluster.stop_within_s
    stages = stages_until(experiment, last)
    plans = plan_all(experiment, last)
    if any(plan.todo for plan in plans.values()):
        check_inputs(experiment)
    _check_cost(experiment, plans)
    with (
        lease(experiment.workdir),
        telling(pipeline=experiment.config.name, run=run_of(experiment.workdir), node=socket.gethostname()),
    ):
        sweep_leftovers(experiment.workdir)
        experiment.digests.save()
        append_event(experiment.workdir.events, "run_started", stages=[stage.name for stage in stages])
        _deliver_leftovers(experiment)
        try:
            with _tracked(experiment, plans), summary.recorded():
                with using(experiment.cache_references):
                    results = _run_stages(experiment, stages, plans, summary)
                summary.cleaned = _clean_up(experiment)
        except BaseException as error:
            with suppress(OSError):  # a full disk must not hide why the run failed
                append_event(experiment.workdir.events, "run_failed", kind=kind_of(error), error=told_of(error))
            raise
        retention = experiment.config.retention
        if retention.at_end:
            cut_events(experiment.workdir.events, retention.events, time.time())
        return results


def _clean_up(experiment: Experiment) -> dict[str, Any] | None:
    """At the end of a run, if that is wanted: what nobody needs any more goes. What hinders it fails nothing."""
    if not experiment.config.retention.at_end:
        return None
    forget_caches(experiment)
    try:
        return clean_up(experiment)
    except (InputError, BusyError, DamageError) as error:
        log.warning("retention.at_end: nothing was deleted: %s", error)
        return None


@contextmanager
def _tracked(experiment: Experiment, plans: dict[str, StagePlan]) -> Iterator[None]:
    """Within a run of MLflow, if there is something to teach, train or score; then what is left is delivered."""
    if not any(plans[name].todo for name in TRACKED if name in plans):
        yield
        return
    from pipeline.delivery import deliver_leftovers
    from pipeline.run_log import pipeline_run
    from pipeline.tracking import tracking_target

    target = tracking_target(experiment.config.tracking, experiment.workdir)
    tags = {"handstill.stages": ",".join(name for name, plan in plans.items() if plan.todo)}
    with pipeline_run(experiment.workdir, target, experiment.config.name, tags):
        yield
    deliver_leftovers(experiment.workdir, target)


def _deliver_leftovers(experiment: Experiment) -> None:
    """Give MLflow what earlier runs could not; also of students that were killed in the middle."""
    workdir = experiment.workdir
    if any(unfinished_spools(folder) for folder in (workdir.tracking_runs, workdir.students, workdir.evaluations)):
        from pipeline.delivery import deliver_leftovers
        from pipeline.tracking import tracking_target

        deliver_leftovers(workdir, tracking_target(experiment.config.tracking, workdir), all_dead=True)


def _run_stages(
    experiment: Experiment, stages: Sequence[Stage], plans: dict[str, StagePlan], summary: RunSummary
) -> dict[str, StageResult]:
    results: dict[str, StageResult] = {}
    if not any(plan.todo or plan.reasons for plan in plans.values()):
        for stage in stages:
            results[stage.name] = stage.run(experiment, plans[stage.name])
            summary.finished(stage.name, plans[stage.name], results[stage.name])
    else:
        forget_caches(experiment)  # another run may have had the workdir between the plan and the lease
        with ray_session(experiment.config.cluster):  # one Ray for all stages
            for stage in stages:
                results[stage.name] = _run_stage(experiment, stage, summary)
    if "ingest" in results:
        refer(experiment)
    append_event(experiment.workdir.events, "run_done")
    return results


def _run_stage(experiment: Experiment, stage: Stage, summary: RunSummary) -> StageResult:
    plan = stage.plan(experiment)  # again: what ran upstream may have changed what is to be done
    _check_cost(experiment, {stage.name: plan})  # sources that were never scanned had no price before
    append_event(experiment.workdir.events, "stage_started", stage=stage.name, todo=plan.todo, total=plan.total)
    started = time.monotonic()
    with telling(stage=stage.name), summary.stage(stage.name, plan):
        result = stage.run(experiment, plan)
    summary.finished(stage.name, plan, result)
    experiment.workdir.settle()
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
