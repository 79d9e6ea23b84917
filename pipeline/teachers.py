"""Teacher actors on Ray: one model load each, shards handed out as they finish, a dead actor's shards given to another.

An actor starts the decoding of its shard as a streaming task on another core, and that of its next shard too, so that
it never waits between shards. Backpressure bounds what is decoded ahead.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pipeline.config import ClusterConfig
from pipeline.events import append_event, told
from pipeline.job_code import check_job_code
from pipeline.workdir import Claim
from pipeline.workers import POLL_S, at_work, cluster_size, get, is_death
from stages.answers import Forward
from stages.config import WorkersConfig
from stages.preparation import PreparedBatch, ShardJob, prepared_batches
from stages.teach import teach_shard
from storage.errors import WorkError

Work = Callable[[ShardJob, Iterable[PreparedBatch], Forward, Mapping[str, Any]], Any]
"""What a teacher does with a job: (job, its batches, forward pass, provenance) -> result. `teach_shard` is one."""

BATCHES_AHEAD = 3
"""Decoded batches that wait for an actor, a shard: enough to hide a slow picture, little memory (12.6 MB at 64)."""


@dataclass(frozen=True)
class TeacherSettings:
    """What an actor needs to load the teacher; picklable."""

    checkpoint: Path
    mano_model: str | None
    precision: Literal["fp32", "bf16"]
    gpus: float
    events: Path
    claim: Claim
    decode_retries: int
    """How often a shard's decoding is begun again because its process died."""
    compiled: bool = False
    threads: int | None = None
    """CPU threads of the forward pass; None: torch's own choice."""
    load: Callable[[TeacherSettings], tuple[Forward, dict[str, Any]]] | None = None
    """What gives forward pass and provenance; None: `load_from_checkpoint`."""


def load_from_checkpoint(settings: TeacherSettings) -> tuple[Forward, dict[str, Any]]:
    """Forward pass and provenance of the teacher that the settings name."""
    import torch

    from models.teacher import load_teacher
    from stages.teach import numerics, teacher_forward

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = "cuda" if settings.gpus else "cpu"
    append_event(settings.events, "teacher_loading", device=device)
    teacher = load_teacher(
        settings.checkpoint, settings.mano_model, device, settings.precision, compiled=settings.compiled
    )
    return teacher_forward(teacher, device), numerics(device, compiled=settings.compiled)


class TeacherActor:
    """Holds a loaded teacher and its run's claim on the workdir, for life (wrapped by `ray.remote`)."""

    def __init__(self, settings: TeacherSettings) -> None:
        self._settings = settings
        self._events = settings.events
        self._started: dict[str, Any] = {}
        self._holding = ExitStack()

    @cached_property
    def _teacher(self) -> tuple[Forward, dict[str, Any]]:
        """Forward pass and provenance. Loaded for the first shard: an error there has its type, one above has none."""
        settings = self._settings
        self._holding.enter_context(settings.claim.held())
        loaded = (settings.load or load_from_checkpoint)(settings)
        append_event(settings.events, "teacher_ready")
        return loaded

    def work(self, work: Work, job: ShardJob, following: ShardJob | None) -> Any:
        """Do one job; begin to decode the following one meanwhile."""
        with at_work(job.events, job.told, "teach"):
            return self._work(work, replace(job, told={**job.told, **told()}), following)

    def _work(self, work: Work, job: ShardJob, following: ShardJob | None) -> Any:
        import torch

        self._start(job)
        try:
            return work(job, self._batches(job, following), *self._teacher)
        except torch.OutOfMemoryError as error:
            raise WorkError(
                f"the teacher ran out of GPU memory at batch size {job.settings.batch_size}: set teacher.batch_size "
                f"lower (it is part of the cache's identity, so a new cache begins). {str(error).splitlines()[0]}"
            ) from None
        finally:
            self._started.pop(job.input_hash, None)

    def _start(self, job: ShardJob) -> None:
        if job.input_hash not in self._started:
            self._started[job.input_hash] = _decode(job)

    def _batches(self, job: ShardJob, following: ShardJob | None) -> Iterator[PreparedBatch]:
        """The decoded batches of a shard that was started. Where the decoding dies, it is begun again.

        The following shard's decoding begins once this one's has given a batch: Ray starts tasks in any order, and the
        following one, on the only core and held back with its batches unread, would keep this one from ever beginning.
        """
        taken = 0
        for retries_left in range(self._settings.decode_retries, -1, -1):
            try:
                for reference in islice(self._started[job.input_hash], taken, None):
                    batch: PreparedBatch = get(reference)
                    if following is not None:
                        self._start(following)
                    yield batch
                    taken += 1
                    append_event(self._events, "teach_batch", unit=job.input_hash, views=len(batch.views))
                return
            except WorkError as error:
                if not retries_left or not is_death(error):
                    raise
                append_event(self._events, "decoding_died", unit=job.input_hash, why=str(error)[:500])
                self._start_again(job)

    def _start_again(self, job: ShardJob) -> None:
        """Decode this shard from its beginning, and stop the next one's decoding, which may hold the core it needs."""
        import ray

        for stream in self._started.values():
            ray.cancel(stream, force=True)
        self._started = {job.input_hash: _decode(job)}


