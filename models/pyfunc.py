"""A student as MLflow's pyfunc flavour loads and calls it: float32 crops in, a mapping of numpy arrays out.

MLflow calls `_load_pyfunc` with the folder that `Student.save` wrote; this module imports nothing of MLflow.

    B crops, V vertices of the hand model
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.hand_model import load_hand_model
from models.sizes import IMAGE_SIZE
from models.student import HAND_FILE, Student
from storage.errors import InputError

INPUT_SHAPE = (-1, 3, IMAGE_SIZE, IMAGE_SIZE)
"""Normalised RGB crops (models.preprocessing)."""


def answer_shapes(student: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each answer of the student in a folder, -1 for B, all float32. Its features are not among them."""
    vertices = load_hand_model(student / HAND_FILE).n_vertices
    return {
        "keypoints_3d": (-1, 21, 3),
        "vertices": (-1, vertices, 3),
        "keypoints_2d": (-1, 21, 2),
        "cam": (-1, 3),
        "cam_t": (-1, 3),
        "global_orient": (-1, 1, 3, 3),
        "hand_pose": (-1, 15, 3, 3),
        "betas": (-1, 10),
    }


class StudentModel:
    """What MLflow calls: a student on the GPU if there is one."""

    def __init__(self, student: Student) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._student = student.to(self._device).eval()

    def predict(
        self, images: NDArray[np.float32], params: dict[str, Any] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """(B,3,256,256) normalised crops to `answer_shapes`; `params` is MLflow's, and there are none."""
        if params:
            raise InputError(f"found parameters {', '.join(params)}; a student has none. Leave them out.")
        wanted = INPUT_SHAPE[1:]
        if images.ndim != 4 or images.shape[1:] != wanted:
            raise InputError(f"found images of shape {images.shape}, want (B, {', '.join(map(str, wanted))})")
        with torch.inference_mode():
            answers = self._student(torch.from_numpy(np.ascontiguousarray(images, np.float32)).to(self._device))
        return {name: value.cpu().numpy() for name, value in answers.items() if name != "features"}


def _load_pyfunc(path: str) -> StudentModel:
    """MLflow's entry point: the student in the folder `path`."""
    return StudentModel(Student.load(path))
