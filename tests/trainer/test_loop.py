from __future__ import annotations

import dataclasses
import io
import os
import pickle
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from models.hand_model import load_hand_model
from models.student import Student, StudentSpec
from storage.cache import HAND_MODEL, CacheFolder
from storage.errors import DamageError, InputError, WorkError
from tests.tiny_cache import write_tiny_cache
from tests.trainer.jobs import pinned, tiny_job
from trainer.averaging import WeightAverage
from trainer.config import StudentRecipe
from trainer.job import CHECKPOINT, PICTURES_PNG, RESULT, Silent, TrainJob, read_result
from trainer.learner import StudentUnderTraining
from trainer.loop import STOPPED_EXIT_CODE, learning_rate, train

HYBRID = {"distill": {"outputs": 0.3, "features": 1.8}}


class Log(Silent):
    """Keeps what the loop reports; raises when told to, as a process that dies there."""

    def __init__(self, die_after_step: int | None = None) -> None:
        self.losses: dict[int, float] = {}
        self.validated: list[int] = []
        self.die_after_step = die_after_step

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.losses[step] = metrics["loss"]
        if step == self.die_after_step:
            raise KeyboardInterrupt

    def on_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.validated.append(step)


def in_folder(job: TrainJob, name: str) -> TrainJob:
    return dataclasses.replace(job, out_dir=job.out_dir.parent / name)


def student_bytes(job: TrainJob) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (job.out_dir / "student").iterdir()}


def test_a_student_is_trained_validated_saved_and_done(tmp_path: Path) -> None:
    log, job = Log(), tiny_job(tmp_path, **HYBRID)
    result = train(job, log)
    assert (result.steps, result.best_step in (4, 6), log.validated) == (6, True, [4, 6])
    assert sorted(path.name for path in job.out_dir.iterdir()) == [PICTURES_PNG, RESULT, "student"]
    assert read_result(job.out_dir) == result
    assert Student.load(result.student)(torch.zeros(1, 3, 256, 256))["keypoints_3d"].shape == (1, 21, 3)
    again = Log()
    assert train(job, again) == result
    assert again.losses == {}


@pytest.mark.parametrize(
    ("die_after", "average", "optimizer"),
    [(1, None, "adamw"), (3, 0.9, "adamw"), (5, None, "muon"), (5, 0.9, "adamw"), (6, None, "adamw")],
)
def test_a_killed_run_resumes_bit_for_bit(
    tmp_path: Path, die_after: int, average: float | None, optimizer: str
) -> None:
    job = tiny_job(tmp_path, average=average, optimizer=optimizer, **HYBRID)
    undisturbed, before, after = Log(), Log(die_after), Log()
    whole = train(job, undisturbed)
    killed = in_folder(job, "killed")
    with pytest.raises(KeyboardInterrupt):
        train(killed, before)
    resumed = train(killed, after)
    assert min(after.losses) == (die_after - 1) // 3 * 3 + 1 if die_after < 5 else 5  # checkpoints after 3, 4 and 6
    assert before.losses | after.losses == undisturbed.losses
    assert student_bytes(killed) == student_bytes(job)
    assert (resumed.validation, resumed.best_step) == (whole.validation, whole.best_step)


def test_the_average_of_the_weights_is_validated_and_kept(tmp_path: Path) -> None:
    plain, averaging = Log(), Log()
    job = tiny_job(tmp_path, validate_every=6, **HYBRID)
    last = train(job, plain)
    recipe = job.recipe.model_copy(update={"average": 0.9})
    kept = train(in_folder(dataclasses.replace(job, recipe=recipe), "average"), averaging)
    assert averaging.losses == plain.losses
    assert kept.validation["loss"] != last.validation["loss"]
    weights = [Student.load(result.student).state_dict()["mano_head.decpose.weight"] for result in (last, kept)]
    assert not torch.equal(*weights)


def test_the_average_counts_its_first_steps_less() -> None:
    """The weights after step n enter with 1 - min(decay, 1 - n^(-2/3)), batch statistics alike; counters are copied."""
    recipe = StudentRecipe.model_validate({"backbone": "test_efficientnet", "head": "light", "on": ["tiny"]})
    student = Student(StudentSpec(backbone="test_efficientnet", head="light"), load_hand_model("open-hand"))
    module = StudentUnderTraining(student, recipe, "8x8-paper", teacher_dim=4)
    average = WeightAverage(module, decay=0.5)
    wanted: dict[str, torch.Tensor] = {}
    for number in range(1, 5):
        for value in module.state_dict().values():
            torch.manual_seed(number)
            value.copy_(torch.rand(value.shape) if value.is_floating_point() else torch.tensor(number))
        now = {name: value.clone() for name, value in module.state_dict().items()}
        kept = min(0.5, 1 - number ** (-2 / 3))
        wanted = {
            name: kept * wanted[name] + (1 - kept) * value if wanted and value.is_floating_point() else value
            for name, value in now.items()
        }
        average.update(number - 1)
    got = average.module.state_dict()
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


