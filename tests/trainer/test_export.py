"""Exports: PyTorch's hands without PyTorch, or nothing at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models import onnx_graph
from models.hand_box import HandBox
from models.handstill_numpy import Box, Hands
from models.mano_head import ManoHead
from models.onnx_graph import JOINTS_AND_MESH, PARAMETERS, write_onnx
from models.photo_hands import HandPredictor
from models.preprocessing import normalise
from models.student import Student, StudentSpec
from storage.durable import is_partial, sha256_file
from storage.errors import InputError, WorkError
from storage.snapshots import read_head
from tests.tiny_cache import write_tiny_cache
from tests.tiny_networks import tiny_hand_model, tiny_student
from trainer import export
from trainer.evaluate import EvaluationSet
from trainer.export import ExportJob, Int8, compare, export_student, procedural_pictures

FORBIDDEN = (
    "torch", "timm", "cv2", "smplx", "scipy", "safetensors", "onnx", "pydantic",
    "models", "storage", "stages", "trainer", "pipeline",
)  # fmt: skip
"""What a machine that only runs exports does not have."""


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained student's folder; not one whose head still answers the mean hand whatever it sees."""
    made = tiny_student()
    with torch.no_grad():
        for decoder in (made.mano_head.decpose, made.mano_head.decshape, made.mano_head.deccam):
            decoder.weight.normal_(0, 1.0, generator=torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("student") / "student"
    made.save(folder)
    return folder


@pytest.fixture(scope="module")
def exported(student: Path, tmp_path_factory: pytest.TempPathFactory) -> export.ExportResult:
    return export_student(ExportJob(student, tmp_path_factory.mktemp("exports") / "tiny", {}))


def test_the_export_gives_pytorchs_hands(exported: export.ExportResult, student: Path) -> None:
    pictures = procedural_pictures(6)
    with torch.inference_mode():
        wanted = Student.load(student)(normalise(torch.from_numpy(pictures)))
    found = Hands(exported.folder)(pictures)
    for name in ("keypoints_3d", "vertices"):
        distance_mm = np.linalg.norm(found[name] - wanted[name].numpy(), axis=-1) * 1000
        assert distance_mm.max() < 0.01
    assert np.ptp(wanted["keypoints_3d"].numpy(), axis=0).max() > 0.002, "hands that do not depend on the picture"
    assert exported.difference.joints_mm < 0.01
    assert exported.difference.batch_sizes == (1, 2, 5)


def test_all_that_an_export_needs_is_in_its_folder_but_for_the_hand(
    exported: export.ExportResult, student: Path
) -> None:
    document = json.loads((exported.folder / "export.json").read_text())
    files = {path.name: sha256_file(path) for path in exported.folder.iterdir() if path.name != "export.json"}
    assert document["files"] == files
    assert set(files) == {
        "README.md", "handstill_numpy.py", "model.onnx", "preprocessing.json", "student.json", "weights.safetensors",
    }  # fmt: skip
    assert exported.hand_model == exported.folder.with_name("tiny.hand_model.npz")
    weights = load_file(exported.folder / "weights.safetensors")
    assert weights.keys() == {name for name in Student.load(student).state_dict() if not name.startswith("mano.")}
    card = (exported.folder / "README.md").read_text()
    assert "MANO licence" in card, "a hand model that is not the open one may be MANO"
    assert [output.name for output in onnx.load(exported.folder / "model.onnx").graph.output] == list(PARAMETERS)


def test_the_same_student_gives_the_same_bytes(exported: export.ExportResult, student: Path, tmp_path: Path) -> None:
    again = export_student(ExportJob(student, tmp_path / "again", {})).folder
    names = sorted(path.name for path in again.iterdir())
    assert names == sorted(path.name for path in exported.folder.iterdir())
    assert [name for name in names if (again / name).read_bytes() != (exported.folder / name).read_bytes()] == []


def test_a_student_of_a_smaller_picture_takes_whole_crops(tmp_path: Path) -> None:
    made = Student(StudentSpec(backbone="mobilenetv3_small_050", head="light", input_px=128), tiny_hand_model())
    with torch.no_grad():
        made.mano_head.decpose.weight.normal_(0, 1.0, generator=torch.Generator().manual_seed(1))
    made.save(tmp_path / "student")
    result = export_student(ExportJob(tmp_path / "student", tmp_path / "small", {}))
    assert result.difference.joints_mm < 0.01
    graph = onnx.load(result.folder / "model.onnx").graph
    assert [side.dim_value for side in graph.input[0].type.tensor_type.shape.dim][1:] == [3, 256, 256]


def test_the_hand_model_may_be_inside(student: Path, tmp_path: Path) -> None:
    result = export_student(ExportJob(student, tmp_path / "inside", {}, with_hand_model=True))
    names = [output.name for output in onnx.load(result.folder / result.network).graph.output]
    assert names == [*PARAMETERS, *JOINTS_AND_MESH]
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert Student.load(result.folder).spec == Student.load(student).spec, "it is a student's folder as well"
    assert compare(result.folder, Student.load(student), procedural_pictures(4)).small


def test_weights_too_large_for_one_file_stand_in_a_second(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "EXTERNAL_FROM_BYTES", 0)
    result = export_student(ExportJob(student, tmp_path / "large", {}))
    sizes = [(result.folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data")]
    assert sum(sizes) == result.bytes
    assert sizes[1] > 4 * 10_000
    assert result.difference.small
    seen = (EvaluationSet("tiny", tmp_path, ""),)
    with pytest.raises(InputError, match=r"above 1\.5 GB"):
        export_student(ExportJob(student, tmp_path / "small", {}, int8=Int8(seen, seen)))


def test_left_and_right_are_mirror_pictures(exported: export.ExportResult) -> None:
    photo = procedural_pictures(1)[0]
    hands = Hands(exported.folder)
    (right,) = hands.in_photo(photo, [Box(60, 70, 100, 130, right=True)])
    (left,) = hands.in_photo(np.ascontiguousarray(photo[:, ::-1]), [Box(95, 70, 100, 130, right=False)])
    np.testing.assert_array_equal(left.cut.picture, right.cut.picture)
    np.testing.assert_allclose(left.vertices * [-1, 1, 1], right.vertices)
    np.testing.assert_allclose([255, 0] + left.keypoints_2d * [-1, 1], right.keypoints_2d, atol=1e-4)
    np.testing.assert_array_equal(left.faces, right.faces[:, ::-1])


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((10, 10, 0, 0), "no room for a hand"),
        ((92, 190, -55, -85), "no room for a hand"),
        ((5000, 5000, 55, 85), "outside the photograph of 256 x 256 px"),
        ((10, 10, 5000, 85), "too large"),
        ((10, float("nan"), 55, 85), "not finite"),
    ],
)
def test_a_box_that_cuts_out_no_hand_is_refused(
    exported: export.ExportResult, numbers: tuple[float, float, float, float], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Hands(exported.folder).in_photo(procedural_pictures(1)[0], [Box(*numbers, right=True)])


def test_the_hand_model_is_found_from_within_the_folder_and_missed_with_its_places(
    exported: export.ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo, box = procedural_pictures(1)[0], Box(60, 70, 100, 130, right=True)
    monkeypatch.chdir(exported.folder)
    (hand,) = Hands(".").in_photo(photo, [box])
    assert hand.vertices.shape[1] == 3
    shutil.copytree(exported.folder, tmp_path / "alone")
    with pytest.raises(FileNotFoundError, match=r"alone/hand_model\.npz or .*alone\.hand_model\.npz"):
        Hands(tmp_path / "alone").in_photo(photo, [box])


def test_what_is_no_export_no_box_and_no_picture_is_said(exported: export.ExportResult, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="want the folder that `handstill export` wrote"):
        Hands(tmp_path)
    hands, box = Hands(exported.folder), Box(60, 70, 100, 130, right=True)
    with pytest.raises(TypeError, match=r"want Box\(x, y, width, height, right\)"):
        hands.in_photo(procedural_pictures(1)[0], [(60, 70, 100, 130, True)])  # type: ignore[list-item]
    (tmp_path / "notes.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"notes\.jpg: cannot be read as a picture"):
        hands.in_photo(tmp_path / "notes.jpg", [box])
    with pytest.raises(FileNotFoundError):
        hands.in_photo(tmp_path / "nothing.jpg", [box])


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("size", [(160, 120), (90, 140)], ids=["wide", "high"])
def test_hands_in_photographs_are_those_that_predict_gives(
    exported: export.ExportResult, student: Path, size: tuple[int, int], right: bool
) -> None:
    photo = np.concatenate([procedural_pictures(1)[0]] * 2, axis=1)
    width, height = size
    box, ours = HandBox(300, 70, width, height, right), Box(300, 70, width, height, right)
    network = Student.load(student)
    (wanted,) = HandPredictor(network, network.hand_model, sees_inner_columns=True)(photo, [box])
    (found,) = Hands(exported.folder).in_photo(photo, [ours])
    assert found.cut.box_px == wanted.square_px[2]
    np.testing.assert_allclose(found.keypoints_2d, wanted.joints_2d_px, atol=0.01)
    np.testing.assert_allclose(found.keypoints_3d + found.translation, wanted.joints_3d_m, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.vertices + found.translation, wanted.vertices_m, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.faces, wanted.faces)
    assert found.focal_px == wanted.focal_px


SCRIPT = """
    import sys
    from importlib.abc import MetaPathFinder

    class Absent(MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {forbidden!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

    sys.meta_path.insert(0, Absent())
    sys.path.insert(0, {export!r})
    import numpy as np
    from handstill_numpy import Box, Hands

    found = Hands({export!r}, {hand!r})(np.load({pictures!r}))
    np.savez({answers!r}, **found)
    photo = np.load({pictures!r})[0]
    from PIL import Image
    Image.fromarray(photo).save({photo!r})
    (hand,) = Hands({export!r}, {hand!r}).in_photo({photo!r}, [Box(60, 70, 100, 130, right=False)])
    assert hand.vertices.shape[1] == 3 and np.isfinite(hand.vertices).all()
"""


def run_without_us(python: str, exported: export.ExportResult, student: Path, folder: Path) -> None:
    """Run an export in another process that has none of `FORBIDDEN`, and compare its hands with PyTorch's."""
    pictures = procedural_pictures(3)
    np.save(folder / "pictures.npy", pictures)
    script = textwrap.dedent(SCRIPT).format(
        forbidden=FORBIDDEN,
        export=str(exported.folder),
        hand=str(exported.hand_model),
        pictures=str(folder / "pictures.npy"),
        photo=str(folder / "photo.png"),
        answers=str(folder / "answers.npz"),
    )
    done = subprocess.run([python, "-I", "-c", script], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        wanted = Student.load(student)(normalise(torch.from_numpy(pictures)))
    with np.load(folder / "answers.npz") as found:
        for name in ("keypoints_3d", "vertices"):
            assert np.linalg.norm(found[name] - wanted[name].numpy(), axis=-1).max() * 1000 < 0.01


def test_it_runs_without_us(exported: export.ExportResult, student: Path, tmp_path: Path) -> None:
    run_without_us(sys.executable, exported, student, tmp_path)


@pytest.mark.slow
def test_it_runs_in_a_fresh_environment(exported: export.ExportResult, student: Path, tmp_path: Path) -> None:
    """Needs the package index."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "onnxruntime", "numpy", "pillow"]
    subprocess.run([python, *install], check=True)
    run_without_us(python, exported, student, tmp_path)


def test_nothing_is_published_when_the_graph_answers_otherwise(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slightly_other(backbone: nn.Module, head: ManoHead, mano: nn.Module | None, path: Path) -> None:
        other = Student.load(student)
        with torch.no_grad():
            other.mano_head.decshape.bias += 0.05
        write_onnx(other.backbone, other.mano_head, None, path)

    monkeypatch.setattr(export, "write_onnx", slightly_other)
    with pytest.raises(WorkError, match=r"joints differ by .* mm.*0\.01 is allowed.*Nothing was published"):
        export_student(ExportJob(student, tmp_path / "wrong", {}))
    assert list(tmp_path.iterdir()) == []


class FixedBatch(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images[..., ::32, ::32].reshape(len(images), 3, 8, 8)


def test_a_network_of_one_batch_size_is_refused(tmp_path: Path) -> None:
    head = tiny_student().mano_head
    with pytest.raises(WorkError, match=r"batches of 2 only|cannot write"):
        write_onnx(nn.Sequential(FixedBatch(), nn.Conv2d(3, 24, 1)), head, None, tmp_path / "model.onnx")


def test_int8_says_what_it_costs(student: Path, tmp_path: Path) -> None:
    cache = write_tiny_cache(tmp_path / "caches")
    ((dataset, digest),) = read_head(cache).items()
    seen = (EvaluationSet(dataset, cache, digest),)
    job = ExportJob(student, tmp_path / "small", {}, int8=Int8(seen, seen, pictures=8), check_on=seen[0])
    result = export_student(job)
    assert result.network == "model.int8.onnx"
    assert not (result.folder / "model.onnx").exists()
    quantised = {node.name for node in onnx.load(result.folder / result.network).graph.node if "Quant" in node.op_type}
    assert quantised
    assert not {name for name in quantised if name.startswith("hand/")}
    assert 0 < result.int8["joints_aligned_mm"] <= result.int8["joints_mean_mm"] <= result.int8["joints_p95_mm"] < 50
    assert f"| {result.int8['joints_mean_mm']:.3f} |" in (result.folder / "README.md").read_text()
    assert result.difference.joints_mm < 0.01, "of the float graph"
    assert not [path for path in tmp_path.iterdir() if is_partial(path)]


def test_a_folder_that_is_there_is_left_alone(student: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        export_student(ExportJob(student, tmp_path / "taken", {}))
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "mine.txt"]
