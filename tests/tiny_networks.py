"""Small hands and networks with the real shapes, made from seeds in milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from models.hand_model import HandModel, hand_model_from_arrays, save_hand_model
from models.sizes import DecoderSizes, VitSizes
from models.student import Student, StudentSpec, export_hamer_checkpoint

PARENTS = [-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14]
TINY_HAMER = StudentSpec(
    backbone="hamer",
    vit=VitSizes(embed_dim=24, depth=2, num_heads=3),
    decoder=DecoderSizes(dim=16, depth=1, heads=2, dim_head=8, mlp_dim=16),
)


def tiny_hand_model(vertices: int = 750, seed: int = 0) -> HandModel:
    """A cloud of points, 0.2 m across, skinned at random: MANO's layout without its looks."""
    draw = np.random.default_rng(seed)
    weights, regressor = draw.random((vertices, 16)), draw.random((16, vertices))
    arrays = {
        "v_template": draw.normal(0, 0.05, (vertices, 3)),
        "shapedirs": draw.normal(0, 0.002, (vertices, 3, 10)),
        "posedirs": draw.normal(0, 0.0005, (vertices, 3, 135)),
        "j_regressor": regressor / regressor.sum(1, keepdims=True),
        "parents": PARENTS,
        "weights": weights / weights.sum(1, keepdims=True),
        "faces": draw.integers(0, vertices, (100, 3)),
        "hands_mean": draw.normal(0, 0.2, 45),
        "hands_components": np.eye(45),
    }
    return hand_model_from_arrays(arrays, what="tiny hand")


def tiny_student(seed: int = 0) -> Student:
    torch.manual_seed(seed)
    return Student(TINY_HAMER, tiny_hand_model())


def write_tiny_teacher(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """A checkpoint in the official layout and its hand model: what load_teacher takes."""
    student = tiny_student(seed)
    export_hamer_checkpoint(student, folder)
    save_hand_model(student.hand_model, folder / "hand.safetensors")
    return folder / "checkpoints" / "hamer.ckpt", folder / "hand.safetensors"
