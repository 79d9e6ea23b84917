"""Hands shards out to teacher actors: as they finish, again when one dies or hangs, to more of them as nodes come.

What a death leads to (decision 021): its shard goes to another teacher; a shard whose teachers keep dying is searched
for the samples that kill them, and goes on without; memory that runs out ends the run with the batch size to set.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from pipeline.config import ClusterConfig
from pipeline.events import append_event
from pipeline.inquiry import Inquiry
from pipeline.patience import Patience
from pipeline.stopping import NOTICE
from pipeline.teacher_actor import DecodingDiedError, TeacherActor, TeacherSettings, Work, memory_advice
from pipeline.workers import POLL_S, cluster_size, get, is_lost_node, is_out_of_memory
from stages.config import WorkersConfig
from stages.preparation import ShardJob
from stages.teach import rehearse_shard, teach_shard
from storage.errors import WorkError

log = logging.getLogger("handstill")

STAFFING_EVERY_S = 5.0
"""How often the cluster is asked whether nodes came or went."""
NODE_LOSSES = 20
"""Of one shard. A node that is taken away says nothing about the shard; more of them are deaths like others."""
UNSURE_S = 30.0
"""Ray asks a node five times, every three seconds, before it is no longer counted. A teacher hired meanwhile would get
the core that decodes for the others."""


@dataclass(eq=False)
class _Desk:
    """One actor and what it was given: a shard and the following one, or a trial of an inquiry."""

    actor: Any
    ready: Any
    """Resolves when the actor's process runs: until then nobody knows how long the cluster takes to make room."""
    current: ShardJob
    following: ShardJob | None = None
    inquiry: Inquiry | None = None
    reference: Any = None
    since: float | None = None
    """When the actor began with it; None: it is not there yet."""
    first: bool = True
    """Whether the actor has still to load the network."""

    @property
    def views(self) -> int:
        return int(self.current.rows.num_rows) * self.current.settings.views

    def begin(self, work: Work) -> None:
        self.reference = self.actor.work.remote(work, self.current, self.following, retry_decoding=self.inquiry is None)
        self.since = None if self.first else time.monotonic()

    def worked_s(self) -> float:
        """For how long it has been at its work."""
        return 0.0 if self.since is None else time.monotonic() - self.since


