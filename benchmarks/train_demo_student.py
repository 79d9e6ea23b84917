"""Train a small student on synthesised hands from their labels alone, for other students to start from.

    python benchmarks/train_demo_student.py FOLDER [--backbone mobilenetv3_small_100] [--pictures 40000] [--steps 8000]
    python benchmarks/train_demo_student.py FOLDER --export models/assets/demo_student/mobilenetv3_small_100.safetensors

Elsewhere students start from ImageNet's weights, which cannot be downloaded here; from random ones a student needs
hundreds of thousands of pictures before it knows which way a hand points. Those are paid here once, on pictures of
their own, and no teacher has a part in it: strategies that start from the exported file (`students.NAME.weights`) start
alike.

Pictures, views and losses are those of `train_demo_teacher.py`, and FOLDER may be the same. What each place sees is
said by the map of stride 16, whose places are as many as those of the cached features. Stopped and started again it
goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor
from train_demo_teacher import (  # the script beside this one
    BATCH,
    KEYPOINTS_2D,
    OWN_FRAME_WEIGHT,
    RECIPE,
    TOKEN_LOSS_WEIGHT,
    Course,
    Places,
    TellingLearner,
    named_job,
    parser_of,
    parts_in_tokens,
    run,
    token_targets,
)

from models.hand_model import OPEN_HAND, load_hand_model
from models.student import Student, feature_shape, learnt
from storage.durable import write_bytes_atomic
from trainer.data import PICTURES
from trainer.job import TrainJob
from trainer.learner import Tensors, student_spec

STUDENT_RECIPE: dict[str, Any] = {
    "on": RECIPE["on"],
    "head": "light",
    "input_px": 128,
    "optimizer": "adamw",
    "lr": 2.0e-3,
    "weight_decay": 0.05,
    "warmup_steps": 200,
    "average": 0.998,
    "loss": RECIPE["loss"] | {"betas": 0.002},
    "validate_every": 250,
    "checkpoint_every": 250,
}
"""`loss.betas`: at the teacher's 0.0005 a student that knows little answers hands of two standard deviations."""
STRIDE = 16
PLACES = Places(rows=8, columns=8, side_px=32, left_px=0, top_px=0)
"""Of that stride, where the student looks at 128 of the crop's 256 pixels."""


class Learner(TellingLearner):
    """The student, whose map of stride 16 says what each of its places sees."""

    def losses(self, batch: Tensors, workers: int = 1) -> tuple[Tensor, Tensors, Tensors]:
        if not self.training:
            return super().losses(batch, workers)
        out = self(batch[PICTURES])
        seen = parts_in_tokens(batch["vertices_px"], self.part, PLACES)
        targets = token_targets(batch[KEYPOINTS_2D][..., :2], PLACES)
        return self.told(out, batch, out["features"], targets, seen)


def learner_of(job: TrainJob, _arguments: argparse.Namespace, _crops: Tensor) -> Learner:
    """The student, from random weights."""
    spec = student_spec(job.recipe)
    made = Learner(spec, job.recipe, load_hand_model(OPEN_HAND), feature_shape(spec, STRIDE)[0])
    made.at_stride = STRIDE
    return made


def job_of(arguments: argparse.Namespace) -> TrainJob:
    """The student's training."""
    keys = STUDENT_RECIPE | {"backbone": arguments.backbone}
    weights = [OWN_FRAME_WEIGHT, TOKEN_LOSS_WEIGHT]
    return named_job(f"demo-{arguments.backbone}", keys, BATCH, arguments, {"told": weights, "stride": STRIDE})


def export(student: Student, path: Path) -> None:
    """Write a student's weights for `students.NAME.weights`: matrices in float16, the rest as they are."""
    weights = {
        name: (value.half() if value.ndim > 1 else value).contiguous()
        for name, value in learnt(student.state_dict()).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, save(weights))


STUDENT = Course(job_of, learner_of, export)


def parsed(line: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, BATCH)
    parser.set_defaults(steps=8000)
    parser.add_argument("--backbone", default="mobilenetv3_small_100", help="a name of timm's")
    return parser.parse_args(line)


if __name__ == "__main__":
    run(parsed(), STUDENT)
