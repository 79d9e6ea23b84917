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

SCRIPT = Path(__file__).parents[2] / "benchmarks/train_demo_teacher.py"
STEPS = 6


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_teacher", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    module.BATCH = {"cpu": 4}
    module.RECIPE |= {"validate_every": 3, "checkpoint_every": 3, "log_every": 1, "warmup_steps": 2}
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
    train(job, log, Group(), lessons=partial(script.lessons_on, pictures, held_out, arguments))
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
    assert script.best_so_far(folder) == parts.out_dir / "student"
    script.export_hamer_checkpoint(Student.load(parts.out_dir / "student"), tmp_path)
    teacher = importlib.import_module("models.teacher").load_teacher(tmp_path / "checkpoints/hamer.ckpt", "open-hand")
    assert teacher(torch.zeros(1, 3, 256, 256))["features"].shape == (1, 192, 16, 12)
    with pytest.raises(SystemExit, match="nothing was trained here yet"):
        script.best_so_far(tmp_path)


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
