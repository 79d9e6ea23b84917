"""The runtime that travels with exports: its crops, hand and camera are those of the code that trained."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import crops, handstill_numpy
from models.crops import camera_in_photo
from models.hand_model import OPEN_HAND, HandModel, load_hand_model
from models.handstill_numpy import HandLayer
from models.mano import ManoLayer
from models.onnx_graph import hand_model_npz
from tests.tiny_networks import tiny_hand_model


def drawn_boxes(count: int) -> list[tuple[Any, Any, float, bool]]:
    """Photographs of noise, and boxes in them that are small and large, inside and half outside."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(count):
        height, width = draw.integers(80, 700, 2)
        photo = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        found.append((photo, draw.uniform(0, [width, height]), draw.uniform(20, 900), bool(draw.integers(2))))
    return found


@pytest.mark.parametrize("antialias", [False, True])
def test_crops_are_those_of_training(antialias: bool) -> None:
    """To the bit, but for lines of pixels whose place is a tie (1/32 px off, so 255/32 levels at most)."""
    same = 0
    for photo, center, box_px, right in drawn_boxes(30):
        wanted = crops.crop(photo, center, box_px, right, antialias=antialias)
        found = handstill_numpy.crop(photo, center, box_px, right, antialias=antialias)
        np.testing.assert_allclose(found.affine, wanted.affine, rtol=0, atol=1e-9)
        assert found.mirrored is wanted.mirrored is not right
        off = np.abs(found.picture - wanted.picture.astype(int))
        assert off.max() <= 8
        assert (off > 1).mean() < 3 / 256
        same += off.max() <= antialias  # blurred: sums of floats, some of which are halves of a level
    assert same >= 26


@pytest.mark.parametrize("box_px", [563.2, 600.0, 3000.0])
def test_a_box_that_is_far_from_the_photograph_is_black(box_px: float) -> None:
    photo = np.full((60, 90, 3), 255, np.uint8)
    assert handstill_numpy.crop(photo, (9000.0, -9000.0), box_px, right=False).picture.max() == 0


@pytest.mark.parametrize("hand", [tiny_hand_model(), load_hand_model(OPEN_HAND)], ids=["tiny", OPEN_HAND])
def test_the_hand_layer_poses_like_pytorchs(hand: HandModel, tmp_path: Path) -> None:
    path = tmp_path / "hand_model.npz"
    path.write_bytes(hand_model_npz(hand))
    assert path.read_bytes() == hand_model_npz(load_hand_model(path)), "equal models, equal bytes"
    turns = torch.linalg.qr(torch.randn(3, 16, 3, 3, generator=torch.Generator().manual_seed(0))).Q
    betas = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    wanted = ManoLayer(hand)(turns[:, :1], turns[:, 1:], betas)
    layer = HandLayer.load(path)
    found = layer(turns[:, :1].numpy(), turns[:, 1:].numpy(), betas.numpy())
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(layer.faces, hand.faces)


@pytest.mark.parametrize("right", [True, False])
def test_the_camera_in_the_photograph_is_that_of_the_crops(right: bool) -> None:
    photo = np.zeros((480, 640, 3), np.uint8)
    wanted = camera_in_photo([0.9, 0.02, -0.01], crops.crop(photo, (200, 300), 150, right), 640, 480)
    cut = handstill_numpy.crop(photo, (200, 300), 150, right)
    found = handstill_numpy.camera_in_photo(np.array([0.9, 0.02, -0.01]), cut, 640, 480)
    np.testing.assert_allclose(found[0], wanted[0])
    assert found[1] == wanted[1]


def test_it_imports_numpy_pillow_and_onnxruntime_only() -> None:
    tree = ast.parse(Path(handstill_numpy.__file__).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported - sys.stdlib_module_names == {"numpy", "PIL", "onnxruntime"}
