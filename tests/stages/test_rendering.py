"""Pictures agree with geometry: what is where the camera says, how much of a pixel is covered, what is lit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models.hand_model import FINGERTIP_VERTICES, load_hand_model
from stages.backgrounds import draw_background
from stages.hand_looks import Arm, HandLooks, Skin
from stages.rendering import Camera, Lighting, Mesh, Texture, joined, render
from stages.skinning import pose_hand

CAMERA = Camera(focal_px=100.0, width_px=64, height_px=48)
WHITE = np.ones(3)
FLAT = Lighting(np.array([0.0, 0.0, -1.0]), np.zeros(3), WHITE * 0.2, WHITE * 0.2)


def square(x: float, y: float, z: float, side: float, albedo: float = 0.5) -> Mesh:
    """A square that faces the camera."""
    corners = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) * side / 2 + [x, y, z]
    faces = np.array([[0, 1, 2], [0, 2, 3]], dtype=np.int32)
    normals = np.tile([0.0, 0.0, -1.0], (4, 1))
    return Mesh(corners, normals, faces, np.full((4, 3), albedo), np.zeros(4), np.zeros(4), Texture.plain(corners, 0.0))


def test_a_square_covers_the_pixels_that_projection_says() -> None:
    picture, coverage, _ = render(square(0.1, -0.05, 1.0, 0.2), CAMERA, FLAT)
    rows, columns = np.indices(coverage.shape[:2])
    weight = coverage[..., 0]
    centre = CAMERA.project(np.array([0.1, -0.05, 1.0]))
    assert weight.sum() == pytest.approx(20 * 20, rel=0.02)
    assert (columns * weight).sum() / weight.sum() == pytest.approx(centre[0], abs=0.1)
    assert (rows * weight).sum() / weight.sum() == pytest.approx(centre[1], abs=0.1)
    assert picture.shape == (48, 64, 3)
    assert (picture[weight == 0] == 0).all()


def test_edges_are_covered_in_part() -> None:
    turned = square(0, 0, 1.0, 0.2)
    angle = np.radians(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    mesh = replace(turned, vertices=turned.vertices @ turn.T)
    coverage = render(mesh, CAMERA, FLAT)[1]
    assert coverage.sum() == pytest.approx(400, rel=0.02)
    assert set(np.unique(coverage)) == {0.0, 0.25, 0.5, 0.75, 1.0}


def test_the_nearer_surface_hides_the_farther() -> None:
    both = joined([square(0, 0, 2.0, 1.0, albedo=0.1), square(0, 0, 1.0, 0.1, albedo=0.9)])
    picture = render(both, CAMERA, FLAT)[0]
    assert picture[24, 32, 0] > 1.5 * picture[24, 45, 0]


def test_the_lamp_lights_what_faces_it_and_not_what_lies_in_shadow() -> None:
    towards = np.array([0.6, 0.0, -0.8])
    lamp = Lighting(towards, WHITE * 0.5, WHITE * 0.01, WHITE * 0.01)
    places = np.stack(np.meshgrid(np.linspace(-0.7, 0.7, 30), np.linspace(-0.7, 0.7, 30)), axis=-1).reshape(-1, 2)
    wall = [square(x, y, 2.0, 0.05) for x, y in places]
    screen = square(0, 0, 1.5, 0.3)  # half a metre before the wall: its shadow falls 0.375 m to the left
    picture = render(joined([*wall, screen]), CAMERA, lamp)[0][:, :, 0]
    shadow, opposite = (CAMERA.project(np.array([x, 0.0, 2.0])).round().astype(int) for x in (-0.375, 0.375))
    assert picture[opposite[1], opposite[0]] > 2 * picture[shadow[1], shadow[0]]
    from_behind = Lighting(-towards, WHITE * 0.5, WHITE * 0.01, WHITE * 0.01)
    assert render(joined(wall), CAMERA, from_behind)[0].max() < 0.15


def test_nothing_in_view_gives_an_empty_picture() -> None:
    picture, coverage, _ = render(square(5, 0, 1.0, 0.2), CAMERA, FLAT)
    assert not picture.any()
    assert not coverage.any()


def test_the_skin_is_closed_up_to_the_wrist_and_its_normals_look_outwards() -> None:
    hand = load_hand_model("open-hand")
    looks = HandLooks(hand)
    vertices, joints = pose_hand(hand, np.tile(np.eye(3), (16, 1, 1)), np.zeros(10))
    rim = vertices[looks.rim]
    assert len(looks.rim) > 10
    assert np.abs(rim[:, 0] - joints[0, 0]).max() < 0.02
    a, b, c = (vertices[looks.faces[:, corner]] - rim.mean(axis=0) for corner in range(3))
    volume_m3 = np.einsum("fk,fk->", a, np.cross(b, c)) / 6  # positive where faces turn outwards
    assert 2e-4 < volume_m3 < 6e-4
    grown = vertices + 0.001 * looks.normals(vertices)
    assert np.ptp(grown, axis=0).min() > np.ptp(vertices, axis=0).min()


def test_nails_are_on_the_back_of_the_fingertips() -> None:
    hand = load_hand_model("open-hand")
    looks = HandLooks(hand)
    nails = np.flatnonzero(looks.nail)
    tips = hand.v_template[list(FINGERTIP_VERTICES)]
    owner = np.linalg.norm(hand.v_template[nails, None] - tips, axis=2).argmin(axis=1)
    assert np.bincount(owner, minlength=5).min() >= 5
    fingers = nails[owner > 0]
    assert (looks.normals(hand.v_template.astype(np.float64))[fingers, 1] > 0).all()  # the palm looks towards -y


@pytest.mark.parametrize("cuff_m", [0.0, 0.1, 0.9])
def test_the_arm_starts_at_the_wrist_and_leaves_away_from_the_fingers(cuff_m: float) -> None:
    hand = load_hand_model("open-hand")
    looks = HandLooks(hand)
    vertices, joints = pose_hand(hand, np.tile(np.eye(3), (16, 1, 1)), np.zeros(10))
    arm = Arm(flexion_rad=0.5, deviation_rad=-0.2, cuff_m=cuff_m, sleeve=np.full(3, 0.5), sleeve_width=1.2)
    meshes = looks.arm_meshes(vertices, Skin(0.5, 0.5, 0.05, 0.03, 1), arm)
    assert len(meshes) == (1 if cuff_m > 0.5 else 2)
    np.testing.assert_allclose(meshes[0].vertices[: len(looks.rim)], vertices[looks.rim], atol=1e-12)
    assert meshes[-1].vertices[:, 0].max() > joints[0, 0] + 0.25
    assert all(np.isfinite(mesh.normals).all() for mesh in meshes)


def test_backgrounds_vary_and_keep_within_range() -> None:
    drawn = [draw_background(np.random.default_rng(seed), 96, 64) for seed in range(40)]
    assert all(one.shape == (64, 96, 3) and one.min() >= 0 and one.max() <= 1 for one in drawn)
    assert np.std([one.mean() for one in drawn]) > 0.1
    again = draw_background(np.random.default_rng(7), 96, 64)
    np.testing.assert_array_equal(again, drawn[7])
