"""A batch to a loss: what the batch's size changes and what it does not, and where the pictures are made ready."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.preprocessing import normalise
from models.student import Student
from storage.cache import open_cache
from tests.tiny_cache import write_tiny_cache
from tests.tiny_networks import tiny_hand_model
from trainer.config import StudentRecipe
from trainer.data import PICTURES
from trainer.learner import StudentUnderTraining, keys_for, student_spec

WEIGHT = 1.8


def learner(**distill: Any) -> StudentUnderTraining:
    """A small hybrid student on the tiny cache's grid, in eval mode: batch norms would mix the samples."""
    torch.manual_seed(0)
    recipe = StudentRecipe.model_validate(
        {
            "on": ["tiny"],
            "backbone": "test_efficientnet",
            "head": "light",
            "distill": {"outputs": 0.3, "features": WEIGHT} | distill,
        }
    )
    student = Student(student_spec(recipe), tiny_hand_model())
    return StudentUnderTraining(student, recipe, "8x8-paper", teacher_dim=32).eval()


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    reader = open_cache(write_tiny_cache(tmp_path_factory.mktemp("cache"), n=3))
    arrays = reader.read(range(3), [0, 1, 2], keys_for(learner().recipe.distill), decoded=False)
    return {name: torch.from_numpy(values) for name, values in arrays.items() if name != "sample_id"}


def twice(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([values, values]) for name, values in batch.items()}


def gradients(module: StudentUnderTraining, batch: dict[str, Tensor]) -> list[Tensor]:
    total, _, _ = module.losses(batch)
    return list(torch.autograd.grad(total, [p for p in module.parameters() if p.requires_grad], allow_unused=False))


def test_the_corrected_loss_and_its_gradients_do_not_depend_on_the_batch_size(batch: dict[str, Tensor]) -> None:
    module = learner()
    (one, _, _), (two, _, _) = module.losses(batch), module.losses(twice(batch))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0)
    for first, second in zip(gradients(module, batch), gradients(module, twice(batch)), strict=True):
        torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-5 * float(first.abs().max()))


def test_the_papers_sums_double_with_the_batch_and_its_feature_loss_does_not(batch: dict[str, Tensor]) -> None:
    module = learner(preset="paper")
    (one, parts, _), (two, parts_of_two, _) = module.losses(batch), module.losses(twice(batch))
    features = parts["teacher/features"]
    torch.testing.assert_close(parts_of_two["teacher/features"], features, rtol=1e-5, atol=0)
    torch.testing.assert_close(two - WEIGHT * features, 2 * (one - WEIGHT * features), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("points", "columns"), [("keypoints_2d", 2), ("keypoints_3d", 3)])
def test_a_point_counts_by_its_confidence(batch: dict[str, Tensor], points: str, columns: int) -> None:
    module, part = learner(), f"label/{points}"
    _, whole, _ = module.losses(batch)
    labels = batch[f"labels/{points}"].clone()
    labels[..., columns] *= 0.25
    _, quarter, _ = module.losses(batch | {f"labels/{points}": labels})
    torch.testing.assert_close(quarter[part], 0.25 * whole[part], rtol=1e-5, atol=0)
    assert {name for name in whole if not torch.equal(whole[name], quarter[name])} == {part}
    labels[:, 1:, columns] = 0  # of one point nobody knows anything: it may lie anywhere
    labels[:, 1:, :columns] = 1e3
    _, one_point, _ = module.losses(batch | {f"labels/{points}": labels})
    assert one_point[part] < whole[part]


def test_pictures_travel_as_bytes_and_are_normalised_where_they_arrive(batch: dict[str, Tensor]) -> None:
    assert batch[PICTURES].dtype == torch.uint8
    assert batch["teacher/features"].dtype == torch.int8
    assert normalise(batch[PICTURES].to("meta")).device.type == "meta"  # nothing comes back to the CPU
