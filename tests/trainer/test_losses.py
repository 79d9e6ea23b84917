from __future__ import annotations

import pytest
import torch
from torch import nn

from storage.config import FeatureGrid
from storage.errors import InputError
from trainer.config import DistillConfig
from trainer.losses import FeatureLoss, label_losses

GEOMETRIC = DistillConfig(features=1, alignment="geometric")
PAPER = DistillConfig(features=1)


def test_the_paper_projection_is_frozen_and_reads_the_teacher() -> None:
    projection = FeatureLoss(PAPER.model_copy(update={"preset": "paper"}), "8x8-paper", (24, 8, 8), 40).projection
    assert isinstance(projection, nn.Conv2d)
    assert projection.weight.shape == (24, 40, 1, 1)
    assert not any(p.requires_grad for p in projection.parameters())


def test_the_corrected_projection_trains_and_reads_the_student() -> None:
    projection = FeatureLoss(PAPER, "8x8-paper", (24, 8, 8), 40).projection
    assert isinstance(projection, nn.Conv2d)
    assert projection.weight.shape == (40, 24, 1, 1)
    assert all(p.requires_grad for p in projection.parameters())


def test_nothing_trains_the_target_of_the_corrected_loss() -> None:
    loss = FeatureLoss(PAPER, "8x8-paper", (24, 8, 8), 40)
    student, target = loss.aligned(torch.zeros(2, 24, 8, 8), torch.zeros(2, 40, 8, 8))
    assert student.requires_grad
    assert not target.requires_grad  # if it did, shrinking both maps to zero would be the best answer


@pytest.mark.parametrize(("grid", "shape"), [("full", (16, 12)), ("8x6-geometric", (8, 6))])
def test_geometric_compares_the_same_pixels(grid: FeatureGrid, shape: tuple[int, int]) -> None:
    columns = torch.arange(256.0)  # a map that names the pixel column it stands on
    student = columns.reshape(8, 32).mean(1).expand(1, 1, 8, 8)
    teacher = columns[32:224].reshape(shape[1], -1).mean(1).expand(1, 1, *shape)
    assert FeatureLoss(GEOMETRIC, grid, (1, 8, 8), 1)(student, teacher) == pytest.approx(0)
    stretched = FeatureLoss(PAPER, "full", (1, 8, 8), 1)
    assert stretched(student, columns[32:224].reshape(12, 16).mean(1).expand(1, 1, 16, 12)) > 10


@pytest.mark.parametrize(
    ("distill", "grid", "student_HW", "named"),
    [
        (PAPER, "8x6-geometric", (8, 8), "8x8-paper or full"),
        (PAPER, "8x8-paper", (16, 12), "grid to full"),
        (GEOMETRIC, "8x8-paper", (8, 8), "8x6-geometric or full"),
        (GEOMETRIC, "full", (7, 7), "8x8 or 16x16"),
    ],
)
def test_a_grid_that_cannot_serve_is_an_error(
    distill: DistillConfig, grid: FeatureGrid, student_HW: tuple[int, int], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        FeatureLoss(distill, grid, (24, *student_HW), 40)


@pytest.mark.parametrize(
    ("distill", "grid", "student_HW"),
    [
        (GEOMETRIC, "full", (16, 12)),
        (GEOMETRIC, "8x6-geometric", (16, 12)),
        (GEOMETRIC, "full", (16, 16)),
        (PAPER, "full", (7, 7)),
    ],
)
def test_other_token_grids_are_served(distill: DistillConfig, grid: FeatureGrid, student_HW: tuple[int, int]) -> None:
    teacher = torch.zeros(2, 40, *((16, 12) if grid == "full" else (8, 6)))
    loss = FeatureLoss(distill, grid, (24, *student_HW), 40)(torch.zeros(2, 24, *student_HW), teacher)
    assert loss.shape == (2,)


def test_labels_that_are_absent_teach_nothing() -> None:
    pred = {
        "keypoints_2d": torch.rand(2, 21, 2),
        "keypoints_3d": torch.rand(2, 21, 3),
        "betas": torch.rand(2, 10),
        "global_orient": torch.rand(2, 1, 3, 3),
        "hand_pose": torch.rand(2, 15, 3, 3),
    }
    labels = {
        "keypoints_2d": torch.zeros(2, 21, 3),
        "keypoints_3d": torch.zeros(2, 21, 4),
        "betas": torch.zeros(2, 10),
        "global_orient": torch.zeros(2, 3),
        "hand_pose": torch.zeros(2, 45),
        "has_hand_pose": torch.tensor([0.0, 1.0]),
        "has_betas": torch.tensor([0.0, 1.0]),
    }
    losses = label_losses(pred, labels)
    assert losses["keypoints_2d"].abs().sum() + losses["keypoints_3d"].abs().sum() == 0
    assert all(losses[name][0] == 0 and losses[name][1] > 0 for name in ("betas", "global_orient", "hand_pose"))
