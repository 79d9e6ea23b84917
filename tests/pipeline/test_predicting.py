"""`handstill predict`: what goes in, what comes out, what is told, how it ends; and the same from Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from models.hand_box import HandBox
from models.hand_model import OPEN_HAND, load_hand_model, save_hand_model
from models.student import Student, export_hamer_checkpoint
from pipeline import predicting
from pipeline.predicting import load_predictor
from storage.errors import InputError
from tests.pipeline.commands import handstill
from tests.pipeline.lab import Lab, tree
from tests.tiny_networks import TINY_HAMER

BOX = "60,40,80,100,left"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's folder; beside it the same network as a checkpoint of HaMeR's without a hand model."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    student = Student(TINY_HAMER, load_hand_model(OPEN_HAND))
    with torch.no_grad():
        student.mano_head.deccam.bias.copy_(torch.tensor([3.0, 0.0, 0.0]))
    student.save(folder / "student")
    export_hamer_checkpoint(student, folder / "teacher", torch.float32)
    save_hand_model(student.hand_model, folder / "hand.safetensors")
    return folder / "student"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two pictures of noise in a folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, name in enumerate(("a.jpg", "b.png")):
        noise = np.random.default_rng(seed).integers(0, 256, (15, 20, 3), np.uint8)
        Image.fromarray(noise).resize((320, 240)).save(folder / name)
    return folder


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> list[HandBox]:
    """A detector that finds the hands in the list, in pictures that are not black."""
    found: list[HandBox] = []

    def load(source: Path | None) -> Callable[..., list[HandBox]]:
        def detect(picture: NDArray[np.uint8], *, thorough: bool = True) -> list[HandBox]:
            return list(found) if picture.any() else []

        return detect

    monkeypatch.setattr(predicting, "load_hand_detector", load)
    return found


@pytest.fixture
def no_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def predict(*arguments: str | Path, code: int = 0) -> Any:
    """The document of a call that ends so."""
    answer = handstill("predict", *arguments, "--json")
    assert answer.code == code, answer.err
    return answer.document


def test_a_picture_with_boxes(student: Path, photos: Path, tmp_path: Path, no_detector: None) -> None:
    boxes = ("--box", BOX, "--box", "200,50,60,60")
    document = predict(photos / "a.jpg", "--network", student, *boxes, "--out", tmp_path / "out")
    (result,) = document["inputs"]
    assert (document["ok"], document["hands_from"], result["status"]) == (True, "boxes", "done")
    folder = tmp_path / "out/a.jpg.hands"
    assert result["folder"] == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "hand-0-left.obj",
        "hand-1-right.obj",
        "hands.json",
        "overlay.jpg",
    ]
    written = json.loads((folder / "hands.json").read_text())
    assert written["hands"] == result["hands"]
    assert (written["width_px"], written["height_px"], written["network"]) == (320, 240, str(student))
    assert {"camera", "photo_px", "joints", "mano", "mesh_files"} <= written["conventions"].keys()
    assert [hand["side_from"] for hand in written["hands"]] == ["given", "assumed"]
    for hand in written["hands"]:
        assert np.isfinite(hand["joints_3d_m"]).all()
        assert hand["disagreement_px"] < 0.01 * hand["square"][2]


def test_the_same_call_gives_the_same_bytes(student: Path, photos: Path, tmp_path: Path) -> None:
    call = (photos / "a.jpg", "--network", student, "--box", BOX, "--mesh", "glb", "--out", tmp_path / "out")
    predict(*call)
    once = tree(tmp_path / "out")
    predict(*call)
    assert tree(tmp_path / "out") == once


def test_python_gives_what_the_command_writes(student: Path, photos: Path, tmp_path: Path) -> None:
    (said,) = load_predictor(student)(photos / "a.jpg", [(60, 40, 80, 100, "left")])
    (result,) = predict(photos / "a.jpg", "--network", student, "--box", BOX, "--out", tmp_path / "out")["inputs"]
    np.testing.assert_allclose(said.joints_3d_m, result["hands"][0]["joints_3d_m"], atol=1e-6)
    pixels = np.asarray(Image.open(photos / "a.jpg"))
    (again,) = load_predictor(student)(pixels, [HandBox(60, 40, 80, 100, right=False)])
    assert np.array_equal(again.vertices_m, said.vertices_m)
    for wrong in ((1, 2, 3), (1, 2, 3, 4, "up"), ("a", 2, 3, 4)):
        with pytest.raises(InputError, match="the box"):
            load_predictor(student)(pixels, [wrong])


def test_a_hand_that_is_shrunk_to_a_dot_is_called_one(student: Path, photos: Path, tmp_path: Path) -> None:
    """What a network does that was trained too little: a camera scale of a hundredth of what a hand has."""
    shrunk = Student.load(student)
    with torch.no_grad():  # added to the 4 that HaMeR starts from
        shrunk.mano_head.deccam.weight.zero_()
        shrunk.mano_head.deccam.bias.copy_(torch.tensor([-3.97, 0.0, 0.0]))
    shrunk.save(tmp_path / "shrunk")
    answer = handstill("predict", photos / "a.jpg", "--network", tmp_path / "shrunk", "--box", BOX, "--out", tmp_path)
    assert answer.code == 0
    assert "1 of 1 hands (in a.jpg): the network shrank the hand to a dot" in answer.err
    assert "a dot" in answer.out
    written = json.loads((tmp_path / "a.jpg.hands/hands.json").read_text())["hands"][0]
    assert written["is_dot"]
    assert 0 < written["span"] < 0.05


def test_hands_that_a_detector_finds(student: Path, photos: Path, tmp_path: Path, detector: list[HandBox]) -> None:
    detector.append(HandBox(60, 40, 80, 100, right=False, side_from="detector", score=0.875))
    Image.new("RGB", (64, 64)).save(photos / "black.png")
    document = predict(photos, "--network", student, "--out", tmp_path / "out")
    assert [(each["status"], len(each["hands"])) for each in document["inputs"]] == [
        ("done", 1),
        ("done", 1),
        ("no-hands", 0),
    ]
    hand = document["inputs"][0]["hands"][0]
    assert (hand["side"], hand["side_from"], hand["score"]) == ("left", "detector", 0.875)
    text = handstill("predict", photos, "--network", student, "--out", tmp_path / "out").out
    assert "no hand found" in text
    assert "2 with hands, 1 without a hand" in text


def test_without_boxes_or_detector_nothing_is_guessed(
    student: Path, photos: Path, tmp_path: Path, no_detector: None
) -> None:
    answer = handstill("predict", photos, "--network", student, "--out", tmp_path / "out")
    assert answer.code == 2
    assert "--box" in answer.err
    assert "pip download" in answer.err
    assert not (tmp_path / "out").exists()


def test_a_file_of_boxes(student: Path, photos: Path, tmp_path: Path, no_detector: None) -> None:
    boxes = tmp_path / "boxes.json"
    hand = {"box": [60, 40, 80, 100], "side": "left"}
    boxes.write_text(json.dumps({"a.jpg": [hand, {"box": [10, 10, 50, 50]}], str(photos / "b.png"): []}))
    document = predict(photos, "--network", student, "--boxes", boxes, "--out", tmp_path / "out")
    assert [len(each["hands"]) for each in document["inputs"]] == [2, 0]
    assert [each["side_from"] for each in document["inputs"][0]["hands"]] == ["given", "assumed"]
    wrong = {
        "nobody.jpg": '{"a.jpg": [], "b.png": [], "nobody.jpg": []}',
        "does not name b.png": '{"a.jpg": []}',
        "side": '{"a.jpg": [{"box": [1, 2, 3, 4], "side": "up"}], "b.png": []}',
        "box": '{"a.jpg": [{"box": [1, 2, 3]}], "b.png": []}',
        "extra": '{"a.jpg": [{"box": [1, 2, 30, 40], "extra": 1}], "b.png": []}',
        "Invalid JSON": "{",
    }
    for told, content in wrong.items():
        boxes.write_text(content)
        answer = handstill("predict", photos, "--network", student, "--boxes", boxes)
        assert (answer.code, told in answer.err) == (2, True), (told, answer.err)


def test_one_bad_file_does_not_stop_the_others(
    student: Path, photos: Path, tmp_path: Path, detector: list[HandBox]
) -> None:
    detector.append(HandBox(60, 40, 80, 100, right=True, side_from="detector", score=1.0))
    (photos / "aa.jpg").write_bytes(b"no picture")
    (photos / "clip.mp4").write_bytes(b"no video")
    Image.new("RGB", (30, 30), "white").save(photos / "small.png")  # what the detector finds lies outside
    document = predict(photos, "--network", student, "--out", tmp_path / "out", code=1)
    assert document["ok"] is False
    assert {Path(each["path"]).name: each["status"] for each in document["inputs"]} == {
        "a.jpg": "done",
        "aa.jpg": "failed",
        "b.png": "done",
        "clip.mp4": "failed",
        "small.png": "failed",
    }
    failed = {Path(each["path"]).name: each["error"] for each in document["inputs"] if each["status"] == "failed"}
    assert "no picture that can be read" in failed["aa.jpg"]
    assert "no video" in failed["clip.mp4"]
    assert "outside the picture" in failed["small.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jpg.hands", "b.png.hands"]
    text = handstill("predict", photos, "--network", student, "--out", tmp_path / "out")
    assert text.code == 1
    assert "2 with hands, 3 failed" in text.out


def test_a_mistake_of_the_user_exits_with_2_before_any_work(student: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken/a.jpg.hands").mkdir(parents=True)
    (tmp_path / "taken/a.jpg.hands/mine.txt").write_text("precious")
    picture = photos / "a.jpg"
    calls: dict[str, list[str | Path]] = {
        "no picture that can be read": [photos / "bad.jpg", "--box", BOX],
        "is not there": [photos / "nowhere.jpg", "--box", BOX],
        "holds no picture or video": [tmp_path / "empty"],
        "3 files are named": [photos, "--box", BOX],
        "want left or right": [picture, "--box", "1,2,3,4,up"],
        "no room for a hand": [picture, "--box", "10,10,0,5,left"],
        "outside the picture of 320 x 240": [picture, "--box", "900,10,50,50,left"],
        "asks for a square": [picture, "--box", "0,0,90000,90000,left"],
        "not finite": [picture, "--box", "nan,0,10,10,left"],
        "--rescale": [picture, "--box", BOX, "--rescale", "0"],
        "--focal-px": [picture, "--box", BOX, "--focal-px", "-5"],
        "give one of them": [picture, "--box", BOX, "--boxes", photos],
        "is not replaced": [picture, "--box", BOX, "--out", tmp_path / "taken"],
    }
    for told, arguments in calls.items():
        answer = handstill("predict", "--network", student, "--out", tmp_path / "out", *arguments)
        assert (answer.code, answer.out) == (2, ""), told
        assert told in answer.err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "taken/a.jpg.hands/mine.txt").read_text() == "precious"
    for usage in (["predict"], ["predict", picture, "--mesh", "stl"]):
        assert handstill(*usage).code == 2


def test_a_video_frame_by_frame(student: Path, tmp_path: Path, no_detector: None) -> None:
    writer = cv2.VideoWriter(
        str(tmp_path / "clip.mp4"), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (160, 120)
    )
    noise = np.random.default_rng(0).integers(0, 256, (4, 120, 160, 3), np.uint8)
    for frame in noise:
        writer.write(frame)
    writer.release()
    call = (tmp_path / "clip.mp4", "--network", student, "--box", "40,30,60,60,right", "--out", tmp_path / "out")
    (result,) = predict(*call)["inputs"]
    assert (result["kind"], result["status"], result["frames"], result["hands_total"]) == ("video", "done", 4, 4)
    folder = Path(result["folder"])
    assert sorted(path.name for path in folder.iterdir()) == ["frames.jsonl", "hands.json", "overlay.mp4"]
    joints = [
        json.loads(line)["hands"][0]["joints_2d_px"] for line in (folder / "frames.jsonl").read_text().splitlines()
    ]
    assert len(joints) == 4
    assert joints[0] != joints[1]
    assert "4 hands in 4 of 4 frames" in handstill("predict", *call).out


def test_networks_by_every_name(student: Path, photos: Path, tmp_path: Path, lab: Lab) -> None:
    """A folder, the folder above it, a checkpoint, the teacher and the students of a configuration."""
    shared = (photos / "a.jpg", "--box", BOX, "--out", tmp_path / "out")

    def joints(*arguments: str | Path) -> Any:
        return predict(*shared, *arguments)["inputs"][0]["hands"][0]["joints_3d_m"]

    named = joints("--network", student)
    assert joints("--network", student.parent) == named
    checkpoint = student.parent / "teacher/checkpoints/hamer.ckpt"
    for hand in (OPEN_HAND, str(student.parent / "hand.safetensors")):
        np.testing.assert_allclose(joints("--network", checkpoint, "--mano-model", hand), named, atol=1e-4)
    teacher = predict(*shared, "-c", lab.config)
    assert teacher["network"] == str(lab.folder / "teacher/checkpoints/hamer.ckpt")
    plain = predict(*shared, "-c", lab.config, "--network", "plain")
    assert (plain["backbone"], Path(plain["network"]).parents[2].name) == ("mobilenetv3_small_050", "plain")
    assert predict(*shared, "-c", lab.config, "--network", "plain/seed-0")["network"] == plain["network"]
    for folder in ("plain", "plain/seed-0"):
        assert predict(*shared, "--network", lab.workdir / "students" / folder)["network"] == plain["network"]
    assert plain["inputs"][0]["hands"][0]["square"][2] < teacher["inputs"][0]["hands"][0]["square"][2] * 1.001


def test_networks_that_cannot_be_had(student: Path, photos: Path, lab: Lab) -> None:
    calls: dict[str, list[str | Path]] = {
        "did you mean 'plain'": ["--network", "plane", "-c", lab.config],
        "no such seed": ["--network", "plain/seed-7", "-c", lab.config],
        "there is no nowhere.yaml": ["--network", "plain", "-c", "nowhere.yaml"],
        "Name MANO_RIGHT.pkl": ["--network", student.parent / "teacher/checkpoints/hamer.ckpt"],
        "has its own hand model": ["--network", student, "--mano-model", OPEN_HAND],
        "no student": ["--network", photos],
        "no checkpoint by its first bytes": ["--network", lab.config],
        "2 students are in it; name one of them": ["--network", lab.workdir / "students"],
    }
    for told, arguments in calls.items():
        answer = handstill("predict", photos / "a.jpg", "--box", BOX, *arguments)
        assert answer.code == 2, told
        assert told in answer.err
    lab.configure({"train.lr": 0.5})
    answer = handstill("predict", photos / "a.jpg", "--box", BOX, "--network", "plain", "-c", lab.config)
    assert answer.code == 2
    assert "is not trained as" in answer.err
    assert "an older one is in" in answer.err


def test_a_table_for_a_person(student: Path, photos: Path, tmp_path: Path) -> None:
    boxes = ("--box", BOX, "--box", "200,50,60,60")
    answer = handstill("predict", photos / "a.jpg", "--network", student, *boxes, "--out", tmp_path / "out")
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert lines[0].endswith("(hamer); hands from the boxes")
    assert lines[3].split()[:7] == ["a.jpg", "0", "left", "60", "40", "80", "100"]
    assert "right (assumed)" in lines[4]
    assert lines[-1] == "1 file: 1 with hands"


def test_a_full_disk_leaves_whole_folders_only(
    student: Path, photos: Path, tmp_path: Path, detector: list[HandBox], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector.append(HandBox(60, 40, 80, 100, right=True, side_from="detector", score=1.0))
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "hands.json" and ".b.png" in str(path):
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    answer = handstill("predict", photos, "--network", student, "--out", tmp_path / "out")
    assert answer.code == 1
    assert "No space left on device; what is finished is kept whole" in answer.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.jpg.hands"]
    assert (tmp_path / "out/a.jpg.hands/hands.json").is_file()
