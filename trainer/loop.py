"""Training one student from caches, from first step to saved student; stopped anywhere, it continues bit for bit.

A run's folder holds checkpoint.pt and best-<step>/ (the best student so far) while it goes on, and student/,
pictures.png and result.json when it is done; `trainer.job` says what they are. Several workers (`trainer.distributed`)
run the same lines, each on its share of every batch; the first of them writes and reports.
The teacher is not in this process: `train` refuses to start where models.teacher was imported.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import shutil
import signal
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.checkpoint import read_training_state
from models.student import Student
from storage.durable import (
    canonical_json,
    partial_path,
    publish_directory,
    remove_tree,
    sweep_partial,
    sync_directory,
    write_bytes_atomic,
)
from storage.errors import DamageError, InputError, WorkError
from trainer.averaging import WeightAverage
from trainer.config import StudentRecipe
from trainer.data import PICTURES, Batch
from trainer.distributed import Group, rng_states, running_statistics, seed_worker, set_rng_states
from trainer.job import CHECKPOINT, PICTURES_PNG, RESULT, STUDENT, Callbacks, Silent, TrainJob, TrainResult
from trainer.job import params_of as params_of
from trainer.job import read_result as read_result
from trainer.learner import Tensors
from trainer.lessons import Lessons, from_caches
from trainer.metrics import pa_mpjpe_mm
from trainer.optimizing import optimizer_for
from trainer.pictures import sheet
from trainer.prior import PosePrior, read_mocap
from trainer.watch import Watch, stop_signal

STOPPED_EXIT_CODE = 128 + signal.SIGTERM
_SHOWN_PICTURES = 16


def train(
    job: TrainJob,
    callbacks: Callbacks | None = None,
    group: Group | None = None,
    stop: threading.Event | None = None,
    lessons: Callable[[TrainJob, Group], Lessons] = from_caches,
) -> TrainResult:
    """Train the student, or continue it, or return its result if it is done.

    group: the workers that train it together, all of which call this; None: this process alone. stop: set by whoever
    catches SIGTERM; None: caught here. lessons: what it learns from, where that is not the job's caches.

    Raises InputError (a cache that cannot serve it), DamageError (its checkpoint is damaged), WorkError (a loss that
    is not finite, with the step and the samples). On SIGTERM it writes a checkpoint and raises SystemExit(143).
    """
    assert "models.teacher" not in sys.modules, "a teacher was loaded into a training process"
    group = group or Group()
    callbacks = callbacks if callbacks is not None and group.leads else Silent()
    done = read_result(job.out_dir)
    if done is not None and done.identity == job.identity:
        return done
    job.out_dir.mkdir(parents=True, exist_ok=True)
    if group.leads:
        sweep_partial(job.out_dir)
    start = time.perf_counter()
    run = _Run(job, callbacks, group, lessons)
    run.resume()
    callbacks.on_start(params_of(job))
    with nullcontext(stop) if stop is not None else stop_signal() as stopped:
        run.to_the_end(stopped)
    if group.leads:
        run.finish(time.perf_counter() - start)
    group.wait()
    done = read_result(job.out_dir)
    assert done is not None
    return done


def learning_rate(recipe: StudentRecipe, step: int) -> float:
    """Of step `step` (from 0): linear warm-up, then constant or half a cosine down to 0 at the last step."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.lr
    share = (step - recipe.warmup_steps) / max(recipe.steps - recipe.warmup_steps, 1)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * share))


