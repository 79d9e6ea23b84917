"""The adversarial pose prior in the loop: it learns, it survives a stop, its file is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage.errors import InputError
from tests.trainer.jobs import tiny_job
from trainer.config import PriorConfig, StudentRecipe
from trainer.job import Silent, TrainJob
from trainer.loop import train
from trainer.losses import rotations
from trainer.prior import Mocap, PosePrior, read_mocap


def write_mocap(path: Path, hands: int = 50, columns: int = 48) -> Path:
    draw = np.random.default_rng(5)
    pose, betas = draw.normal(0, 0.3, (hands, columns)), draw.normal(0, 1, (hands, 10))
    np.savez(path, hand_pose=pose.astype(np.float32), betas=betas)
    return path


class Log(Silent):
    def __init__(self, die_after_step: int | None = None) -> None:
        self.steps: dict[int, Mapping[str, float]] = {}
        self.die_after_step = die_after_step

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps[step] = metrics
        if step == self.die_after_step:
            raise KeyboardInterrupt


def job_with_prior(folder: Path, **prior: Any) -> TrainJob:
    job = tiny_job(folder, prior={"weight": 0.01})
    if prior.get("mocap"):
        job = dataclasses.replace(job, mocap=write_mocap(folder / "mocap.npz"))
    return job


@pytest.mark.parametrize("mocap", [True, False])
def test_a_run_with_a_prior_resumes_bit_for_bit(tmp_path: Path, mocap: bool) -> None:
    whole, log = job_with_prior(tmp_path, mocap=mocap), Log()
    train(whole, log)
    assert all(metrics["prior/pleasing"] > 0 for metrics in log.steps.values())
    assert all(metrics["prior/judging"] > 0 for metrics in log.steps.values())
    assert len(log.steps) == 6
    stopped = dataclasses.replace(whole, out_dir=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(stopped, Log(die_after_step=4))
    train(stopped)
    weights = "student/weights.safetensors"
    assert (stopped.out_dir / weights).read_bytes() == (whole.out_dir / weights).read_bytes()

    plain = dataclasses.replace(
        whole,
        out_dir=tmp_path / "plain",
        recipe=StudentRecipe.model_validate(whole.recipe.model_dump() | {"prior": None}),
    )
    train(plain)
    assert (plain.out_dir / weights).read_bytes() != (whole.out_dir / weights).read_bytes()


def test_the_judge_learns_to_tell_real_hands_from_predicted_ones() -> None:
    torch.manual_seed(0)
    draw = np.random.default_rng(1)
    mocap = Mocap(draw.normal(0, 0.1, (200, 45)).astype(np.float32), draw.normal(0, 1, (200, 10)).astype(np.float32))
    prior = PosePrior(PriorConfig(), published=False, mocap=mocap, seed=0, lr=1e-3, weight_decay=1e-4)
    twisted = rotations(torch.from_numpy(draw.normal(0, 1.5, (32, 45)).astype(np.float32)))
    predicted = {"hand_pose": twisted, "betas": torch.zeros(32, 10)}
    losses = [float(prior.learn(predicted, {}, step)["prior/judging"]) for step in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    real_pose, real_betas = mocap.draw(32, 0, 999)
    with torch.no_grad():
        real, false = prior.judge(real_pose, real_betas).mean(), prior.judge(twisted, torch.zeros(32, 10)).mean()
    assert float(real) > float(false) + 0.3


def test_labels_that_may_not_be_trusted_teach_the_judge_nothing() -> None:
    prior = PosePrior(PriorConfig(), published=True, mocap=None, seed=0, lr=1e-3, weight_decay=0)
    predicted = {"hand_pose": torch.eye(3).expand(2, 15, 3, 3), "betas": torch.zeros(2, 10)}
    batch = {
        "labels/hand_pose": torch.zeros(2, 45),
        "labels/betas": torch.zeros(2, 10),
        "labels/has_hand_pose": torch.tensor([0.0, 1.0]),
        "labels/has_betas": torch.tensor([1.0, 0.0]),
    }
    before = prior.judge.D_conv1.weight.clone()
    assert prior.learn(predicted, batch, 0) == {}
    assert torch.equal(prior.judge.D_conv1.weight, before)


def test_published_draws_two_real_hands_for_each_predicted_one() -> None:
    mocap = Mocap(np.zeros((9, 45), np.float32), np.zeros((9, 10), np.float32))
    sizes = []
    for published in (True, False):
        prior = PosePrior(PriorConfig(), published=published, mocap=mocap, seed=0, lr=1e-3, weight_decay=0)
        real = prior._real({}, 0, 4)
        assert real is not None
        sizes.append(len(real[0]))
    assert sizes == [8, 4]


def test_mocap_files(tmp_path: Path) -> None:
    found = read_mocap(write_mocap(tmp_path / "a.npz"))
    assert found.hand_pose.shape == (50, 45)
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(found.hand_pose, arrays["hand_pose"][:, 3:])
    assert read_mocap(write_mocap(tmp_path / "b.npz", columns=45)).hand_pose.shape == (50, 45)
    pose, betas = found.draw(5, seed=1, step=2)
    assert (pose.shape, betas.shape) == ((5, 15, 3, 3), (5, 10))
    assert torch.equal(pose, found.draw(5, seed=1, step=2)[0])
    assert not torch.equal(pose, found.draw(5, seed=1, step=3)[0])


@pytest.mark.parametrize(
    "arrays",
    [
        {"hand_pose": np.zeros((3, 44)), "betas": np.zeros((3, 10))},
        {"hand_pose": np.zeros((3, 45)), "betas": np.zeros((2, 10))},
        {"hand_pose": np.full((3, 45), np.nan), "betas": np.zeros((3, 10))},
        {"hand_pose": np.zeros((0, 45)), "betas": np.zeros((0, 10))},
        {"betas": np.zeros((3, 10))},
    ],
)
def test_mocap_of_another_layout_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=r"Wanted finite hand_pose \(M,48\)"):
        read_mocap(tmp_path / "bad.npz")
