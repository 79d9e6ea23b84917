"""The teacher in the package loads as any teacher does, and knows more than the mean about hands it never saw."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import models
from models.crops import STUDENT_BOX, crop
from models.hand_model import load_hand_model
from models.preprocessing import normalise
from models.teacher import load_teacher
from stages.skinning import pose_hand, rotation_matrices
from stages.synthesise import draw_pictures
from trainer.metrics import mpjpe_mm, pa_mpjpe_mm

CHECKPOINT = Path(models.__file__).parent / "assets" / "demo_teacher" / "checkpoints" / "hamer.ckpt"


def test_the_demo_s_teacher_sees_where_the_hand_points_and_how_its_fingers_are_bent() -> None:
    seen, true = [], []
    for picture in draw_pictures(load_hand_model("open-hand"), 3000, range(96)):
        image = np.asarray(Image.open(io.BytesIO(picture.jpeg)))
        seen.append(crop(image, picture.center, STUDENT_BOX.side_px(picture.box_px / 200), picture.right).picture)
        true.append((picture.keypoints_3d - picture.keypoints_3d[0]) * [1 if picture.right else -1, 1, 1])
    teacher = load_teacher(CHECKPOINT, mano_model="open-hand")
    with torch.no_grad():
        out = teacher(normalise(torch.from_numpy(np.stack(seen))))
    joints, truth = out["keypoints_3d"].numpy().astype(np.float64), np.stack(true)
    mean = np.tile(truth.mean(axis=0), (len(truth), 1, 1))
    assert out["features"].shape == (96, 192, 16, 12)
    assert mpjpe_mm(joints - joints[:, :1], truth).mean() < 0.4 * mpjpe_mm(mean, truth).mean()
    mean_pose = np.tile(mean_pose_joints(), (len(truth), 1, 1))
    wanted = 0.75 * pa_mpjpe_mm(mean_pose, truth, reflection=False).mean()
    assert pa_mpjpe_mm(joints, truth, reflection=False).mean() < wanted


def mean_pose_joints() -> np.ndarray:
    hand = load_hand_model("open-hand")
    pose = rotation_matrices(np.concatenate([np.zeros(3), hand.hands_mean]).reshape(16, 3))
    return pose_hand(hand, pose, np.zeros(10))[1]


def test_it_is_small_enough_for_the_package() -> None:
    assert CHECKPOINT.stat().st_size < 16e6