class _Run:
    """The state of a run: what a checkpoint holds, and what is made anew from the job."""

    def __init__(
        self,
        job: TrainJob,
        callbacks: Callbacks,
        group: Group,
        lessons: Callable[[TrainJob, Group], Lessons] = from_caches,
    ) -> None:
        self.job, self.recipe, self.callbacks, self.group = job, job.recipe, callbacks, group
        self.device = torch.device(_device(job.device))
        learning = lessons(job, group)
        self.mix = learning.mix
        torch.manual_seed(job.seed)
        self.module = learning.learner()
        self.module.to(self.device).to(memory_format=self.module.memory_format)
        self.optimizer = optimizer_for(self.module, self.recipe, self.device)
        self.prior = self._prior()
        self.average = WeightAverage(self.module, self.recipe.average)
        if self.recipe.compile:
            _refuse_to_compile_in_vain()
            self.module.student.compile()
        self.losses = group.losses_of(self.module)
        self.statistics = running_statistics(self.module)
        seed_worker(job.seed, group)  # until here all did the same
        self.step = 0
        self.best_step = 0
        self.best: dict[str, float] = {}

    def to_the_end(self, stop: threading.Event) -> None:
        recipe, watch = self.recipe, Watch(self.group)
        batches = self.mix.batches(self.step, recipe.steps, self._loader_workers())
        self.module.train()
        while self.step < recipe.steps:
            with watch.waiting():
                batch = next(batches)
            watch.note(self.step, batch, *self._learn(batch))
            self.step += 1
            self.callbacks.on_progress(self.step)
            last = self.step == recipe.steps
            validates = last or self.step % recipe.validate_every == 0
            stopping = self.group.any(stop.is_set())
            saves = validates or stopping or self.step % recipe.checkpoint_every == 0
            if saves or self.step % recipe.log_every == 0:
                self.callbacks.on_step(self.step, watch.report(learning_rate(recipe, self.step - 1)))
            if validates:
                self._validate()
            if saves:
                self._save()
            if stopping and not last:
                self.group.wait()  # whoever watches the workers ends all when one is gone: not before it is written
                raise SystemExit(STOPPED_EXIT_CODE)

    def finish(self, seconds: float) -> TrainResult:
        """Publish the best student, draw its pictures, write the result."""
        job = self.job
        if (best := self._best_dir(self.best_step)).is_dir():
            if (job.out_dir / STUDENT).exists():  # of another identity
                remove_tree(job.out_dir / STUDENT)
            publish_directory(best, job.out_dir / STUDENT)
        student = Student.load(job.out_dir / STUDENT)
        self._draw(student.to(self.device).eval())
        params_m = sum(p.numel() for p in student.parameters()) / 1e6
        values: dict[str, Any] = {
            **{"name": job.name, "seed": job.seed, "identity": job.identity},
            **{"steps": self.step, "best_step": self.best_step, "validation": self.best},
            **{"params_m": params_m, "seconds": round(seconds, 3)},
        }
        result = TrainResult(**values, student=job.out_dir / STUDENT)
        self.callbacks.on_end(result)  # before the run counts as done: killed here, it tells them again
        write_bytes_atomic(job.out_dir / RESULT, canonical_json(values))
        (job.out_dir / CHECKPOINT).unlink(missing_ok=True)
        return result

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one of this identity."""
        path = self.job.out_dir / CHECKPOINT
        state = _read_checkpoint(path) if path.is_file() else {}
        if state.get("identity") == self.job.identity:
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.load_state_dict(state["average"])
            if self.prior is not None:
                self.prior.load_state_dict(state["prior"])
            set_rng_states(state["rng"], self.group, self.device)
            self.step, self.best_step, self.best = state["step"], state["best_step"], state["best"]
        assert self.group.total(self.step) == self.step * self.group.size, "the workers read different checkpoints"
        self._drop_other_bests()

    def _learn(self, batch: Batch) -> tuple[Tensor, Tensors, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step)
        tensors = self._tensors(batch)
        loss, parts, outputs = self.losses(tensors)
        if self.prior is not None:
            pleasing = self.prior.loss(outputs)
            loss, parts = loss + pleasing, parts | {"prior/pleasing": pleasing.detach()}
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships it untyped
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.clip_grad_norm or math.inf)
        self.optimizer.step()
        loss = loss.detach()
        self.group.average([loss, *parts.values(), *self.statistics])
        self.average.update(self.step)
        if self.prior is not None:
            parts |= self.prior.learn(outputs, tensors, self.step)
        return loss, parts, norm.detach()

    def _prior(self) -> PosePrior | None:
        if self.recipe.prior is None:
            return None
        return PosePrior(
            self.recipe.prior,
            published=self.recipe.distill.preset == "paper",
            mocap=None if self.job.mocap is None else read_mocap(self.job.mocap),
            seed=self.job.seed,
            lr=self.recipe.lr,
            weight_decay=self.recipe.weight_decay,
            group=self.group,
        ).to(self.device)

    @torch.no_grad()
    def _validate(self) -> None:
        """Score the held-out samples and keep the student if it is the best so far."""
        if not self.mix.validation_size:
            self._keep({})
            return
        self.average.module.eval()
        scores = self._of_all_workers([self._scores(batch) for batch in self.mix.validation_batches()])
        self.module.train()
        sizes = np.array([score.pop("samples") for score in scores])
        means = {key: _mean_of([score[key] for score in scores], sizes) for key in scores[0]}
        metrics = {key: value for key, value in means.items() if math.isfinite(value)}
        self.callbacks.on_validation(self.step, metrics)
        criterion = "pa_mpjpe_mm" if "pa_mpjpe_mm" in metrics else "loss"
        if not self.best or metrics[criterion] < self.best[criterion]:
            self._keep(metrics)

    def _scores(self, batch: Batch) -> dict[str, float]:
        total, parts, outputs = self.average.module.losses(self._tensors(batch))
        if not math.isfinite(float(total)):
            ids = ", ".join(batch["sample_id"].tolist())
            raise WorkError(f"after step {self.step} the validation loss is not finite on {ids}; lower train.lr")
        labels = batch["labels/keypoints_3d"]
        errors = pa_mpjpe_mm(outputs["keypoints_3d"].cpu().numpy(), labels[..., :3], labels[..., 3] > 0)
        labelled = np.isfinite(errors) & ((labels[..., 3] > 0).sum(1) >= 4)  # three points fit anything
        error = float(errors[labelled].mean()) if labelled.any() else math.nan
        scores = {"loss": float(total), "pa_mpjpe_mm": error, "samples": float(len(labels))}
        return scores | {key: float(value) for key, value in parts.items()}

    def _of_all_workers(self, mine: list[dict[str, float]]) -> list[dict[str, float]]:
        """The scores of all batches, in their order: they were dealt out in turn."""
        dealt = [json.loads(scores) for scores in self.group.gathered(json.dumps(mine).encode())]
        return [score for turn in zip_longest(*dealt) for score in turn if score is not None]

    def _keep(self, metrics: dict[str, float]) -> None:
        self.best_step, self.best = self.step, metrics
        if not self.group.leads:
            return
        target = self._best_dir(self.step)
        if target.exists():  # left by a process that died before its checkpoint; after it, bits may differ on a GPU
            remove_tree(target)
        partial = partial_path(target)
        self.average.module.student.save(partial)
        publish_directory(partial, target)

    def _save(self) -> None:
        """Replace the checkpoint; only then forget what the one before needed."""
        rng = rng_states(self.group, self.device)
        if not self.group.leads:
            return
        state = {
            "identity": self.job.identity,
            "step": self.step,
            "best_step": self.best_step,
            "best": self.best,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "prior": None if self.prior is None else self.prior.state_dict(),
            "rng": rng,
        }
        path = self.job.out_dir / CHECKPOINT
        partial = partial_path(path)
        with partial.open("xb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_directory(path.parent)
        self._drop_other_bests()

    def _draw(self, student: Student) -> None:
        batch = next(iter(self.mix.validation_batches()), None) or self.mix.batch(0)
        shown = {key: value[:_SHOWN_PICTURES] for key, value in batch.items()}
        self.module.student = student
        self.module.eval()
        with torch.no_grad():
            said = self.module(torch.from_numpy(shown[PICTURES]).to(self.device))["keypoints_2d"].cpu().numpy()
        path = self.job.out_dir / PICTURES_PNG
        write_bytes_atomic(path, sheet(shown[PICTURES], shown["labels/keypoints_2d"], said))
        self.callbacks.on_pictures(self.best_step, path)

    def _tensors(self, batch: Batch) -> Tensors:
        return {
            key: torch.from_numpy(value).to(self.device, non_blocking=True)
            for key, value in batch.items()
            if key != "sample_id"
        }

    def _loader_workers(self) -> int:
        if self.recipe.loader_workers != "auto":
            return self.recipe.loader_workers
        return 1 if self.device.type == "cpu" else max(1, min(8, (os.cpu_count() or 2) - 1))

    def _best_dir(self, step: int) -> Path:
        return self.job.out_dir / f"best-{step}"

    def _drop_other_bests(self) -> None:
        for path in self.job.out_dir.glob("best-*") if self.group.leads else ():
            if path != self._best_dir(self.best_step):
                remove_tree(path)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes each record's crc32 and never looks at it again
            if broken := archive.testzip():
                raise ValueError(f"the crc32 of {broken} does not match")
        return read_training_state(path)
    except (zipfile.BadZipFile, RuntimeError, OSError, ValueError, zlib.error, lzma.LZMAError, EOFError) as error:
        raise DamageError(f"{path} is damaged ({error}); delete it and run `handstill run train`") from error


def _refuse_to_compile_in_vain() -> None:
    """torch.compile would say so itself, minutes later and in a page."""
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "c++", "clang++"]
    if not any(map(shutil.which, compilers)):
        raise InputError(
            f"train.compile: torch.compile wants a C++ compiler, and none of {', '.join(compilers)} is installed here. "
            "Install one, or set train.compile: false."
        )


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _mean_of(values: list[float], sizes: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Mean over samples of batch means; batches without a label do not count."""
    each = np.array(values)
    known = np.isfinite(each)
    return float((each[known] * sizes[known]).sum() / sizes[known].sum()) if known.any() else math.nan