def test_a_compiled_student_learns_the_same(tmp_path: Path) -> None:
    eager, compiled = Log(), Log()
    job = tiny_job(tmp_path, steps=2, validation_fraction=0, **HYBRID)  # validating would compile it once more
    train(job, eager)
    other = in_folder(dataclasses.replace(job, recipe=job.recipe.model_copy(update={"compile": True})), "compiled")
    result = train(other, compiled)
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-3)
    assert Student.load(result.student)(torch.zeros(1, 3, 256, 256))["keypoints_3d"].shape == (1, 21, 3)


def test_without_a_compiler_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(InputError, match=r"train.compile: .*no-such-compiler is installed.*set train.compile: false"):
        train(tiny_job(tmp_path, compile=True))


def test_sigterm_writes_a_checkpoint_and_exits(tmp_path: Path) -> None:
    class Terminated(Silent):
        def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    job = tiny_job(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(in_folder(job, "stopped"), Terminated())
    assert stopped.value.code == STOPPED_EXIT_CODE == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    after = Log()
    train(in_folder(job, "stopped"), after)
    assert min(after.losses) == 4  # the signal came while step 2 was being reported; step 3 was finished and saved
    train(job)
    assert student_bytes(in_folder(job, "stopped")) == student_bytes(job)


def test_the_number_of_loader_threads_changes_nothing(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    train(job)
    for workers in (0, 3):
        recipe = job.recipe.model_copy(update={"loader_workers": workers})
        other = in_folder(dataclasses.replace(job, recipe=recipe), f"workers{workers}")
        train(other)
        assert student_bytes(other) == student_bytes(job)


def test_another_identity_starts_anew(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    first = train(job)
    log = Log()
    second = train(dataclasses.replace(job, identity="other", seed=4), log)
    assert (first.identity, second.identity, min(log.losses)) == ("identity", "other", 1)


def test_a_loss_that_is_no_number_stops_with_step_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny_job(tmp_path, log_every=6)
    real, calls = StudentUnderTraining.losses, []

    def poisoned(self: StudentUnderTraining, batch: dict[str, torch.Tensor]) -> object:
        calls.append(0)
        if len(calls) == 2:
            batch["labels/keypoints_3d"][0, 5] = float("nan")
        return real(self, batch)

    monkeypatch.setattr(StudentUnderTraining, "losses", poisoned)
    with pytest.raises(WorkError, match=r"step 2: .*label/keypoints_3d not finite.*tiny:0000\d\d#0, tiny:0000\d\d#0"):
        train(job)
    assert not (job.out_dir / CHECKPOINT).exists()


def test_a_process_that_loaded_the_teacher_may_not_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "models.teacher", ModuleType("models.teacher"))
    with pytest.raises(AssertionError, match="teacher"):
        train(tiny_job(tmp_path))


def test_a_damaged_checkpoint_is_said_and_runs_nothing(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(job, Log(5))
    path = job.out_dir / CHECKPOINT
    whole = path.read_bytes()
    marker = tmp_path / "ran"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], b"", bytes(flipped), pickle.dumps(_Evil(marker)), evil_archive(marker)):
        path.write_bytes(damaged)
        with pytest.raises(DamageError, match=r"checkpoint\.pt is damaged"):
            train(job)
    assert not marker.exists()
    (job.out_dir / RESULT).write_text("{")
    with pytest.raises(DamageError, match=r"result\.json is damaged"):
        train(job)


def evil_archive(marker: Path) -> bytes:
    data = io.BytesIO()
    torch.save({"identity": "identity", "step": _Evil(marker)}, data)
    return data.getvalue()


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def test_the_mix_and_its_validation(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, on=["tiny", "more"])
    cache = write_tiny_cache(tmp_path / "cache", n=6, dataset="more")
    both = dataclasses.replace(job, snapshots=pinned(cache, {"tiny": 0.25, "more": 0.75}))
    assert train(both).steps == 6
    without = dataclasses.replace(both, recipe=both.recipe.model_copy(update={"validation_fraction": 0.0}))
    result = train(in_folder(without, "without"))
    assert (result.validation, result.best_step) == ({}, 6)


@pytest.mark.parametrize(
    ("grid", "alignment", "served"),
    [
        ("8x8-paper", "paper", True), ("8x8-paper", "geometric", False), ("8x6-geometric", "geometric", True),
        ("8x6-geometric", "paper", False), ("full", "paper", True), ("full", "geometric", True),
    ],
)  # fmt: skip
def test_which_cache_serves_which_alignment(tmp_path: Path, grid: str, alignment: str, served: bool) -> None:
    job = tiny_job(tmp_path, grid=grid, steps=1, distill={"features": 1.8, "alignment": alignment})  # type: ignore[arg-type]
    if served:
        train(job)
    else:
        with pytest.raises(InputError, match="or full"):
            train(job)


@pytest.mark.parametrize(
    ("distill", "trains"),
    [
        ({}, True),
        ({"projection": "trained"}, True),
        ({"projection": "frozen"}, False),
        ({"preset": "paper"}, False),
        ({"preset": "paper", "projection": "frozen"}, False),
    ],
)
def test_whether_the_projection_learns(tmp_path: Path, distill: dict[str, str], trains: bool) -> None:
    recipe = tiny_job(tmp_path, distill={"features": 1.8, **distill}).recipe
    student = Student(StudentSpec(backbone=recipe.backbone, head=recipe.head), load_hand_model("open-hand"))
    module = StudentUnderTraining(student, recipe, "8x8-paper", teacher_dim=32)
    assert module.feature_loss is not None
    projection = module.feature_loss.projection
    assert isinstance(projection, nn.Conv2d)
    learned = {id(p) for p in module.parameters() if p.requires_grad}
    assert (id(projection.weight) in learned) is trains


def test_a_smaller_picture_is_compared_where_it_has_the_caches_tokens(tmp_path: Path) -> None:
    log, keys = Log(), {"validation_fraction": 0.0, "validate_every": 100, "lr": 3e-3, "input_px": 128}
    distill = {"features": 1.0, "at_stride": 16}
    train(tiny_job(tmp_path / "stage", steps=40, batch_size=6, distill=distill, **keys), log)
    losses = np.array([log.losses[step] for step in sorted(log.losses)])
    assert losses[-5:].mean() < 0.9 * losses[:5].mean()
    with pytest.raises(InputError, match=r"4x4 tokens; .* or distill\.at_stride"):
        train(tiny_job(tmp_path / "last", distill={"features": 1.0}, **keys))


def test_it_learns(tmp_path: Path) -> None:
    log = Log()
    train(tiny_job(tmp_path, steps=40, batch_size=6, validation_fraction=0.0, validate_every=100, lr=3e-3), log)
    losses = np.array([log.losses[step] for step in sorted(log.losses)])
    assert losses[-5:].mean() < 0.7 * losses[:5].mean()


def test_the_schedule() -> None:
    job_recipe = {"on": ["a"], "backbone": "b", "steps": 100, "lr": 2.0, "warmup_steps": 10}
    cosine = StudentRecipe.model_validate(job_recipe)
    assert learning_rate(cosine, 0) == pytest.approx(0.2)
    assert learning_rate(cosine, 10) == pytest.approx(2.0)
    assert learning_rate(cosine, 55) == pytest.approx(1.0)
    assert learning_rate(cosine, 99) < 0.01
    assert learning_rate(StudentRecipe.model_validate(job_recipe | {"schedule": "constant"}), 99) == 2.0


@pytest.mark.parametrize(
    "where", ["teacher/features", "pictures/bytes", "labels/keypoints_2d", "teacher/features_scale"]
)
def test_no_student_is_made_from_a_damaged_cache(tmp_path: Path, where: str) -> None:
    """Whichever step meets it: the step is not made, the file is named, nothing that looks like a student is left."""
    job, log = tiny_job(tmp_path, **HYBRID), Log()
    shard = next(path for path in (tmp_path / "cache").glob("*/shards/*.zarr"))
    chunk = next(path for path in (shard / where).iterdir() if path.name != "zarr.json")
    data = bytearray(chunk.read_bytes())
    for at in range(0, len(data), 500):  # every record and every picture, so that the first to be read is among them
        data[at] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(DamageError, match=re.escape(str(chunk))):
        train(job, log)
    assert not (job.out_dir / RESULT).exists()
    assert not (job.out_dir / "student").exists()


def test_no_student_is_made_with_a_damaged_hand_model(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    root = next((tmp_path / "cache").glob("*"))
    CacheFolder.create(root.parent, CacheFolder(root).identity, {HAND_MODEL: job.hand_model.read_bytes()})
    job = dataclasses.replace(job, hand_model=root / HAND_MODEL)
    data = bytearray(job.hand_model.read_bytes())
    data[len(data) // 2] ^= 1
    job.hand_model.write_bytes(data)
    with pytest.raises(DamageError, match=re.escape(str(job.hand_model))):
        train(job, Log())
