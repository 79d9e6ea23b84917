"""The paper preset against what Fast-HaMeR's own loss code returned, gradients included."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.shared import REFERENCE, needs_shared
from trainer.config import DistillConfig, LossWeights
from trainer.losses import FeatureLoss, label_losses, output_losses, rotations, weighted

pytestmark = needs_shared
OUTPUTS = ("global_orient", "hand_pose", "betas", "keypoints_2d", "keypoints_3d")


@pytest.fixture(scope="module")
def reference() -> Iterator[dict[str, Tensor]]:
    with np.load(REFERENCE / "reference_losses.npz") as arrays:
        yield {name: torch.from_numpy(np.asarray(arrays[name], dtype=np.float64)) for name in arrays.files}


def inputs(reference: dict[str, Tensor], who: str) -> dict[str, Tensor]:
    prefix = f"in/{who}/"
    return {name.removeprefix(prefix): value for name, value in reference.items() if name.startswith(prefix)}


def leaves(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone().requires_grad_() for name, value in values.items()}


def near(value: Tensor, expected: Tensor, within: float = 1e-6) -> None:
    torch.testing.assert_close(value, expected, rtol=within, atol=within * float(expected.abs().max()))


def test_axis_angles_become_hamers_matrices(reference: dict[str, Tensor]) -> None:
    near(rotations(reference["in/geometry/axis_angle"])[:, 0], reference["out/geometry/aa_to_rotmat"])
    near(rotations(reference["in/gt/hand_pose"]), reference["out/single/gt_hand_pose_as_used"])
    near(rotations(reference["in/gt/global_orient"]), reference["out/single/gt_global_orient_as_used"])


def test_each_label_loss(reference: dict[str, Tensor]) -> None:
    ours = label_losses(inputs(reference, "student"), inputs(reference, "gt"))
    near(ours["keypoints_2d"].sum(), reference["out/single/keypoint_2d_l1"])
    near(ours["keypoints_3d"].sum(), reference["out/single/keypoint_3d_l1"])
    for name in ("global_orient", "hand_pose", "betas"):
        near(ours[name].sum(), reference[f"out/single/param_{name}"])


def test_each_output_loss(reference: dict[str, Tensor]) -> None:
    ours = output_losses(inputs(reference, "student"), inputs(reference, "teacher"))
    near(ours["keypoints_2d"].sum(), reference["out/single/kd_keypoint_2d_l1"])
    near(ours["keypoints_3d"].sum(), reference["out/single/kd_keypoint_3d_l1"])
    for name in ("global_orient", "hand_pose", "betas"):
        near(ours[name].sum(), reference[f"out/mobilenet_large_kd_full/d24_8x8/teacher_loss_{name}"])


def feature_loss(reference: dict[str, Tensor], features: str) -> FeatureLoss:
    student = reference[f"in/student/feature_maps_{features}"]
    channels, height, width = student.shape[1:]
    loss = FeatureLoss(DistillConfig(features=1, preset="paper"), "full", (channels, height, width), 1280).double()
    if isinstance(loss.projection, nn.Conv2d):
        loss.projection.weight.data = reference["in/channel_projection/weight"]
        loss.projection.bias.data = reference["in/channel_projection/bias"]
    return loss


@pytest.mark.parametrize("features", ["d24_8x8", "d24_16x16", "d24_14x14"])
def test_the_aligned_teacher_map(reference: dict[str, Tensor], features: str) -> None:
    loss = feature_loss(reference, features)
    student, teacher = reference[f"in/student/feature_maps_{features}"], reference["in/teacher/feature_maps"]
    golden = f"out/mobilenet_large_kd_features/{features}"
    # 2e-6: the original interpolated in float32, and 14/12 is not a float32
    near(loss.aligned(student, teacher)[1], reference[f"{golden}/aligned_teacher_features"], within=2e-6)
    near(6 * loss(student, teacher).mean(), reference[f"{golden}/loss_teacher_features"])


@pytest.mark.parametrize(
    ("config", "features"),
    [
        ("mobilenet_large_kd_outputs", "d24_8x8"),
        ("mobilenet_large_kd_features", "d24_8x8"),
        ("mobilenet_large_kd_full", "d24_8x8"),
        ("mobilenet_large_kd_full", "d1280_8x8"),
        ("mobilenet_large_kd_features", "d24_16x16"),
        ("mobilenet_large_kd_features", "d24_14x14"),
        ("resnet_50_kd_features", "d24_8x8"),
        ("resnet_50_kd_outputs", "d24_8x8"),
    ],
)
def test_the_combined_loss_and_its_gradients(reference: dict[str, Tensor], config: str, features: str) -> None:
    golden = f"out/{config}/{features}"
    weight, scaler = reference[f"{golden}/weights"]
    pred = leaves({name: value for name, value in inputs(reference, "student").items() if name in OUTPUTS})
    feature_map = reference[f"in/student/feature_maps_{features}"].clone().requires_grad_()
    total = weighted(label_losses(pred, inputs(reference, "gt")), LossWeights()).sum()
    if "features" not in config:
        total = total + weight * weighted(output_losses(pred, inputs(reference, "teacher")), LossWeights()).sum()
    if "outputs" not in config:
        loss = feature_loss(reference, features)
        total = total + weight * scaler * loss(feature_map, reference["in/teacher/feature_maps"]).mean()
    near(total, reference[f"{golden}/combined_loss"])
    total.backward()
    gradients = {f"grad_{name}": value.grad for name, value in (pred | {"feature_maps": feature_map}).items()}
    expected = [name for name in gradients if f"{golden}/{name}" in reference]
    for name in expected:
        gradient = gradients[name]
        assert gradient is not None
        near(gradient, reference[f"{golden}/{name}"])
