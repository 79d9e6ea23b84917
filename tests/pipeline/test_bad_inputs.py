"""Inputs that cannot be used, met through the command line: exit 2 and one screen that says what and where."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipeline.commands import Answer, handstill
from tests.pipeline.lab import NO_WORK, Lab
from tests.tiny_experiment import tar_path

LINES_OF_A_SCREEN = 24


def refused(answer: Answer, *words: str) -> None:
    assert answer.code == 2, answer.err
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert len(answer.err.splitlines()) <= LINES_OF_A_SCREEN
    for word in words:
        assert word in answer.err


def edit_checkpoint(lab: Lab, edit: Any) -> Path:
    path = lab.folder / "teacher/checkpoints/hamer.ckpt"
    document = torch.load(path, weights_only=True)
    edit(document["state_dict"])
    torch.save(document, path)
    return path


@pytest.mark.parametrize("verb", ["check", "plan", "run"])
def test_a_checkpoint_of_another_digest(lab: Lab, verb: str) -> None:
    lab.configure({"teacher.checkpoint_sha256": "0" * 64})
    refused(handstill(verb, "-c", lab.config), "teacher.checkpoint_sha256", "0" * 64, "hamer.ckpt")


@pytest.mark.parametrize("verb", ["check", "plan", "run"])
def test_everything_that_is_missing_is_told_at_once(lab: Lab, verb: str) -> None:
    lab.configure(
        {
            "teacher.checkpoint": "teacher/nowhere.ckpt",
            "datasets.alpha.path": "tars/alpha-{000000..000005}.tar",
            "students.hybrid.weights": "weights.safetensors",
        }
    )
    refused(
        handstill(verb, "-c", lab.config),
        "teacher.checkpoint: no file",
        "nowhere.ckpt",
        "datasets.alpha",
        "alpha-000002.tar",
        "students.hybrid.weights",
    )


def test_a_missing_model_config(lab: Lab) -> None:
    (lab.folder / "teacher/model_config.yaml").unlink()
    refused(handstill("run", "-c", lab.config), "model_config.yaml")


@pytest.mark.parametrize("text", ["just words", "MODEL: {}", "MODEL: [", ""])
def test_a_model_config_of_something_else(lab: Lab, text: str) -> None:
    (lab.folder / "teacher/model_config.yaml").write_text(text)
    refused(handstill("run", "-c", lab.config), "model_config.yaml")


def test_a_misspelt_backbone_stops_before_the_teacher_runs(lab: Lab) -> None:
    lab.configure({"students.plain.backbone": "mobilnetv3_small_050", "cache.views": 3})
    refused(handstill("run", "-c", lab.config), "students.plain.backbone", "mobilenetv3_small_050")
    lab.configure({"students.plain.backbone": "mobilenetv3_small_050", "cache.views": 2})
    assert lab.run() == NO_WORK


@pytest.mark.parametrize("bytes_left", [700, 512, 5000])
def test_a_truncated_tar(lab: Lab, bytes_left: int) -> None:
    tar = tar_path(lab.folder, "beta")
    with tar.open("r+b") as handle:
        handle.truncate(bytes_left)
    refused(handstill("run", "-c", lab.config), str(tar))


def test_a_tar_that_is_none(lab: Lab) -> None:
    tar_path(lab.folder, "beta").write_bytes(b"no tar at all" * 100)
    refused(handstill("run", "-c", lab.config), "beta-000000.tar")


def test_a_checkpoint_without_a_tensor(lab: Lab) -> None:
    name = "backbone.blocks.1.attn.qkv.weight"
    edit_checkpoint(lab, lambda state: state.pop(name))
    refused(handstill("run", "-c", lab.config), name)


def test_a_checkpoint_with_a_tensor_of_another_shape(lab: Lab) -> None:
    name = "mano_head.deccam.weight"
    edit_checkpoint(lab, lambda state: state.update({name: state[name][:, :-1]}))
    refused(handstill("run", "-c", lab.config), name, "(3, 16)")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 neither"])
def test_a_checkpoint_that_is_none(lab: Lab, content: bytes) -> None:
    (lab.folder / "teacher/checkpoints/hamer.ckpt").write_bytes(content)
    refused(handstill("run", "-c", lab.config), "hamer.ckpt")


def test_a_hand_model_that_is_none(lab: Lab) -> None:
    (lab.folder / "hand.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    lab.configure({"teacher.mano_model": "hand.pkl"})
    refused(handstill("run", "-c", lab.config), "hand.pkl", "system")


def test_a_workdir_that_cannot_be_written_to(lab: Lab) -> None:
    shutil.rmtree(lab.workdir)
    lab.workdir.write_text("a file")
    answer = handstill("run", "-c", lab.config)
    refused(answer, "work")
