"""The pipeline without Ray: the same stages and the same functions for units of work, called here one after another.

What Ray adds (processes, deaths, retries) is tested beside this; what a run decides to do does not depend on it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pipeline import calibrating, evaluating, ingesting, run, synthesising, teaching, training
from pipeline.config import ClusterConfig
from pipeline.events import append_event
from pipeline.teacher_actor import TeacherActor, TeacherSettings, Work
from pipeline.workdir import Claim
from pipeline.workers import Resources
from stages.config import WorkersConfig
from stages.preparation import PreparedBatch, ShardJob, prepared_batches
from stages.teach import teach_shard


def install(patch: pytest.MonkeyPatch) -> None:
    """Put the functions below in the place of those that need Ray."""
    for module in (ingesting, synthesising, training, evaluating):
        patch.setattr(module, "run_units", run_units)
    for module in (training, evaluating):
        patch.setattr(module, "network_resources", lambda *_: Resources())
    for module in (run, ingesting, synthesising, calibrating, teaching, training, evaluating):
        patch.setattr(module, "ray_session", no_session)
    for module in (calibrating, teaching):
        patch.setattr(module, "teach_all", teach_all)
    patch.setattr("os.fsync", lambda descriptor: None)  # most of the time, and no power is cut here


@contextmanager
def no_session(cluster: ClusterConfig) -> Iterator[None]:
    yield


def run_units(
    function: Callable[[Any], Any],
    units: Iterable[Any],
    *,
    cluster: ClusterConfig,
    claim: Claim,
    resources: Resources | Callable[[Any], Resources],
    while_waiting: Callable[[], None],
    fresh_process: bool = False,
) -> Iterator[tuple[Any, Any]]:
    for unit in units:
        with as_if_fresh(fresh_process):
            result = function(unit)
        while_waiting()
        yield unit, result


@contextmanager
def as_if_fresh(fresh: bool) -> Iterator[None]:
    """Hide that this process has imported the teacher, which a training process refuses."""
    hidden = sys.modules.pop("models.teacher", None) if fresh else None
    try:
        yield
    finally:
        if hidden is not None:
            sys.modules["models.teacher"] = hidden


class InlineTeacher(TeacherActor):
    """A teacher that decodes its own pictures."""

    def _start(self, job: ShardJob) -> None:
        pass

    def _batches(self, job: ShardJob, following: ShardJob | None) -> Iterator[PreparedBatch]:
        for batch in prepared_batches(job):
            yield batch
            append_event(self._events, "teach_batch", unit=job.input_hash, views=len(batch.views))


def teach_all(
    jobs: Iterable[ShardJob],
    settings: TeacherSettings,
    workers: WorkersConfig,
    cluster: ClusterConfig,
    while_waiting: Callable[[], None],
    work: Work = teach_shard,
    on_result: Callable[[ShardJob, Any], None] | None = None,
) -> None:
    teacher = InlineTeacher(settings)
    for job in jobs:
        result = teacher.work(work, job, None)
        if on_result is not None:
            on_result(job, result)
    while_waiting()