@dataclass
class _Office:
    """Hands out shards to actors until none is left."""

    work: Work
    coming: Iterator[ShardJob]
    settings: TeacherSettings
    options: dict[str, Any]
    max_retries: int
    patience: Patience
    returned: deque[ShardJob] = field(default_factory=deque)
    """Shards of actors that died."""
    inquiries: deque[Inquiry] = field(default_factory=deque)
    """Searches whose next trial has no desk."""
    desks: list[_Desk] = field(default_factory=list)
    shards_done: int = 0
    stopping: bool = False
    unsure_until: float = 0.0
    """A node was lost, and Ray may not know yet."""
    deaths: Counter[str] = field(default_factory=Counter)
    losses: Counter[str] = field(default_factory=Counter)
    """Deaths that were a node's."""

    def has_work(self) -> bool:
        """Whether something waits for a desk."""
        if not self.returned:
            self.returned.extend(islice(self.coming, 1))
        return bool(self.returned or self.inquiries)

    def _next(self) -> ShardJob | None:
        return self.returned.popleft() if self.returned else next(self.coming, None)

    def hire(self) -> bool:
        """Open a desk, if there is something to do at it."""
        import ray

        inquiry = self.inquiries.popleft() if self.inquiries else None
        current = self._next() if inquiry is None else inquiry.trial
        if current is None:
            return False
        actor: Any = ray.remote(TeacherActor).options(**self.options).remote(self.settings)
        desk = _Desk(actor, actor.ready.remote(), current, None if inquiry else self._next(), inquiry)
        desk.begin(self._work_at(desk))
        self.desks.append(desk)
        return True

    def staff(self, count: int) -> None:
        """As many desks as the cluster has room for now: more when nodes came, fewer when they went."""
        least_work = sorted(self.desks, key=_Desk.worked_s)  # those that wait for a place come first
        for desk in least_work[: max(0, len(self.desks) - count)]:
            self._close(desk, kill=True)
            self._give_back(desk)
        if time.monotonic() < self.unsure_until:  # the cluster may be smaller than it says
            count = min(count, 1)
        while len(self.desks) < count and self.hire():
            pass

    def finished(self, desk: _Desk) -> None:
        """Go on with the desk's next work, or close the desk."""
        self.patience.saw(desk.views, desk.worked_s(), first=desk.first)
        desk.first = False
        if desk.inquiry is not None:
            desk.inquiry.survived()
            self._go_on(desk.inquiry)
        else:
            self.shards_done += 1
        self._next_at(desk)

    def _next_at(self, desk: _Desk) -> None:
        desk.inquiry = self.inquiries.popleft() if self.inquiries else None
        if desk.inquiry is not None:
            assert desk.inquiry.trial is not None
            self.returned.extendleft([desk.following] if desk.following is not None else [])
            desk.current, desk.following = desk.inquiry.trial, None
        else:
            current = desk.following if desk.following is not None else self._next()
            if current is None:
                self._close(desk)
                return
            desk.current, desk.following = current, self._next()
        desk.begin(self._work_at(desk))

    def _work_at(self, desk: _Desk) -> Work:
        return rehearse_shard if desk.inquiry is not None and self.work is teach_shard else self.work

    def _close(self, desk: _Desk, *, kill: bool = False) -> None:
        """The actor ends with the last reference to it, or at once."""
        import ray

        self.desks.remove(desk)
        if kill:
            ray.kill(desk.actor)

    def _give_back(self, desk: _Desk) -> None:
        if desk.inquiry is not None:
            self.inquiries.appendleft(desk.inquiry)
        else:
            self.returned.extendleft(job for job in (desk.following, desk.current) if job is not None)

    def died(self, desk: _Desk, why: WorkError) -> None:
        """Close a dead actor's desk and see to what it had.

        Raises:
            WorkError: the same shard's actors died more often than allowed, and no sample is to blame.
        """
        self._close(desk, kill=True)  # if it cannot be reached, it may live
        unit = desk.current.input_hash
        append_event(self.settings.events, "teacher_died", unit=unit, why=_cause(why))
        if is_lost_node(why) and self.losses[unit] < NODE_LOSSES:
            self.losses[unit] += 1
            self.unsure_until = time.monotonic() + UNSURE_S
            self._give_back(desk)
        elif is_out_of_memory(why) and (desk.inquiry is not None or self.deaths[unit] >= self.max_retries):
            raise WorkError(memory_advice(desk.current.settings.batch_size, None, _cause(why)))
        else:
            self._one_more(desk, "the teacher dies", _cause(why))

    def hangs(self, desk: _Desk) -> None:
        """End an actor that has been at its work for too long, and see to what it had. Raises WorkError, as `died`."""
        seconds = f"no result after {desk.worked_s():.0f} s (cluster.shard_timeout_s)"
        append_event(self.settings.events, "teacher_hung", unit=desk.current.input_hash, why=seconds)
        self._close(desk, kill=True)
        self._one_more(desk, "the teacher hangs", seconds)

    def cannot_decode(self, desk: _Desk, why: DecodingDiedError) -> None:
        """See to a shard whose decoding keeps dying; its teacher lives and goes on with something else."""
        if desk.inquiry is not None:
            desk.inquiry.died("its decoding dies")
            self._go_on(desk.inquiry)
        else:
            self._begin_inquiry(desk.current, str(why))
        self._next_at(desk)

    def _one_more(self, desk: _Desk, how: str, why: str) -> None:
        """One more teacher that a trial or a shard has cost."""
        unit = desk.current.input_hash
        if desk.inquiry is not None:
            desk.inquiry.died(how)
            self._go_on(desk.inquiry)
            return
        self.deaths[unit] += 1
        if self.deaths[unit] <= self.max_retries:
            self._give_back(desk)
            return
        self.returned.extendleft([desk.following] if desk.following is not None else [])
        self._begin_inquiry(
            desk.current, f"teachers died {self.deaths[unit]} times on one shard of {_named(desk.current)}: {why}"
        )

    def _begin_inquiry(self, job: ShardJob, why: str) -> None:
        log.warning("%s. Searching for the samples that do it.", why)
        append_event(self.settings.events, "inquiry_started", unit=job.input_hash, why=why[:500])
        self._go_on(Inquiry(job, why))

    def _go_on(self, inquiry: Inquiry) -> None:
        """Queue the search's next trial, or the shard without what was found."""
        if inquiry.trial is not None:
            self.inquiries.append(inquiry)
            return
        job = inquiry.outcome()
        if job is None or not (inquiry.survivals or self.shards_done):
            size = inquiry.job.settings.batch_size
            raise WorkError(
                f"{inquiry.why}. No sample of it is to blame by itself: look at the nodes' logs. If the kernel ended "
                f"them because memory ran out, set teacher.batch_size: {max(1, size // 2)} (found {size}), which "
                "begins a new cache."
            )
        append_event(self.settings.events, "inquiry_done", unit=job.input_hash, found=inquiry.found)
        self.deaths[job.input_hash] = 0
        self.returned.appendleft(job)

    def look(self) -> None:
        """Note which actors are there, and end those that hang."""
        import ray

        coming = {desk.ready: desk for desk in self.desks if desk.since is None}
        if coming:
            there, _ = ray.wait(list(coming), num_returns=len(coming), timeout=0)
            for reference in there:
                coming[reference].since = time.monotonic()
        for desk in list(self.desks):
            if desk.worked_s() > self.patience.allows(desk.views, first=desk.first):
                self.hangs(desk)

    def stop_what_cannot_finish(self, left_s: float) -> None:
        """After the notice: nothing new is begun, and what would take longer than `left_s` is given up."""
        if not self.stopping:
            self.stopping = True
            append_event(self.settings.events, "teach_stopping", left_s=round(left_s, 1), shards=len(self.desks))
        self.coming, self.returned, self.inquiries = iter(()), deque(), deque()
        for desk in list(self.desks):
            desk.following = None
            expected_s = None if desk.first else self.patience.expects(desk.views)
            late = left_s <= 0 or (expected_s is not None and expected_s - desk.worked_s() > left_s)
            if late or desk.since is None or desk.inquiry is not None:
                self._close(desk, kill=True)


