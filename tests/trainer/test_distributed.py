"""Two processes that share each batch, over gloo on loopback, beside one that has all of it."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer import pair
from tests.trainer.fakes import FakeReader
from tests.trainer.jobs import tiny_job
from tests.trainer.test_prior import write_mocap
from trainer.config import StudentRecipe
from trainer.data import Source, TrainMix
from trainer.distributed import Group
from trainer.job import TrainJob
from trainer.losses import rotations

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
"""Of the norm of a parameter's gradient, in float32: a sum of two halves is rounded in another place."""
HYBRID = {"outputs": 0.3, "features": 1.8}
STEPS: dict[str, dict[str, Any]] = {
    "corrected": {"distill": HYBRID},
    "paper": {"distill": HYBRID | {"preset": "paper"}},
    "clipped": {"clip_grad_norm": 1e-3, "colour_jitter": 0.3, "distill": HYBRID | {"preset": "paper"}},
    "prior": {"prior": {"weight": 0.5}},
    "prior-paper": {"prior": {"weight": 0.5}, "distill": {"preset": "paper"}},
    "prior-mocap": {"prior": {"weight": 0.5}},
    "prior-mocap-paper": {"prior": {"weight": 0.5}, "distill": {"preset": "paper"}},
}
"""What one step is compared for, with a network without batch statistics."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pair.Task]:
    folder = tmp_path_factory.mktemp("pair")
    base = tiny_job(folder, batch_size=4, backbone="test_convnext")
    mocap = write_mocap(folder / "mocap.npz")
    tasks = {}
    for name, changes in STEPS.items():
        job = with_recipe(base, **changes)
        tasks[name] = pair.Task("step", dataclasses.replace(job, mocap=mocap if "mocap" in name else None))
    tasks["whole"] = pair.Task("train", with_recipe(base, distill=HYBRID))
    batch_norm = with_recipe(base, backbone="test_efficientnet", distill=HYBRID)
    tasks["statistics"] = pair.Task("step", batch_norm)
    tasks["undisturbed"] = pair.Task("train", batch_norm)
    tasks["stopped"] = pair.Task("stopped", batch_norm)
    tasks["poisoned"] = pair.Task("poisoned", base)
    return tasks


@pytest.fixture(scope="module")
def done(tasks: dict[str, pair.Task]) -> dict[str, list[dict[str, Any]]]:
    return in_pairs(next(iter(tasks.values())).job.out_dir.parent, tasks)


def in_pairs(folder: Path, tasks: dict[str, pair.Task]) -> dict[str, list[dict[str, Any]]]:
    """What came of each task in each of the two processes; students lie in folders of the tasks' names."""
    (folder / "jobs.pickle").write_bytes(pickle.dumps(tasks))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "tests.trainer.pair", str(folder)]
    workers = [
        subprocess.Popen([*line, str(rank), "2"], env=environment, cwd=ROOT, stderr=subprocess.PIPE) for rank in (0, 1)
    ]
    said = [worker.communicate(timeout=300)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)
    return {name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in (0, 1)] for name in tasks}


def with_recipe(job: TrainJob, **changes: Any) -> TrainJob:
    recipe = StudentRecipe.model_validate(job.recipe.model_dump() | changes)
    return dataclasses.replace(job, recipe=recipe)


def alone(task: pair.Task, folder: Path) -> dict[str, Any]:
    work = pair.one_step if task.kind == "step" else pair.trained
    return work(dataclasses.replace(task.job, out_dir=folder / "alone"), Group())


