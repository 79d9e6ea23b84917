"""Units of work on Ray: start it, hand out plain functions, take results as they come, give up on repeated death.

Ray listens on loopback only when we start it ourselves, and its dashboard stays off.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config import ClusterConfig
from pipeline.events import telling, told
from pipeline.usage import metered
from pipeline.waiting import wait_asleep
from pipeline.workdir import Claim
from storage.errors import DamageError, InputError, WorkError
from trainer.config import StudentWorkers

Unit = TypeVar("Unit")
log = logging.getLogger("handstill")

POLL_S = 0.5
NODE_DIGITS = 12
LOOPBACK = "127.0.0.1"
OUR_ERRORS = (InputError, DamageError, WorkError)


@dataclass(frozen=True)
class Resources:
    """What one task or actor takes of a node."""

    cpus: float = 1
    gpus: float = 0
    workers: int = 1
    """More: a unit starts so many workers that take this much each, and its own task takes nothing."""

    def of_all(self) -> dict[str, float]:
        """What all workers take, in Ray's names."""
        return {"CPU": self.cpus * self.workers, "GPU": self.gpus * self.workers}


def cluster_size() -> tuple[dict[str, float], int]:
    """(all resources of the connected cluster by name, its live nodes)."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # ray has no types here
    return dict(ray.cluster_resources()), max(len(nodes), 1)  # type: ignore[no-untyped-call]


def network_resources(workers: StudentWorkers | None = None, cluster: ClusterConfig | None = None) -> Resources:
    """What training or scoring a network takes: a GPU where the cluster has one, else all cores of a node.

    workers: what the configuration says about it; None: nothing. cluster: if it is this machine alone, which does not
    grow, what it does not have raises InputError; Ray would wait for it for ever.
    """
    workers = workers or StudentWorkers()
    available, nodes = cluster_size()
    gpus = float(available.get("GPU", 0) >= 1) if workers.gpus == "auto" else workers.gpus
    cores = 1.0 if gpus else max(1.0, available.get("CPU", 1.0) // nodes // workers.count)
    found = Resources(cores if workers.cpus == "auto" else workers.cpus, gpus, workers.count)
    for name, amount in found.of_all().items():
        if cluster is not None and cluster.address == "local" and amount > available.get(name, 0):
            raise InputError(
                f"train.workers: {workers.count} workers take {amount:g} {name}, this machine has "
                f"{available.get(name, 0):g}. Give each less (workers.cpus, workers.gpus), or take fewer workers."
            )
    return found


@contextmanager
def ray_session(cluster: ClusterConfig) -> Iterator[None]:
    """A connected Ray for the duration; one that is connected already is used and left alone.

    Raises:
        WorkError: the cluster cannot be reached.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about future defaults
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # It says at every start that token authentication is on, which is how we want it.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    local = cluster.address == "local"
    wait_asleep()
    # On one core a teacher actor and the decoding beside it would wait for each other for ever.
    where: dict[str, Any] = (
        {
            **{"address": "local", "num_cpus": max(2, os.cpu_count() or 2), "include_dashboard": False},
            "_node_ip_address": LOOPBACK,
        }
        if local
        else {"address": cluster.address}
    )
    # Ray sets a handler of its own, which leaves without a word.
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with _on_loopback() if local else nullcontext():
            ray.init(**where, configure_logging=True, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkError(f"cluster.address: cannot reach Ray at {cluster.address!r}: {error}") from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Whatever Ray starts meanwhile listens on loopback alone.

    Asked for 127.0.0.1 it takes this machine's outer address, so that others can join, unless it runs where it has no
    clusters of several machines. Its processes read that from the environment, it itself when it is imported.
    """
    from ray._private import ray_constants

    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    said = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if said is None:
            del os.environ[name]
        else:
            os.environ[name] = said


def run_units(
    function: Callable[[Unit], Any],
    units: Sequence[Unit],
    *,
    cluster: ClusterConfig,
    claim: Claim,
    resources: Resources | Callable[[Unit], Resources],
    while_waiting: Callable[[], None],
    fresh_process: bool = False,
) -> Iterator[tuple[Unit, Any]]:
    """(unit, result) in the order of completion. A unit whose worker dies is given to another.

    Args:
        resources: what a unit takes, the same for all or asked for each.
        claim: of the run that the work belongs to; held around every unit, so that the next run waits for it.
        while_waiting: called about twice a second, for progress.
        fresh_process: every unit gets a process in which nothing ran before it.

    Raises:
        InputError, DamageError, WorkError: as the function raised them.
        WorkError: a unit's workers died more often than cluster.max_retries allows.
    """
    import ray

    options: dict[str, Any] = {"max_retries": cluster.max_retries} | ({"max_calls": 1} if fresh_process else {})
    task: Any = ray.remote(**options)(_claimed(function, claim, told()))
    waiting = list(units)
    running: dict[Any, Unit] = {}
    takes = resources if callable(resources) else lambda _unit: resources
    available, _ = cluster_size()
    while waiting or running:
        while waiting and _has_room(available, [takes(unit) for unit in running.values()], takes(waiting[0])):
            unit = waiting.pop(0)
            each = takes(unit)
            own = {"num_cpus": each.cpus, "num_gpus": each.gpus} if each.workers == 1 else {"num_cpus": 0}
            running[task.options(**own).remote(unit)] = unit
        ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL_S)
        while_waiting()
        for reference in ready:
            unit = running.pop(reference)
            yield unit, get(reference)


def _has_room(available: Mapping[str, float], taken: Sequence[Resources], wanted: Resources) -> bool:
    """Whether to hand out another unit.

    Of tasks enough to keep the cluster full, few enough that a failure is noticed before a million are queued. Of
    units that start their own workers only as many as fit: the others would hold processes that wait.
    """
    if wanted.workers == 1:
        return len(taken) < 4 * max(1, int(available.get("CPU", 1) / max(wanted.cpus, 0.25)))
    return not taken or all(
        sum(other.of_all()[name] for other in taken) + amount <= available.get(name, 0)
        for name, amount in wanted.of_all().items()
    )


def _claimed(function: Callable[[Unit], Any], claim: Claim, says: Mapping[str, Any]) -> Callable[[Unit], Any]:
    """says: what the events of its process say of the run."""

    @wraps(function)
    def work(unit: Unit) -> Any:
        with at_work(claim.workdir.events, says, function.__name__), claim.held():
            return function(unit)

    return work


@contextmanager
def at_work(events: Path | None, says: Mapping[str, Any], what: str) -> Iterator[None]:
    """Around what a worker does: its events say which run and stage it is, and on which node, and what it costs.

    what: which kind of work.
    """
    import ray

    held = ray.get_runtime_context().get_assigned_resources() if ray.is_initialized() else {}  # type: ignore[no-untyped-call]
    with telling(**{**says, "node": this_node()}), metered(events, what, gpus=float(held.get("GPU", 0.0))):
        yield


def this_node() -> str:
    """The name of the machine, and Ray's of the node on it: a machine may have several."""
    import ray

    if not ray.is_initialized():
        return socket.gethostname()
    return f"{socket.gethostname()}/{ray.get_runtime_context().get_node_id()[:NODE_DIGITS]}"


def get(reference: Any) -> Any:
    """A result, with errors as `errors_as_ours` raises them."""
    import ray

    with errors_as_ours():
        return ray.get(reference)


@contextmanager
def errors_as_ours() -> Iterator[None]:
    """Our own errors raised as themselves, whatever worker they come from, and a dead worker explained."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, OUR_ERRORS):
            raise cause from None
        log.debug("in a worker:\n%s", error)
        first_line = (str(cause).splitlines() or [""])[0]
        raise WorkError(f"a worker failed: {type(cause).__name__}: {first_line} (the traceback: -v)") from error
    except RayError as error:
        raise WorkError(f"workers died too often on one unit of work: {str(error).splitlines()[0]}") from error


def is_death(error: WorkError) -> bool:
    """Whether `get` raised this because a worker died, not because its work failed."""
    from ray.exceptions import RayError, RayTaskError

    return isinstance(error.__cause__, RayError) and not isinstance(error.__cause__, RayTaskError)


def is_lost_node(error: WorkError) -> bool:
    """Whether a worker was lost with its node, or cannot be reached: taken away, crashed, cut off.

    A worker that dies on a node that lives is reported by that node. Of one whose node is gone Ray knows only that the
    connection broke, until it has given the node up, some ten seconds later.
    """
    from ray.exceptions import ActorUnavailableError

    gone = isinstance(error.__cause__, ActorUnavailableError)
    return is_death(error) and (gone or any(words in str(error.__cause__) for words in _LOST_NODE))


def is_out_of_memory(error: WorkError) -> bool:
    """Whether Ray's memory monitor killed the worker; what the kernel kills looks like any other death."""
    from ray.exceptions import OutOfMemoryError

    return isinstance(error.__cause__, OutOfMemoryError) or _LOW_MEMORY in str(error.__cause__)


_LOST_NODE = ("node has died", "node it was running on is dead", "node was")
_LOW_MEMORY = "running low on memory"
"""Ray 2.60's words; it gives no type for either to an actor's death."""
