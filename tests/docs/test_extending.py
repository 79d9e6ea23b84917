"""docs/extending.md: each worked example, executed as it stands there, does what the page says."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from models.student import Student, StudentSpec
from pipeline.loading import parse_config
from stages.config import HamerTarDataset
from stages.ingest import scan_source
from storage.reading import open_cache
from tests.docs.pages import blocks
from tests.tiny_cache import write_tiny_cache
from tests.tiny_experiment import CONFIG
from tests.tiny_networks import tiny_hand_model
from trainer.config import StudentRecipe
from trainer.learner import keys_for, student_spec

PAGE, ROOT = "docs/extending.md", Path(__file__).parents[2]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of the reader's own, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("readers_own")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def run(module: types.ModuleType, name: str) -> None:
    (block,) = blocks("python", PAGE, name)
    exec(compile(block.text, f"{PAGE}, {name}", "exec"), module.__dict__)


def configured(name: str) -> Any:
    """The page's lines laid over a configuration that is whole, and read as pipeline.yaml is."""
    (block,) = blocks("yaml", PAGE, name)
    document = copy.deepcopy(CONFIG)
    for section, keys in yaml.safe_load(block.text).items():
        document[section] = {**document[section], **keys}
    return parse_config(document, PAGE)


def test_a_backbone_of_timm() -> None:
    config = configured("backbone")
    for name in ("fast", "small-hamer"):
        section = config.students[name]
        spec = StudentSpec(backbone=section.backbone, head=section.head, vit=section.vit)
        with torch.no_grad():
            answers = Student(spec, tiny_hand_model()).eval()(torch.zeros(1, 3, 256, 256))
        assert answers["keypoints_3d"].shape == (1, 21, 3)


def test_a_backbone_of_ones_own(example: types.ModuleType) -> None:
    run(example, "backbone")
    student = Student(StudentSpec(backbone="strided", head="light"), tiny_hand_model())
    assert student.feature_shape == (64, 16, 16)
    student(torch.rand(2, 3, 256, 256))["keypoints_3d"].sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in student.backbone.parameters())


def test_a_backbone_of_a_package(tmp_path: Path) -> None:
    """As pip installs it: the module, and its entry point beside it."""
    (module,) = blocks("python", PAGE, "backbone")
    (tmp_path / "my_networks.py").write_text(module.text)
    about = tmp_path / "my_networks-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-networks\nVersion: 1.0\n")
    (declared,) = [block.text for block in blocks("toml", PAGE)]
    table, _, line = declared.partition("\n")
    assert table == '[project.entry-points."handstill.backbones"]'
    name, value, *_ = line.replace('"', "").split("=")
    (about / "entry_points.txt").write_text(
        f"[handstill.backbones]\n{name}={value.partition('#')[0]}\nbroken = no_such\n"
    )
    program = (
        "from models.backbone_names import may_be_known\nfrom models.backbones import timm_feature_shape\n"
        "assert may_be_known('strided') and not may_be_known('stridden')\n"
        "print(timm_feature_shape('strided'))\ntimm_feature_shape('broken')"
    )
    ways = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": ways},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "(64, 16, 16)\n"
    assert (
        "backbone 'broken': its entry point no_such does not load: ModuleNotFoundError: No module named 'no_such'"
        in done.stderr
    )


def test_a_teacher(example: types.ModuleType, tmp_path: Path) -> None:
    run(example, "teacher")
    answers = example.teacher(torch.zeros(1, 3, 256, 256))
    assert {name: tuple(value.shape[1:]) for name, value in answers.items() if name not in ("vertices", "cam_t")} == {
        "features": (24, 16, 12),
        "cam": (3,),
        "global_orient": (1, 3, 3),
        "hand_pose": (15, 3, 3),
        "betas": (10,),
        "keypoints_3d": (21, 3),
        "keypoints_2d": (21, 2),
    }
    assert (tmp_path / configured("teacher").teacher.checkpoint).is_file()


def test_a_data_set(example: types.ModuleType, tmp_path: Path) -> None:
    run(example, "dataset")
    config = configured("dataset").datasets["mine"]
    assert isinstance(config, HamerTarDataset)
    rows = scan_source("mine", config, tmp_path / str(config.path), tmp_path).to_pylist()
    assert [(row["sample_id"], row["reason"], row["width"]) for row in rows] == [("mine:000#0", None, 320)]


def test_a_loss(example: types.ModuleType, tmp_path: Path) -> None:
    run(example, "loss")
    recipe = StudentRecipe.model_validate({"on": ["tiny"], "backbone": "test_efficientnet", "head": "light"})
    reader = open_cache(write_tiny_cache(tmp_path, n=2))
    arrays = reader.read(range(2), [0, 1], keys_for(recipe.distill), decoded=False)
    batch = {name: torch.from_numpy(values) for name, values in arrays.items() if name != "sample_id"}
    torch.manual_seed(0)
    student = Student(student_spec(recipe), tiny_hand_model())
    ours = example.WithBones(student, recipe, "8x8-paper", teacher_dim=32).eval()
    total, parts, _ = ours.losses(batch)
    plain, _, _ = super(example.WithBones, ours).losses(batch)
    torch.testing.assert_close(total, plain + 0.1 * parts["label/bones"])
    assert parts["label/bones"] > 0
    total.backward()
    truth = batch["labels/keypoints_3d"]
    assert float(example.bone_lengths(truth[..., :3], truth).abs().max()) == 0