def _decode(job: ShardJob) -> Any:
    """Begin to decode a shard: references to its batches, as they come.

    Ray must not retry it: that would wait for a core behind the next shard's decoding, which waits for this shard.
    """
    import ray

    options = {"num_cpus": 1, "max_retries": 0, "num_returns": "streaming"}
    task = ray.remote(prepared_batches_of_job).options(**options, _generator_backpressure_num_objects=BATCHES_AHEAD)
    return task.remote(job)


def prepared_batches_of_job(job: ShardJob) -> Iterator[PreparedBatch]:
    """`prepared_batches`, in a worker of its own: one that holds no claim, whose code is therefore looked at here."""
    check_job_code()
    with at_work(job.events, job.told, "decode"):
        yield from prepared_batches(job)


@dataclass
class _Desk:
    """One actor and the shards it was given."""

    actor: Any
    current: ShardJob
    following: ShardJob | None
    reference: Any = None

    def begin(self, work: Work) -> None:
        self.reference = self.actor.work.remote(work, self.current, self.following)


@dataclass
class _Office:
    """Hands out shards to actors until none is left."""

    work: Work
    coming: Iterator[ShardJob]
    settings: TeacherSettings
    options: dict[str, Any]
    max_retries: int
    returned: deque[ShardJob] = field(default_factory=deque)
    """Shards of actors that died."""
    desks: list[_Desk] = field(default_factory=list)
    deaths: Counter[str] = field(default_factory=Counter)

    def _next(self) -> ShardJob | None:
        return self.returned.popleft() if self.returned else next(self.coming, None)

    def hire(self) -> None:
        """Open a desk, if there is a shard for it."""
        import ray

        current = self._next()
        if current is None:
            return
        actor = ray.remote(TeacherActor).options(**self.options).remote(self.settings)
        desk = _Desk(actor, current, self._next())
        desk.begin(self.work)
        self.desks.append(desk)

    def finished(self, desk: _Desk) -> None:
        """Go on with the desk's next shard, or close the desk."""
        current = desk.following if desk.following is not None else self._next()
        if current is None:
            self.desks.remove(desk)
            return
        desk.current, desk.following = current, self._next()
        desk.begin(self.work)

    def died(self, desk: _Desk, why: str) -> None:
        """Give a dead actor's shards back and hire another.

        Raises:
            WorkError: the same shard's actors died more often than allowed.
        """
        self.desks.remove(desk)
        append_event(self.settings.events, "teacher_died", unit=desk.current.input_hash, why=why[:500])
        self.deaths[desk.current.input_hash] += 1
        if self.deaths[desk.current.input_hash] > self.max_retries:
            raise WorkError(
                f"teachers died {self.deaths[desk.current.input_hash]} times on one shard of {desk.current.dataset} "
                f"({desk.current.input_hash[:16]}): {why}. If memory ran out, set teacher.batch_size lower."
            )
        self.returned.extendleft(job for job in (desk.following, desk.current) if job is not None)
        self.hire()


def teach_all(
    jobs: Iterable[ShardJob],
    settings: TeacherSettings,
    workers: WorkersConfig,
    cluster: ClusterConfig,
    while_waiting: Callable[[], None],
    work: Work = teach_shard,
    on_result: Callable[[ShardJob, Any], None] | None = None,
) -> None:
    """Have every job done by a teacher; jobs are taken from the iterable as actors become free.

    work: what is done with each, in the actor's process. on_result: gets each job with its result, here.

    Raises:
        InputError: the checkpoint or a source cannot be used.
        WorkError: actors died too often, or the work failed in one.
    """
    import ray
    from ray.exceptions import RayActorError

    count, cpus, threads = staffing(workers, settings.gpus, *cluster_size())
    settings = replace(settings, threads=threads)
    options = {"num_cpus": cpus, "num_gpus": settings.gpus, "max_restarts": 0}
    office = _Office(work, iter(jobs), settings, options, cluster.max_retries)
    for _ in range(count):
        office.hire()
    while office.desks:
        ready, _ = ray.wait([desk.reference for desk in office.desks], num_returns=1, timeout=POLL_S)
        while_waiting()
        for desk in [desk for desk in office.desks if desk.reference in ready]:
            try:
                result = get(desk.reference)
            except WorkError as error:
                if not isinstance(error.__cause__, RayActorError):
                    raise
                office.died(desk, str(error.__cause__).splitlines()[0])
            else:
                if on_result is not None:
                    on_result(desk.current, result)
                office.finished(desk)


def staffing(
    workers: WorkersConfig, gpus: float, resources: dict[str, float], nodes: int
) -> tuple[int, float, int | None]:
    """(actors, CPUs that each reserves, its threads). auto: an actor a GPU; without GPUs an actor a node.

    A teacher on the CPU reserves all cores of its node but one, which is left for decoding, though it may compute on
    all of them: decoding takes a small share of one.
    """
    cores = resources.get("CPU", 1.0) / max(nodes, 1)
    if gpus:
        count = int(resources.get("GPU", 0) // gpus) if workers.count == "auto" else workers.count
        return max(count, 1), 1.0 if workers.cpus == "auto" else workers.cpus, None
    count = nodes if workers.count == "auto" else workers.count
    on_a_node = -(-count // max(nodes, 1))
    reserved = max(1.0, (cores - 1) // on_a_node) if workers.cpus == "auto" else workers.cpus
    available = len(os.sched_getaffinity(0))
    threads = max(1, available // on_a_node) if workers.cpus == "auto" else max(1, int(workers.cpus))
    return max(count, 1), reserved, threads
