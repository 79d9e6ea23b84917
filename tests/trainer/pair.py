"""One of the workers that train together in `test_distributed`: `python -m tests.trainer.pair FOLDER RANK SIZE`.

FOLDER/jobs.pickle says what to do, by name; FOLDER/<name>-<rank>.pt holds what came of it. One process for all jobs,
because starting it takes longer than any of them.
"""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from storage.errors import WorkError
from trainer.distributed import Group
from trainer.job import Silent, TrainJob
from trainer.learner import StudentUnderTraining
from trainer.loop import _Run, train


@dataclass(frozen=True)
class Task:
    kind: str
    """step | train | poisoned | stopped."""
    job: TrainJob


class Log(Silent):
    """Keeps what the loop reports."""

    def __init__(self) -> None:
        self.steps: dict[int, Mapping[str, float]] = {}
        self.validated: dict[int, Mapping[str, float]] = {}

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps[step] = {key: metrics[key] for key in metrics if not key.endswith(("_per_s", "_share"))}

    def on_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.validated[step] = dict(metrics)


class SetWhenAskedTwice(threading.Event):
    """As if SIGTERM came during the second step."""

    asked = 0

    def is_set(self) -> bool:
        self.asked += 1
        return self.asked >= 2


def one_step(job: TrainJob, group: Group) -> dict[str, Any]:
    """Losses, gradients (clipped) and the judge's weights after a first step, on labels of unequal worth."""
    run = _Run(job, Silent(), group)
    run.module.train()
    batch = next(run.mix.batches(0, 1, 0))
    numbers = np.array([int(name[5:11]) for name in batch["sample_id"]])
    batch["labels/has_betas"] = (numbers % 5 > 0).astype(np.float32)
    batch["labels/keypoints_3d"][..., 3] = numbers[:, None] / 10
    loss, parts, norm = run._learn(batch)
    return {
        "values": {"loss": loss, "norm": norm} | parts,
        "gradients": {name: p.grad for name, p in run.module.named_parameters() if p.grad is not None},
        "judge": {} if run.prior is None else run.prior.judge.state_dict(),
        "statistics": run.statistics,
        "trusted": int(batch["labels/has_betas"].sum()),
    }


def trained(job: TrainJob, group: Group) -> dict[str, Any]:
    log = Log()
    result = train(job, log, group, threading.Event())
    return {"steps": log.steps, "validated": log.validated, "best_step": result.best_step}


def stopped(job: TrainJob, group: Group) -> dict[str, Any]:
    """The second worker alone is told to stop; both do, and go on."""
    try:
        train(job, Silent(), group, SetWhenAskedTwice() if group.rank == 1 else threading.Event())
    except SystemExit as end:
        return trained(job, group) | {"code": end.code}
    raise AssertionError("it was not stopped")


def poisoned(job: TrainJob, group: Group) -> dict[str, Any]:
    """The second worker's share of step 2 has a label that is no number."""
    real, calls = StudentUnderTraining.losses, []

    def losses(self: StudentUnderTraining, batch: dict[str, torch.Tensor], workers: int = 1) -> Any:
        calls.append(0)
        if len(calls) == 2 and group.rank == 1:
            batch["labels/keypoints_3d"][0, 5] = float("nan")
        return real(self, batch, workers)

    StudentUnderTraining.losses = losses  # type: ignore[method-assign]
    try:
        train(job, Log(), group)
    except WorkError as error:
        return {"error": str(error)}
    finally:
        StudentUnderTraining.losses = real  # type: ignore[method-assign]
    raise AssertionError("it was not noticed")


def main(folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    group = Group.joined()
    tasks: dict[str, Task] = pickle.loads((folder / "jobs.pickle").read_bytes())  # noqa: S301 - the test's own
    for name, task in tasks.items():
        job = replace(task.job, out_dir=folder / name)
        work = {"step": one_step, "poisoned": poisoned, "stopped": stopped, "train": trained}
        torch.save(work[task.kind](job, group), folder / f"{name}-{rank}.pt")
        group.wait()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
