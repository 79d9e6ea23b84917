"""One student trained by several workers: Ray Train starts them, joins them, and replaces them when one dies.

Where Ray Train's defaults are not ours, and why:

- its workers report nothing to it and store nothing with it: what a run goes on from is the trainer's own checkpoint,
  because that one is exact. Ray's storage holds an empty marker, beside the student and not in the user's home;
- it would try again after any error. Ours are the same the next time, so that `_Stops` ends the run at once;
- it runs the training function in a thread, where no signal can be caught: `_Backend` catches SIGTERM in the main one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.train.torch import TorchConfig
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from pipeline.events import append_event
from pipeline.sharing import only_one
from pipeline.workdir import Claim
from pipeline.workers import OUR_ERRORS, POLL_S, Resources, at_work
from storage.durable import remove_tree
from storage.errors import WorkError
from trainer.job import Callbacks, TrainJob, TrainResult, read_result

if TYPE_CHECKING:
    from trainer.distributed import Group

RAY_FOLDER = "ray-train"
"""In the student's folder while it trains: Ray Train wants a folder that all nodes see."""
LOCK = "training.lock"
"""Held by the worker that writes: one that Ray has given up may still be ending when its successor starts."""
_STOP = threading.Event()
"""SIGTERM reached this worker; a worker's process trains once."""


@dataclass(frozen=True)
class GroupWork:
    """What each worker of a student is given; picklable."""

    job: TrainJob
    label: str
    claim: Claim
    events: Path
    reporting: Callable[[], AbstractContextManager[Callbacks]]
    """Around the training of the first worker: whom it tells what happens."""
    threads: int | None
    says: Mapping[str, Any] = field(default_factory=dict)
    """What the workers' events say of the run."""


def train_together(work: GroupWork, each: Resources, *, max_retries: int, loopback: bool) -> TrainResult:
    """Train a student with `each.workers` workers that take `each` of a node, or go on with it.

    max_retries: how often the workers are replaced because one died. loopback: they are all on this machine.

    Raises:
        InputError, DamageError, WorkError: as a worker raised them.
        WorkError: workers died too often.
    """
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(POLL_S)
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths stay what they are
    if loopback:  # no node is taken away: spares a process
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    folder = work.job.out_dir / RAY_FOLDER
    trainer = TorchTrainer(
        partial(_train, work),
        torch_config=_Config(),
        scaling_config=ScalingConfig(
            num_workers=each.workers,
            use_gpu=each.gpus > 0,
            resources_per_worker={"CPU": each.cpus} | ({"GPU": each.gpus} if each.gpus else {}),
        ),
        run_config=RunConfig(
            name=work.job.identity,
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=max_retries),
            callbacks=[_Stops()],
            worker_runtime_env={"env_vars": _loopback_only() if loopback else {}},
        ),
    )
    with _errors_as_ours(work.label):
        trainer.fit()
    remove_tree(folder)
    result = read_result(work.job.out_dir)
    assert result is not None
    return result


def _train(work: GroupWork) -> None:
    """What each worker does, in a process of its own."""
    import torch

    from trainer.distributed import Group
    from trainer.loop import train

    if work.threads is not None:
        torch.set_num_threads(work.threads)
    group = Group.joined()
    with at_work(work.events, work.says, "train_worker"), _one_of(work, group):
        append_event(work.events, "train_worker", unit=work.label, rank=group.rank, workers=group.size)
        group.wait()
        with work.reporting() if group.leads else nullcontext() as callbacks:
            train(work.job, callbacks, group, _STOP)


@contextmanager
def _one_of(work: GroupWork, group: Group) -> Iterator[None]:
    with work.claim.held(), only_one(work.job.out_dir / LOCK) if group.leads else nullcontext():
        yield


class _Stops(UserCallback):
    """Ends the run for an error that would come again; any other means that a worker died, or lost one that did."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        for error in worker_exceptions.values():
            if isinstance(error, OUR_ERRORS):
                raise error


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]  # ray ships no types
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(_catch_sigterm)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Nothing: the workers' processes end now, and one that waits for a dead one would not answer for 30 s."""


class _Config(TorchConfig):
    """NCCL where workers have GPUs, else gloo."""

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


def _catch_sigterm() -> None:
    signal.signal(signal.SIGTERM, lambda _number, _frame: _STOP.set())


def _loopback_only() -> dict[str, str]:
    return {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}


@contextmanager
def _errors_as_ours(label: str) -> Iterator[None]:
    try:
        yield
    except ControllerError as error:
        if isinstance(error.controller_failure, OUR_ERRORS):
            raise error.controller_failure from None
        raise WorkError(f"{label}: Ray Train failed: {_first_line(error.controller_failure)}") from error
    except TrainingFailedError as error:
        raise WorkError(f"{label}: workers died too often: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
