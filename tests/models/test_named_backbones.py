"""The students that the paper and its code name, and newer ones: their maps and their sizes, with no memory taken.

That each of them trains a step, is saved and loaded: tests/trainer/test_named_backbones.py.
"""

from __future__ import annotations

import pytest
import torch

from models.student import Student, StudentSpec
from tests.tiny_networks import tiny_hand_model

PAPER: dict[str, tuple[tuple[int, int, int], float]] = {
    "mobilenetv3_large_100": ((960, 8, 8), 40.5),
    "mobilevit_s": ((640, 8, 8), 40.5),
    "resnet50": ((2048, 8, 8), 67.7),
    "resnet101": ((2048, 8, 8), 86.7),
    "convnext_large": ((1536, 8, 8), 237.3),
}
"""The map, and the millions of parameters that the paper's students have with HaMeR's head."""
OF_ITS_CODE: dict[str, tuple[tuple[int, int, int], float]] = {
    "wide_resnet50_2": ((2048, 8, 8), 111.1),
    "wide_resnet101_2": ((2048, 8, 8), 169.1),
    "tf_efficientnetv2_m": ((1280, 8, 8), 92.4),
    "tf_efficientnetv2_l": ((1280, 8, 8), 156.7),
    "vit_base_patch16_224": ((768, 16, 16), 122.2),
}
NEWER: dict[str, tuple[tuple[int, int, int], float]] = {
    "fastvit_ma36": ((1216, 8, 8), 82.0),
    "repvit_m1_5": ((512, 8, 8), 48.4),
    "mobilenetv4_conv_medium": ((960, 8, 8), 44.7),
    "convnextv2_base": ((1024, 8, 8), 125.6),
    "hamer": ((1280, 16, 12), 670.4),
}
"""The last is the teacher's own network, as a student."""


@pytest.mark.parametrize("backbone", [*PAPER, *OF_ITS_CODE, *NEWER])
def test_map_and_size(backbone: str) -> None:
    shape, millions = (PAPER | OF_ITS_CODE | NEWER)[backbone]
    with torch.device("meta"):
        student = Student(StudentSpec(backbone=backbone), tiny_hand_model())
        found = student.backbone(torch.empty(1, 3, 256, 256)).shape
    assert (tuple(found), student.feature_shape) == ((1, *shape), shape)
    assert sum(parameter.numel() for parameter in student.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
