"""Where predictions come from: a student, the teacher's cached answers, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from models.hand_model import HandModel
from models.mano import ManoLayer
from models.preprocessing import normalise
from models.student import Student
from trainer.data import PICTURES, Batch
from trainer.losses import rotations
from trainer.scores import Hands

Predict = Callable[[Batch], Hands]
"""From the arrays of a batch (trainer.evaluate) to hands."""


def student_prediction(student: Student, device: torch.device) -> Predict:
    """What the student says of the pictures; float32."""

    def predict(batch: Batch) -> Hands:
        with torch.inference_mode():
            said = student(normalise(torch.from_numpy(batch[PICTURES]).to(device)))
        return Hands(*(said[k].float().cpu().numpy() for k in ("keypoints_3d", "vertices", "keypoints_2d")))

    return predict


def cached_teacher(hand_model: HandModel) -> Predict:
    """What the teacher said of the view, its mesh made from its parameters."""
    layer = ManoLayer(hand_model)

    def predict(batch: Batch) -> Hands:
        pose = [torch.from_numpy(batch[f"teacher/{name}"]) for name in ("global_orient", "hand_pose", "betas")]
        vertices, _ = layer(*pose)
        return Hands(batch["teacher/keypoints_3d"], vertices.numpy(), batch["teacher/keypoints_2d"])

    return predict


def mean_pose(hand_model: HandModel) -> Predict:
    """The same hand for every picture: mean pose, mean shape, no camera."""
    pose = rotations(torch.tensor(hand_model.hands_mean[None]))
    vertices, joints = ManoLayer(hand_model)(torch.eye(3)[None, None], pose, torch.zeros(1, 10))

    def predict(batch: Batch) -> Hands:
        size = len(batch["sample_id"])
        return Hands(np.repeat(joints.numpy(), size, 0), np.repeat(vertices.numpy(), size, 0))

    return predict
