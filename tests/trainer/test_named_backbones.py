"""Every student that the paper and its code name, and newer ones: a step of the real loop, saved, loaded, the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.student import Student
from tests.models.test_named_backbones import NEWER, OF_ITS_CODE, PAPER
from tests.trainer.jobs import tiny_job
from trainer.job import Silent, TrainJob
from trainer.loop import train

HYBRID = {"outputs": 0.3, "features": 1.8}
TINY_VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}
TINY_HEAD = {"dim": 32, "depth": 1, "heads": 2, "dim_head": 16, "mlp_dim": 32}


class _Losses(Silent):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, step: int, metrics: Any) -> None:
        self.losses.append(metrics["loss"])


def one_step(folder: Path, **recipe: Any) -> tuple[TrainJob, Student]:
    """A job of one step on a cache of whole maps, and the student that it saved."""
    always = {"steps": 1, "validation_fraction": 0.0, "distill": HYBRID}
    job, log = tiny_job(folder, grid="full", **always | recipe), _Losses()
    result = train(job, log)
    assert len(log.losses) == 1
    return job, Student.load(result.student)


def answers_twice_the_same(student: Student, folder: Path) -> bool:
    student.save(folder)
    again, images = Student.load(folder), torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        return all(torch.equal(value, student(images)[name]) for name, value in again(images).items())


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [*PAPER, *OF_ITS_CODE, *(name for name in NEWER if name != "hamer")])
def test_a_student_of_every_backbone_trains_a_step(tmp_path: Path, backbone: str) -> None:
    job, student = one_step(tmp_path, backbone=backbone)
    torch.manual_seed(job.seed)
    before = Student(student.spec, student.hand_model)
    moved = {name for name, value in student.named_parameters() if not torch.equal(value, before.get_parameter(name))}
    for part in ("backbone", "mano_head"):  # not all of it: residual branches that start at zero pass nothing on
        assert sum(name.startswith(part) for name in moved) > sum(1 for _ in getattr(student, part).parameters()) / 2
    assert answers_twice_the_same(student, tmp_path / "again")


@pytest.mark.parametrize("alignment", ["paper", "geometric"])
def test_the_teachers_own_network_at_a_size_of_ones_own_is_a_student(tmp_path: Path, alignment: str) -> None:
    recipe: dict[str, Any] = {"backbone": "hamer", "vit": TINY_VIT, "decoder": TINY_HEAD}
    _, student = one_step(tmp_path, **recipe | {"distill": HYBRID | {"alignment": alignment}})
    assert student.spec.vit is not None
    assert student.spec.decoder is not None
    assert (student.spec.vit.model_dump(), student.spec.decoder.model_dump()) == (TINY_VIT, TINY_HEAD)
    assert student.feature_shape == (48, 16, 12)
    assert sum(parameter.numel() for parameter in student.parameters()) < 200_000
    assert answers_twice_the_same(student, tmp_path / "again")