def assert_alike(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, one in mine.items():
        assert (one - theirs[name]).norm() <= TOLERANCE * one.norm() + 1e-9, name


@pytest.mark.parametrize("name", STEPS)
def test_two_workers_have_the_losses_and_gradients_of_one(
    tasks: dict[str, pair.Task], done: dict[str, list[dict[str, Any]]], name: str, tmp_path: Path
) -> None:
    one = alone(tasks[name], tmp_path)
    assert one["gradients"]
    assert ("prior" in name) == bool(one["judge"])
    for two in done[name]:
        assert_alike(one["gradients"], two["gradients"])
        assert_alike(one["judge"], two["judge"])
        assert_alike(one["values"], two["values"])
    assert_same(*done[name])
    assert {two["trusted"] for two in done[name]} == {1, 2}  # the shares differ in what they may teach the judge


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit for bit: the workers' copies must not drift apart."""
    for group in ("values", "gradients", "judge"):
        assert one[group].keys() == other[group].keys()
        assert all(torch.equal(one[group][name], other[group][name]) for name in one[group])
    assert all(map(torch.equal, one["statistics"], other["statistics"]))


def test_two_workers_train_the_student_that_one_would(
    tasks: dict[str, pair.Task], done: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    one, (two, silent) = alone(tasks["whole"], tmp_path), done["whole"]
    assert two["steps"].keys() == one["steps"].keys()
    for step, values in one["steps"].items():
        assert two["steps"][step] == pytest.approx(values, rel=1e-4)
    for step, values in one["validated"].items():
        assert two["validated"][step] == pytest.approx(values, rel=1e-4)
    assert (silent["steps"], silent["validated"], silent["best_step"]) == ({}, {}, two["best_step"])


def test_batch_statistics_are_each_workers_own_and_their_averages_everyones(
    tasks: dict[str, pair.Task], done: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    one, (two, other) = alone(tasks["statistics"], tmp_path), done["statistics"]
    assert_same(two, other)
    means, halves = one["statistics"][::2], two["statistics"][::2]
    torch.testing.assert_close(halves[0], means[0])  # of the first layer, which sees the same pictures
    different = [name for name, grad in one["gradients"].items() if (grad - two["gradients"][name]).norm() > TOLERANCE]
    assert different  # what the documentation warns of


def test_both_stop_for_a_signal_to_one_and_go_on_bit_for_bit(
    tasks: dict[str, pair.Task], done: dict[str, list[dict[str, Any]]]
) -> None:
    folder = tasks["stopped"].job.out_dir.parent
    assert [worker["code"] for worker in done["stopped"]] == [143, 143]
    assert min(done["stopped"][0]["steps"]) == 3
    for name in ("weights.safetensors", "student.json"):
        calm, stopped = (folder / which / "student" / name for which in ("undisturbed", "stopped"))
        assert calm.read_bytes() == stopped.read_bytes()


def test_a_loss_that_is_no_number_in_one_share_stops_both(done: dict[str, list[dict[str, Any]]]) -> None:
    first, second = (worker["error"] for worker in done["poisoned"])
    assert first == second
    assert first.startswith("step 2: ")
    assert "label/keypoints_3d" in first
    assert first.count("tiny:") == 4


@pytest.mark.parametrize("workers", [2, 3])
def test_the_shares_are_the_batch_of_one_worker(workers: int) -> None:
    def mix(rank: int, of: int) -> TrainMix:
        sources = [Source("a", FakeReader("a", 50), 0.75), Source("b", FakeReader("b", 11, views=2), 0.25)]
        return TrainMix(
            sources, batch_size=12, seed=0, keys=(), validation_fraction=0.4, colour_jitter=0.3, rank=rank, workers=of
        )

    whole, shares = mix(0, 1), [mix(rank, workers) for rank in range(workers)]
    for step in range(5):
        batch = whole.batch(step)
        for rank, share in enumerate(shares):
            for key, values in share.batch(step).items():
                np.testing.assert_array_equal(values, batch[key][rank::workers])
    dealt = [batch["sample_id"].tolist() for share in shares for batch in share.validation_batches()]
    assert sorted(dealt) == sorted(batch["sample_id"].tolist() for batch in whole.validation_batches())


def test_no_real_hand_in_a_share_is_no_error() -> None:
    assert rotations(torch.zeros(0, 45)).shape == (0, 15, 3, 3)
