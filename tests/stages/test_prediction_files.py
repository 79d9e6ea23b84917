"""What is written of predicted hands: numbers that come back, meshes the right way round, folders that are whole."""

from __future__ import annotations

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import trimesh
from numpy.typing import NDArray
from PIL import Image

from models.hand_box import HandBox
from models.hand_model import OPEN_HAND, load_hand_model
from models.photo_hands import HandPredictor, PredictedHand
from models.student import Student
from stages.overlay import LARGEST_PX, draw_hands, vertex_normals
from stages.prediction_files import (
    FRAMES,
    HANDS,
    MESH_FORMATS,
    OVERLAY,
    OVERLAY_VIDEO,
    MeshFormat,
    VideoFiles,
    hand_document,
    mesh_bytes,
    result_folder,
    write_photo,
)
from storage.errors import InputError
from tests.tiny_networks import TINY_HAMER

BOXES = [HandBox(40, 50, 60, 90, right=True), HandBox(180, 60, 100, 60, right=False)]


@pytest.fixture(scope="module")
def photo() -> NDArray[np.uint8]:
    return np.full((240, 320, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def hands(photo: NDArray[np.uint8]) -> list[PredictedHand]:
    """An open hand of each side, as large as its box, in the mean pose."""
    torch.manual_seed(0)
    student = Student(TINY_HAMER, load_hand_model(OPEN_HAND))
    with torch.no_grad():
        student.mano_head.deccam.bias.copy_(torch.tensor([3.0, 0.0, 0.0]))
    return HandPredictor(student, student.hand_model, sees_inner_columns=True)(photo, BOXES)


def test_the_document_holds_the_numbers(hands: list[PredictedHand]) -> None:
    for hand in hands:
        document = json.loads(json.dumps(hand_document(hand, "x.obj"), allow_nan=False))
        assert (document["side"], document["mesh"]) == (hand.box.side, "x.obj")
        np.testing.assert_allclose(document["joints_3d_m"], hand.joints_3d_m, atol=1e-6)
        np.testing.assert_allclose(document["joints_2d_px"], hand.joints_2d_px, atol=0.01)
        mano = document["mano"]
        assert [len(mano[name]) for name in ("global_orient", "hand_pose", "betas")] == [3, 45, 10]
        turned = cv2.Rodrigues(np.array(mano["hand_pose"][6:9]))[0]
        np.testing.assert_allclose(turned, hand.hand_pose[2], atol=1e-5)
        camera = document["camera"]
        points = np.array(document["joints_3d_m"])
        seen = points[:, :2] / points[:, 2:] * camera["focal_px"] + camera["principal_point_px"]
        np.testing.assert_allclose(seen, document["joints_2d_px"], atol=0.01 * document["square"][2])


def test_what_is_not_finite_is_null(hands: list[PredictedHand]) -> None:
    hand = hands[0]
    broken = PredictedHand(**{**vars(hand), "betas": np.full(10, np.nan), "vertices_m": hand.vertices_m * np.inf})
    document = hand_document(broken)
    assert document["mano"]["betas"] == [None] * 10
    assert document["in_front"] is False


@pytest.mark.parametrize("file_format", MESH_FORMATS)
def test_a_mesh_file_has_the_mesh_for_viewers(hands: list[PredictedHand], file_format: MeshFormat) -> None:
    for hand in hands:
        read = trimesh.load(io.BytesIO(mesh_bytes(hand, file_format)), file_type=file_format, process=False)
        mesh = read.to_geometry() if isinstance(read, trimesh.Scene) else read
        assert isinstance(mesh, trimesh.Trimesh)
        np.testing.assert_allclose(mesh.vertices * [1, -1, -1], hand.vertices_m, atol=2e-5)
        assert np.array_equal(mesh.faces, hand.faces)


def test_faces_look_outwards_on_both_sides(hands: list[PredictedHand]) -> None:
    """The signed volume of the mesh, from its middle: the open wrist takes little of it."""
    for hand in hands:
        a, b, c = ((hand.vertices_m - hand.vertices_m.mean(axis=0))[hand.faces[:, corner]] for corner in range(3))
        volume = np.einsum("fk,fk->f", a, np.cross(b, c)).sum() / 6
        assert volume > 1e-5, "cubic metres; inside out it would be negative"
        normals = vertex_normals(hand.vertices_m, hand.faces)
        np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1)


def test_an_overlay_shows_each_hand_where_its_joints_are(photo: NDArray[np.uint8], hands: list[PredictedHand]) -> None:
    drawn = draw_hands(photo, hands)
    changed = (drawn != photo).any(axis=2)
    assert 0.02 < changed.mean() < 0.5
    right, left = hands
    for hand, warm in ((right, False), (left, True)):
        # palms, not fingertips: the middle of the four fingers' bases and the wrist lies inside the mesh
        x, y = np.rint(hand.joints_2d_px[[0, 5, 9, 13, 17]].mean(axis=0)).astype(int)
        assert changed[y, x]
        assert (drawn[y, x, 0] > drawn[y, x, 2]) == warm, "right hands are blue, left ones orange"
        corners = hand.project(hand.vertices_m)
        inside = np.zeros_like(changed)
        (x0, y0), (x1, y1) = (np.clip(f, 0, [320, 240]).astype(int) for f in (corners.min(axis=0), corners.max(axis=0)))
        inside[max(y0 - 2, 0) : y1 + 3, max(x0 - 2, 0) : x1 + 3] = True
        changed &= ~inside
    assert not changed.any(), "nothing is drawn away from the hands"
    assert np.array_equal(draw_hands(photo, []), photo)


def test_an_overlay_is_of_bounded_size(hands: list[PredictedHand]) -> None:
    large = np.zeros((LARGEST_PX, 2 * LARGEST_PX, 3), np.uint8)
    assert draw_hands(large, hands[:1]).shape == (LARGEST_PX // 2, LARGEST_PX, 3)


def test_a_hand_behind_the_camera_is_drawn_as_bones(photo: NDArray[np.uint8], hands: list[PredictedHand]) -> None:
    behind = PredictedHand(**{**vars(hands[0]), "vertices_m": hands[0].vertices_m * [1, 1, -1]})
    changed = (draw_hands(photo, [behind]) != photo).any(axis=2)
    assert 0 < changed.sum() < (draw_hands(photo, hands[:1]) != photo).any(axis=2).sum()


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, photo: NDArray[np.uint8], hands: list[PredictedHand]) -> None:
    folder = tmp_path / "out/photo.jpg.hands"
    both = write_photo(folder, {"picture": "photo.jpg"}, hands, photo, "ply")
    names = [f"hand-0-right.{'ply'}", "hand-1-left.ply"]
    assert [hand["mesh"] for hand in both["hands"]] == names
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, HANDS, OVERLAY])
    assert json.loads((folder / HANDS).read_text()) == both
    with Image.open(folder / OVERLAY) as overlay:
        assert overlay.size == (320, 240)
    write_photo(folder, {"picture": "photo.jpg"}, hands[1:], photo, "obj")
    assert sorted(path.name for path in folder.iterdir()) == ["hand-0-left.obj", HANDS, OVERLAY]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing partial is left"


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    final = tmp_path / "x.hands"
    with result_folder(final) as partial:
        (partial / HANDS).write_text("old")

    def fail() -> None:
        with result_folder(final) as partial:
            (partial / HANDS).write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert (final / HANDS).read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_what_others_wrote_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.hands").mkdir()
    (tmp_path / "x.hands/precious.txt").write_text("mine")
    with pytest.raises(InputError, match="is not replaced"), result_folder(tmp_path / "x.hands"):
        pass
    assert (tmp_path / "x.hands/precious.txt").read_text() == "mine"


def test_a_video_becomes_lines_and_a_video(
    tmp_path: Path, photo: NDArray[np.uint8], hands: list[PredictedHand]
) -> None:
    files = VideoFiles(tmp_path, 10.0)
    for found in (hands, [], hands[:1]):
        files.add(found, draw_hands(photo, found))
    document = files.finish({"video": "clip.mp4"})
    assert (document["frames"], document["frames_with_hands"], document["hands_total"]) == (3, 2, 3)
    lines = [json.loads(line) for line in (tmp_path / FRAMES).read_text().splitlines()]
    assert [(line["frame"], line["seconds"], len(line["hands"])) for line in lines] == [
        (0, 0, 2),
        (1, 0.1, 0),
        (2, 0.2, 1),
    ]
    capture = cv2.VideoCapture(str(tmp_path / OVERLAY_VIDEO), cv2.CAP_FFMPEG)
    shown = [capture.read() for _ in range(4)]
    capture.release()
    assert [there for there, _ in shown] == [True, True, True, False]
    assert shown[0][1].shape == photo.shape
    assert np.abs(shown[0][1].astype(int) - photo).max() > 20 > np.abs(shown[1][1].astype(int) - photo).max()
