"""The demo's teacher is trained by the trainer's own loop, on views that are drawn anew at every step."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from models.student import Student
from trainer.distributed import Group
from trainer.job import Silent, TrainJob
from trainer.loop import train
from trainer.losses import rotations

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEPS = 6
SHORT = {"validate_every": 3, "checkpoint_every": 3, "log_every": 1, "warmup_steps": 2}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    module = loaded("train_demo_teacher")
    module.BATCH = {"cpu": 4, "cuda": 4}
    module.RECIPE |= SHORT
    return module


@pytest.fixture(scope="module")
def student_script(script: ModuleType) -> ModuleType:
    """The script beside it, which takes most from it, its short batches too."""
    assert script.BATCH["cpu"] == 4
    module = loaded("train_demo_student")
    module.STUDENT_RECIPE |= SHORT
    return module


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses, and the script beside it, look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo-teacher")


class Log(Silent):
    """Keeps what is said; dies after a step."""

    def __init__(self, die_after: int | None = None) -> None:
        self.steps: dict[int, Mapping[str, float]] = {}
        self.die_after = die_after

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps[step] = metrics
        if step == self.die_after:
            raise KeyboardInterrupt


def sets(script: ModuleType, folder: Path) -> tuple[Any, Any]:
    """Pictures to learn from, and held out."""
    return script.render(folder, 0, "train", 12), script.render(folder, 0, "held-out", 4)


def trained(script: ModuleType, folder: Path, *more: str, die_after: int | None = None) -> tuple[TrainJob, Log]:
    line = [str(folder), "--pictures", "12", "--steps", str(STEPS), "--device", "cpu", "--processes", "1", *more]
    arguments, log = script.parsed(line), Log(die_after)
    pictures, held_out = sets(script, folder)
    job = script.job_of(arguments)
    train(job, log, Group(), lessons=partial(script.lessons_on, script.TEACHER, pictures, held_out, arguments))
    return job, log


def test_it_goes_on_where_it_was_killed_and_becomes_a_teacher(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    job, whole = trained(script, folder)
    with pytest.raises(KeyboardInterrupt):
        trained(script, folder, "--tokens", "64", die_after=5)
    parts, resumed = trained(script, folder, "--tokens", "64")
    assert (min(resumed.steps), max(resumed.steps)) == (4, STEPS)
    assert parts.out_dir != job.out_dir
    losses = [whole.steps[step]["labels"] for step in range(1, STEPS + 1)]
    assert np.isfinite(losses).all()
    assert whole.steps[1].keys() == resumed.steps[4].keys()
    assert script.best_so_far(folder, "demo-teacher") == parts.out_dir / "student"
    script.export_hamer_checkpoint(Student.load(parts.out_dir / "student"), tmp_path)
    teacher = importlib.import_module("models.teacher").load_teacher(tmp_path / "checkpoints/hamer.ckpt", "open-hand")
    assert teacher(torch.zeros(1, 3, 256, 256))["features"].shape == (1, 192, 16, 12)
    with pytest.raises(SystemExit, match="no demo-teacher was trained here yet"):
        script.best_so_far(tmp_path, "demo-teacher")


def test_a_student_learns_from_labels_and_others_start_from_it(
    script: ModuleType, student_script: ModuleType, folder: Path, tmp_path: Path
) -> None:
    line = [str(folder), "--pictures", "12", "--steps", "3", "--device", "cpu", "--processes", "1"]
    arguments, log = student_script.parsed(line), Log()
    job = student_script.job_of(arguments)
    train(
        job, log, Group(), lessons=partial(script.lessons_on, student_script.STUDENT, *sets(script, folder), arguments)
    )
    assert {"labels", "labels/own_frame", "token/joints", "token/parts"} <= log.steps[3].keys()
    student = Student.load(script.best_so_far(folder, "demo-mobilenetv3_small_100"))
    path = tmp_path / "start.safetensors"
    student_script.export(student, path)
    assert path.stat().st_size < 0.6 * (job.out_dir / "student/weights.safetensors").stat().st_size
    spec = student.spec.model_copy(update={"weights": str(path)})
    started = Student(spec, student.hand_model).eval()
    crops = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(started(crops)["keypoints_3d"], student(crops)["keypoints_3d"], atol=2e-3)


def test_places_of_a_map_are_told_what_lies_in_them(script: ModuleType, student_script: ModuleType) -> None:
    """A joint in the middle of one place belongs to it alone, one between two to both; likewise for the vertices."""
    for places, width in ((script.TOKENS, 12), (student_script.PLACES, 8)):
        side = places.side_px
        middle = torch.tensor([places.left_px + 3.5 * side - 0.5, places.top_px + 5.5 * side - 0.5])
        keypoints = (
            torch.stack([middle, middle + torch.tensor([side / 2, 0.0]), torch.tensor([-99.0, 9])]) / 256
        ) - 0.5
        targets = script.token_targets(keypoints[None], places)[0]
        at = 5 * width + 3
        assert targets.shape == (3, places.rows * places.columns)
        assert targets[0, at].item() == pytest.approx(1, abs=1e-4)
        assert targets[1, [at, at + 1]].tolist() == pytest.approx([0.5, 0.5], abs=1e-4)
        assert targets.sum(dim=1).tolist() == pytest.approx([1, 1, 0], abs=1e-4)
        seen = script.parts_in_tokens(
            torch.stack([middle, torch.tensor([-99.0, 9])])[None], torch.tensor([7, 2]), places
        )
        assert seen.nonzero().tolist() == [[0, 7, at]]


def test_views_are_drawn_by_step_and_worker_alone(script: ModuleType, folder: Path) -> None:
    pictures, held_out = sets(script, folder)
    views = script.FreshViews(pictures, held_out, 4, Group())
    first = list(views.batches(0, 3, 0))
    ahead = list(views.batches(1, 3, 2))
    for one, other in zip(first[1:], ahead, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)
    assert not np.array_equal(first[0]["pictures"], first[1]["pictures"])
    assert sum(len(batch["sample_id"]) for batch in views.validation_batches()) == views.validation_size == 4


def test_tokens_on_the_hand_are_kept_more_readily(script: ModuleType) -> None:
    torch.manual_seed(0)
    seen = torch.zeros(200, 16, 192)
    seen[:, 3, :40] = 1
    kept = script.kept_tokens(seen, 80)
    assert kept.shape == (200, 80)
    assert all(len(set(row)) == 80 for row in kept.tolist())
    assert 0.9 < (kept < 40).float().sum() / (200 * 40) < 1
    assert (kept >= 40).unique().tolist() == [False, True]


def test_fingers_are_scored_apart_from_the_direction_of_the_hand(script: ModuleType, folder: Path) -> None:
    pictures, _ = sets(script, folder)
    batch = script.batch_of(pictures, np.arange(8), np.random.default_rng(0))
    labels = {key: torch.from_numpy(batch[key]).double() for key in ("labels/keypoints_3d", "labels/global_orient")}
    joints = labels["labels/keypoints_3d"][..., :3]
    direction = rotations(labels["labels/global_orient"])[:, 0]
    turn = rotations(torch.tensor([[0.3, -2.0, 0.5]]).double().expand(8, 3))[:, 0]
    turned = {"keypoints_3d": joints @ turn.mT + 1.0, "global_orient": (turn @ direction)[:, None]}
    assert script.own_frame_loss(turned, labels).abs().max() < 1e-5
    bent = turned["keypoints_3d"].clone()
    bent[:, 8] += 0.01 * turn @ direction @ torch.tensor([1.0, 0, 0]).double()  # the index's tip, 10 mm
    missed = script.own_frame_loss(turned | {"keypoints_3d": bent}, labels)
    assert torch.allclose(missed, torch.full((8,), 0.01).double(), atol=1e-5)
