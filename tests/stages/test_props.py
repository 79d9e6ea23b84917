"""Things about the hand: none passes through it, none hides it, a second hand stands beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.spatial import Delaunay

from models.hand_model import HandModel, load_hand_model
from stages.hand_looks import Skin
from stages.hand_scenes import Studio
from stages.photographs import jpeg_bytes, photograph
from stages.props import held_thing, room_beside, solid, thing_before
from stages.rendering import Camera, Layers, Lighting, Mesh, Texture, render
from tests.stages.posing import posed


@pytest.fixture(scope="module")
def hand() -> HandModel:
    return load_hand_model("open-hand")


@pytest.mark.parametrize("kind", ["rod", "ball", "box", "cone"])
def test_solids_have_their_size_and_look_outwards(kind: str) -> None:
    centre = np.array([0.1, 0.2, 0.5])
    thing = solid(np.random.default_rng(0), centre, np.eye(3), (0.05, 0.02, 0.01), kind)
    np.testing.assert_allclose(np.ptp(thing.vertices, axis=0), [0.1, 0.04, 0.02], rtol=0.05)
    assert (np.einsum("nk,nk->n", thing.normals, thing.vertices - centre) >= -1e-9).all()


def test_what_is_held_fits_between_palm_and_fingers(hand: HandModel) -> None:
    vertices, joints = posed(hand, "wide grasp")
    held = [held_thing(np.random.default_rng(s), vertices, joints, np.array([0.0, -1.0, 0.0])) for s in range(12)]
    things = [thing for thing in held if thing is not None]
    assert len(things) == 12
    for thing in things:
        assert np.linalg.norm(vertices[:, None] - thing.vertices[None], axis=2).min() < 0.03
        assert (Delaunay(thing.vertices).find_simplex(vertices) < 0).all()  # no point of the hand is inside


def test_what_stands_before_the_hand_is_nearer_and_leaves_most_of_it_in_view(hand: HandModel) -> None:
    _, joints = posed(hand, "flat")
    joints = joints - joints.mean(axis=0) + [0, 0, 0.6]
    hidden = []
    for seed in range(40):
        thing = thing_before(np.random.default_rng(seed), joints, nearest_m=float(joints[:, 2].min()))
        assert thing.vertices[:, 2].max() < joints[:, 2].min()
        assert thing.vertices[:, 2].min() > 0
        shadow = thing.vertices[:, :2] / thing.vertices[:, 2:]
        points = joints[:, :2] / joints[:, 2:]
        hidden.append((np.linalg.norm(points[:, None] - shadow[None], axis=2).min(axis=1) < 0.004).sum())
    assert np.mean(hidden) > 0.3
    assert max(hidden) < 16


def test_a_second_hand_stands_beyond_a_plane(hand: HandModel) -> None:
    studio, skin = Studio(hand), Skin(0.4, 0.5, 0.05, 0.03, 1)
    first = posed(hand, "flat")[0] + [0, 0, 0.6]
    for seed in range(6):
        meshes = studio._second_hand(np.random.default_rng(seed), skin, np.zeros(10), first)
        gaps = np.linalg.norm(first[::3, None] - meshes[0].vertices[None, ::3], axis=2)
        assert 0 < gaps.min() < 0.25
    towards = np.array([0.6, 0.0, 0.8])
    moved = first + room_beside(first, first, towards) * towards
    assert (moved @ towards).min() == pytest.approx((first @ towards).max())


def test_a_wall_shows_the_shadow_of_what_stands_before_it() -> None:
    camera = Camera(100.0, 64, 64)
    corners = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) * 0.1 + [0, 0, 1.0]
    faces, normals = np.array([[0, 1, 2], [0, 2, 3]], dtype=np.int32), np.tile([0.0, 0.0, -1.0], (4, 1))
    card = Mesh(corners, normals, faces, np.full((4, 3), 0.5), np.zeros(4), np.zeros(4), Texture.plain(corners, 0.0))
    light = Lighting(np.array([0.6, 0.0, -0.8]), np.ones(3), np.ones(3) * 0.1, np.ones(3) * 0.1)
    lamp = render(card, camera, light, wall_m=1.4).lamp_on_wall[..., 0]
    at = camera.project(np.array([-0.3, 0.0, 1.4])).round().astype(int)  # 0.4 m behind, 0.75 aside a metre
    assert lamp[at[1], at[0]] < 0.3
    assert lamp[at[1], 63 - at[0]] > 0.9
    assert (render(card, camera, light).lamp_on_wall == 1).all()


def test_photographs_differ_in_light_and_are_damaged_by_jpeg() -> None:
    empty = Layers(*(np.zeros((32, 32, n), dtype=np.float32) for n in (3, 1)), np.ones((32, 32, 1), dtype=np.float32))
    grey = np.full((32, 32, 3), 0.5, dtype=np.float32)
    taken = [photograph(np.random.default_rng(seed), empty, grey, 0.5) for seed in range(40)]
    assert all(one.dtype == np.float32 and one.min() >= 0 and one.max() <= 1 for one in taken)
    assert np.std([one.mean() for one in taken]) > 0.03
    busy = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
    sizes = [len(jpeg_bytes(np.random.default_rng(seed), busy)) for seed in range(20)]
    assert max(sizes) > 1.3 * min(sizes)


def test_no_code_counts_mano_s_vertices() -> None:
    root = Path(__file__).resolve().parents[2]
    folders = ("storage", "models", "stages", "trainer", "pipeline")
    counted = [str(path) for folder in folders for path in (root / folder).rglob("*.py") if "778" in path.read_text()]
    assert counted == []


def test_the_bench_configuration_makes_tens_of_thousands_of_hands_beside_the_demo_s() -> None:
    root = Path(__file__).resolve().parents[2]
    made = {name: yaml.safe_load((root / name).read_text()) for name in ("pipeline.yaml", "benchmarks/open-hand.yaml")}
    hands = {name: one["synthesise"]["sets"]["open-train"]["hands"] for name, one in made.items()}
    assert hands["pipeline.yaml"] < 1000 < 10_000 <= hands["benchmarks/open-hand.yaml"]
    for one in made.values():
        assert len({made_set["seed"] for made_set in one["synthesise"]["sets"].values()}) == 2
