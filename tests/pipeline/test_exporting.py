"""`handstill export`: the student that is meant, with what is known about it, in a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from models.handstill_numpy import Hands
from models.preprocessing import normalise
from models.student import Student
from pipeline.exporting import choose, export_text
from tests.pipeline.commands import as_json, handstill
from tests.pipeline.lab import Lab, tree
from trainer import export
from trainer.export import procedural_pictures


def state(folder: Path, seed: int, trained_at: int) -> Any:
    """A trained seed."""
    path = folder / f"seed-{seed}" / "result.json"
    path.parent.mkdir()
    path.touch()
    os.utime(path, (trained_at, trained_at))
    return SimpleNamespace(label=f"s-seed{seed}", seed=seed, folder=path.parent)


def scored(value: float) -> Any:
    return SimpleNamespace(metrics={"val": {"pa_mpjpe_mm": value}, "other": {"pa_mpjpe_mm": -value}})


def test_the_best_seed_is_taken_and_without_all_scores_the_newest(tmp_path: Path) -> None:
    states = [state(tmp_path, 0, 300), state(tmp_path, 1, 400), state(tmp_path, 2, 200)]
    scores = {"s-seed0": scored(8.0), "s-seed1": scored(9.0), "s-seed2": scored(7.5)}
    assert choose(states, scores).seed == 2
    del scores["s-seed1"]
    assert choose(states, scores).seed == 1
    assert choose(states, {}).seed == 1


def test_a_student_by_its_name_goes_from_caches_to_an_int8_network(lab: Lab) -> None:
    before = tree(lab.workdir)
    document = as_json(lab.config, "export", "plain", "--int8")
    folder = Path(document["folder"])
    assert folder.parent == lab.workdir / "exports"
    assert tree(lab.workdir).items() >= before.items(), "nothing else is touched"
    assert (document["student"], document["seed"], document["network"]) == ("plain", 0, "model.int8.onnx")
    assert document["difference_from_pytorch"]["joints_mm"] < 0.01
    assert document["int8"]["joints_mean_mm"] > 0
    assert {"val: PA-MPJPE, float", "val: PA-MPJPE, int8"} < document["int8"].keys()
    shown = as_json(lab.config, "show", str(folder))["content"]["provenance"]
    assert shown["data_sets"] == {"alpha": None}
    assert shown["teacher"] == {"teacher/checkpoints/hamer.ckpt": None}
    assert shown["metrics"].keys() == shown["teacher_metrics"].keys() == {"val"}
    card = (folder / "README.md").read_text()
    for said in ("CC0 1.0: handstill's open hand", "data set alpha", "not stated", "val | pa_mpjpe_mm", "batch_size"):
        assert said in card
    assert "| student | teacher | mean pose |" in card
    gain = 1 - shown["metrics"]["val"]["pa_mpjpe_mm"] / shown["mean_pose_metrics"]["val"]["pa_mpjpe_mm"]
    assert ("Trained too little to be of use: on val " in card) is (gain < 0.3)
    assert "rendered hands only" not in card
    assert str(lab.folder) not in card + (folder / "export.json").read_text(), "a place on this machine"
    again = handstill("export", "plain", "--int8", "-c", lab.config)
    assert (again.code, "is there already" in again.err) == (2, True)
    assert as_json(lab.config, "clean", "--stale")["stale"] == {}


def test_int8_is_not_told_with_the_float_graphs_difference() -> None:
    document = {
        "folder": "f", "network": "n", "bytes": 1, "hand_model": "h", "int8": {"joints_mean_mm": 0.1},
        "difference_from_pytorch": {"joints_mm": 1e-5, "vertices_mm": 1e-5, "pictures": 8},
    }  # fmt: skip
    text = export_text(document)
    assert "float graph against PyTorch: joints within 1e-05 mm" in text
    assert "what was written is its int8 form, which costs, in mm:\n  joints_mean_mm: 0.100" in text
    assert "\nagainst PyTorch: joints within" in export_text(document | {"int8": None})


def test_a_student_by_its_folder_needs_no_configuration(lab: Lab, tmp_path: Path) -> None:
    (student,) = lab.workdir.glob("students/plain/seed-0/*/student")
    answer = handstill("export", student, "--to", tmp_path / "mine", "-c", "nowhere.yaml")
    assert answer.code == 0, answer.err
    assert "joints within" in answer.out
    pictures = procedural_pictures(2)
    with torch.inference_mode():
        wanted = Student.load(student)(normalise(torch.from_numpy(pictures)))["vertices"].numpy()
    assert np.abs(Hands(tmp_path / "mine")(pictures)["vertices"] - wanted).max() < 1e-5
    known = json.loads((tmp_path / "mine" / "export.json").read_text())["provenance"]
    assert (known["student"]["name"], known["training"]["steps"]) == ("plain", 1)


def test_an_export_that_answers_otherwise_fails_and_leaves_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE_MM", 0.0)
    before = tree(lab.workdir)
    answer = handstill("export", "plain", "-c", lab.config, "--json")
    assert answer.code == 1
    assert "does not give PyTorch's hands" in answer.document["error"]
    assert tree(lab.workdir) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plane"], "did you mean 'plain'"),
        (["plain", "--seed", "7"], "not trained as the file describes it now (seeds: 0)"),
        (["STUDENT"], "give --to FOLDER"),
        (["STUDENT", "--to", "x", "--seed", "0"], "--seed is for students named in the file"),
        (["tars", "--to", "x"], "no student"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_exported(lab: Lab, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.folder)
    (student,) = lab.workdir.glob("students/plain/seed-0/*/student")
    answer = handstill("export", *(str(student) if word == "STUDENT" else word for word in arguments))
    assert answer.code == 2
    assert said in answer.err
    assert not (lab.folder / "x").exists()


def test_a_student_that_changed_since_is_not_exported_by_its_name(lab: Lab) -> None:
    lab.configure({"students.plain.lr": 0.5})
    answer = handstill("export", "plain", "-c", lab.config)
    assert answer.code == 2
    (older,) = lab.workdir.glob("students/plain/seed-0/*/student")
    assert str(older) in answer.err
    shutil.copytree(older.parents[1], older.parents[2] / "seed-1")
    answer = handstill("export", "plain", "--seed", "0", "-c", lab.config)
    assert str(older) in answer.err, "of the seed that was asked for"