def _named(job: ShardJob) -> str:
    return f"{job.dataset} ({job.input_hash[:16]})"


def _cause(error: WorkError) -> str:
    """What Ray says about a death: its first and its last line, between which stand names and numbers."""
    lines = [line.strip() for line in str(error.__cause__).splitlines() if line.strip()]
    return " ".join(dict.fromkeys([lines[0], lines[-1]]))[:500]


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
        KeyboardInterrupt: SIGTERM came; what could be finished in time is.
    """
    import ray
    from ray.exceptions import OutOfMemoryError, RayActorError

    count, cpus, threads = staffing(workers, settings.gpus, *cluster_size())
    settings = replace(settings, threads=threads)
    options = {"num_cpus": cpus, "num_gpus": settings.gpus, "max_restarts": 0}
    office = _Office(work, iter(jobs), settings, options, cluster.max_retries, Patience(cluster.shard_timeout_s))
    office.staff(count)
    looked = time.monotonic()
    with NOTICE.awaited():
        while office.desks or (not NOTICE.given and office.has_work()):
            ready, _ = ray.wait([desk.reference for desk in office.desks], num_returns=1, timeout=POLL_S)
            while_waiting()
            if NOTICE.given:  # before a desk that has finished is given more
                office.stop_what_cannot_finish(NOTICE.left_s())
            before = len(office.desks)
            office.look()
            for desk in [desk for desk in office.desks if desk.reference in ready]:
                try:
                    result = get(desk.reference)
                except DecodingDiedError as error:
                    office.cannot_decode(desk, error)
                except WorkError as error:
                    if not isinstance(error.__cause__, RayActorError | OutOfMemoryError):
                        raise
                    office.died(desk, error)
                else:
                    if on_result is not None and desk.inquiry is None:
                        on_result(desk.current, result)
                    office.finished(desk)
            if not NOTICE.given and (time.monotonic() - looked > STAFFING_EVERY_S or len(office.desks) < before):
                office.staff(staffing(workers, settings.gpus, *cluster_size())[0])
                looked = time.monotonic()
    if NOTICE.given:
        raise KeyboardInterrupt


def staffing(
    workers: WorkersConfig, gpus: float, resources: dict[str, float], nodes: int
) -> tuple[int, float, int | None]:
    """(actors, CPUs that each reserves, its threads). auto: an actor a GPU; without GPUs an actor a node.

    A teacher on the CPU reserves all cores of its node but one, which is left for decoding, though it may compute on
    all of them: decoding takes a small share of one. However many are asked for, one core of the cluster is left for
    decoding, also when a node is lost: teachers on every core would wait for their pictures for ever.
    """
    cores = resources.get("CPU", 1.0) / max(nodes, 1)
    if gpus:
        count = int(resources.get("GPU", 0) // gpus) if workers.count == "auto" else workers.count
        reserved, threads = 1.0 if workers.cpus == "auto" else workers.cpus, None
    else:
        count = nodes if workers.count == "auto" else workers.count
        on_a_node = -(-count // max(nodes, 1))
        reserved = max(1.0, (cores - 1) // on_a_node) if workers.cpus == "auto" else workers.cpus
        available = len(os.sched_getaffinity(0))
        threads = max(1, available // on_a_node) if workers.cpus == "auto" else max(1, int(workers.cpus))
    room = int((resources.get("CPU", 1.0) - 1) // reserved) if reserved else count
    return max(1, min(count, room)), reserved, threads
