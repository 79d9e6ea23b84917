"""What a student is taught by: HaMeR's label losses, and the teacher's cached outputs and features.

Letters: B samples, J 21 joints in OpenPose order, C channels of the student's map, D of the teacher's, H x W tokens.
2D points are crop units (-0.5..0.5 over the 256-pixel picture), 3D points metres. Sources: HAMER_SPEC sections 4 and 8.

Two presets. `paper` is Fast-HaMeR's published loss to the bit: sums over points *and batch* beside a feature mean, so
that the batch size re-weights them, and a random projection that never trains. `corrected`, the default, means over
the batch everywhere and trains the projection, on the student's side: a trainable projection of the *teacher* could be
satisfied by shrinking both maps to zero, a fixed target cannot.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storage.config import FeatureGrid
from storage.errors import InputError
from trainer.config import DistillConfig, LossWeights, grid_problem

PARAMETERS = ("global_orient", "hand_pose", "betas")


def rotations(axis_angle_B3N: Tensor) -> Tensor:
    """(B, 3N) axis-angle in radians -> (B,N,3,3), through HaMeR's quaternion and its norm(theta + 1e-8)."""
    theta = axis_angle_B3N.reshape(-1, 3)
    angle = torch.linalg.vector_norm(theta + 1e-8, dim=1, keepdim=True)
    quaternion = torch.cat([torch.cos(angle / 2), torch.sin(angle / 2) * theta / angle], 1)
    w, x, y, z = F.normalize(quaternion, dim=1).unbind(1)
    rows = [
        *(w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (w * y + x * z)),
        *(2 * (w * z + x * y), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (w * x + y * z), w * w - x * x - y * y + z * z),
    ]
    return torch.stack(rows, 1).reshape(len(axis_angle_B3N), axis_angle_B3N.shape[1] // 3, 3, 3)


def label_losses(pred: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """HaMeR's five losses against the labels of the view, each (B,): sums over a sample's points.

    labels: `keypoints_2d` (B,J,3) and `keypoints_3d` (B,J,4), the last column a confidence that weighs the point;
    `global_orient` (B,3), `hand_pose` (B,45) axis-angle, `betas` (B,10), counted where `has_hand_pose`, `has_betas`.
    """
    has_pose, has_betas = labels["has_hand_pose"], labels["has_betas"]
    return {
        "keypoints_3d": points_3d(
            pred["keypoints_3d"], labels["keypoints_3d"][..., :3], labels["keypoints_3d"][..., 3:]
        ),
        "keypoints_2d": _points_2d(
            pred["keypoints_2d"], labels["keypoints_2d"][..., :2], labels["keypoints_2d"][..., 2:]
        ),
        "global_orient": has_pose * _squares(pred["global_orient"], rotations(labels["global_orient"])),
        "hand_pose": has_pose * _squares(pred["hand_pose"], rotations(labels["hand_pose"])),
        "betas": has_betas * _squares(pred["betas"], labels["betas"]),
    }


def output_losses(pred: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same five against what the teacher said of the same picture, each (B,); every point counts fully."""
    one = pred["keypoints_2d"].new_ones(())
    return {
        "keypoints_3d": points_3d(pred["keypoints_3d"], teacher["keypoints_3d"], one),
        "keypoints_2d": _points_2d(pred["keypoints_2d"], teacher["keypoints_2d"], one),
    } | {name: _squares(pred[name], teacher[name]) for name in PARAMETERS}


def weighted(losses: Mapping[str, Tensor], weights: LossWeights) -> Tensor:
    """(B,): the weighted sum of the parts."""
    total: Tensor = sum((getattr(weights, name) * value for name, value in losses.items()), start=torch.zeros(()))
    return total


class FeatureLoss(nn.Module):
    """Mean squared difference of the student's feature map and the teacher's cached one, where they are comparable.

    grid says what the cache holds of the teacher's 16x12 tokens; the student's map (H,W) and the alignment say how it
    is compared. Raises InputError, naming the grid that would serve, when the cached one cannot.
    """

    def __init__(self, distill: DistillConfig, grid: FeatureGrid, student_CHW: tuple[int, int, int], teacher_dim: int):
        super().__init__()
        self.preset, self.alignment = distill.preset, distill.alignment
        student_dim, height, width = student_CHW
        if (problem := grid_problem(distill, grid, (height, width))) is not None:
            raise InputError(problem)
        sizes = (teacher_dim, student_dim) if distill.preset == "paper" else (student_dim, teacher_dim)
        self.projection = nn.Identity() if student_dim == teacher_dim else nn.Conv2d(*sizes, kernel_size=1)
        self.projection.requires_grad_(distill.projection_is_trained)

    def forward(self, student_BCHW: Tensor, teacher_BDHW: Tensor) -> Tensor:
        """(B,): each sample's mean over channels and tokens."""
        student, teacher = self.aligned(student_BCHW, teacher_BDHW)
        return (student - teacher).square().mean((1, 2, 3))

    def aligned(self, student_BCHW: Tensor, teacher_BDHW: Tensor) -> tuple[Tensor, Tensor]:
        """Both maps with the same channels and the same tokens."""
        student, teacher = student_BCHW, teacher_BDHW
        if self.alignment == "paper":
            teacher = _stretched(teacher, (student.shape[2], student.shape[3]))
        else:
            student, teacher = _same_pixels(student, teacher)
        if self.preset == "paper":
            return student, self.projection(teacher)
        return self.projection(student), teacher


def points_3d(pred: Tensor, true: Tensor, weight: Tensor) -> Tensor:
    """(B,): HaMeR's loss of joints, metres: (B,J,3) from each one's wrist, weighed by (B,J,1) or one number."""
    difference = (pred - pred[:, :1]) - (true - true[:, :1])  # from the wrist: absolute depth is not in one picture
    return (weight * difference.abs()).flatten(1).sum(1)


def _points_2d(pred: Tensor, true: Tensor, weight: Tensor) -> Tensor:
    return (weight * (pred - true).abs()).flatten(1).sum(1)


def _squares(pred: Tensor, true: Tensor) -> Tensor:
    return (pred - true).square().flatten(1).sum(1)


def _stretched(teacher: Tensor, size_HW: tuple[int, int]) -> Tensor:
    """The published resize: the teacher's central 192 columns drawn over all the student's columns."""
    if teacher.shape[2:] == size_HW:
        return teacher
    return F.interpolate(teacher, size=size_HW, mode="bilinear", align_corners=False)


def _same_pixels(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The student's columns inside the teacher's 32..224, and the finer of both pooled to the coarser."""
    height, width = student.shape[2:]
    if width == height:  # a square map covers all 256 columns: an eighth of them on either side is the student's alone
        student = student[..., width // 8 : width - width // 8]
    shared = min(height, teacher.shape[2])
    return F.avg_pool2d(student, height // shared), F.avg_pool2d(teacher, teacher.shape[2] // shared)
