"""Hand models: one hand has one digest in every file type; a file that is none is refused by name."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from models.hand_model import (
    OPEN_HAND,
    HandModel,
    hand_model_digest,
    hand_model_from_arrays,
    hand_model_from_state_dict,
    load_hand_model,
    save_hand_model,
)
from models.mano import ManoLayer
from storage.errors import InputError
from tests import hostile_pickles
from tests.tiny_networks import tiny_hand_model


def official(hand: HandModel) -> dict[str, Any]:
    """The dictionary of a MANO pickle."""
    return {
        "v_template": hand.v_template.astype(float),
        "shapedirs": hand.shapedirs,
        "posedirs": hand.posedirs,
        "J_regressor": scipy.sparse.csc_matrix(hand.j_regressor),
        "kintree_table": np.stack([np.where(hand.parents < 0, 2**32 - 1, hand.parents), np.arange(16)]),
        "weights": hand.weights,
        "f": hand.faces.astype(np.uint32),
        "hands_mean": hand.hands_mean,
        "hands_components": hand.hands_components,
        "bs_style": "lbs",
    }


def write_pickle(path: Path, content: Any, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def test_every_file_type_gives_the_same_hand(tmp_path: Path) -> None:
    hand = tiny_hand_model()
    save_hand_model(hand, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **{name: getattr(hand, name) for name in hand.__dataclass_fields__})
    write_pickle(tmp_path / "csc.pkl", official(hand))
    write_pickle(tmp_path / "csr.pkl", official(hand) | {"J_regressor": scipy.sparse.csr_matrix(hand.j_regressor)})
    write_pickle(tmp_path / "dense.pkl", official(hand) | {"J_regressor": hand.j_regressor}, protocol=4)
    for path in tmp_path.iterdir():
        assert hand_model_digest(load_hand_model(path)) == hand_model_digest(hand), path.name


def test_checkpoint_entries_give_the_same_hand_though_six_components_only() -> None:
    hand = tiny_hand_model()
    inside = hand_model_from_state_dict(ManoLayer(hand).state_dict(), what="checkpoint")
    assert inside.hands_components.shape == (6, 45)
    assert hand_model_digest(inside) == hand_model_digest(hand)


def test_saved_bytes_are_a_function_of_the_hand(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_hand_model(tiny_hand_model(), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("name", sorted(HandModel.__dataclass_fields__))
def test_digest_sees_every_number_that_decides_an_answer(name: str) -> None:
    hand = tiny_hand_model()
    array = getattr(hand, name).copy()
    array.flat[-1] += 1
    same = hand_model_digest(replace(hand, **{name: array})) == hand_model_digest(hand)
    assert same == (name == "hands_components")


def test_arrays_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        tiny_hand_model().v_template[0] = 0


def test_open_hand_is_built_in() -> None:
    hand = load_hand_model(OPEN_HAND)
    assert hand.n_vertices > 744
    assert 0.1 < np.ptp(hand.v_template, axis=0).max() < 0.3  # metres


@pytest.mark.parametrize("name", hostile_pickles.NAMES)
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "MANO_RIGHT.pkl").write_bytes(hostile_pickles.every_one(marker)[name])
    with pytest.raises(InputError, match=r"MANO_RIGHT\.pkl"):
        load_hand_model(tmp_path / "MANO_RIGHT.pkl")
    assert not marker.exists()


def test_hostile_value_inside_a_good_pickle(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Touch:
        def __reduce__(self) -> Any:
            return open, (str(marker), "w")

    path = write_pickle(tmp_path / "a.pkl", official(tiny_hand_model()) | {"bs_type": Touch()})
    with pytest.raises(InputError, match=r"asks for \S*open"):
        load_hand_model(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_template": np.zeros((700, 3))}, "700 vertices"),
        ({"v_template": np.full((750, 3), np.nan)}, "v_template holds NaN"),
        ({"v_template": np.full((750, 3), 1e39)}, "v_template holds .* beyond float32"),
        ({"v_template": [[1.0, 2.0, 3.0], [1.0, 2.0]]}, "v_template is no array of numbers"),
        ({"faces": np.full((4, 3), 0.5)}, "faces holds numbers that are no whole ones"),
        ({"shapedirs": np.zeros((750, 3, 20))}, "shapedirs has shape"),
        ({"posedirs": np.zeros((750, 3, 207))}, "posedirs has shape"),
        ({"weights": np.zeros((750, 16))}, "a row of weights"),
        ({"faces": np.full((4, 3), 750)}, "faces name vertices"),
        ({"faces": np.full((4, 3), -1)}, "faces name vertices"),
        ({"parents": np.arange(16)}, "parents .* no tree"),
        ({"hands_mean": np.array(["x"] * 45)}, "hands_mean holds"),
        ({"hands_mean": np.zeros(())}, "hands_mean has shape"),
        ({"j_regressor": np.zeros((17, 750))}, "j_regressor has shape"),
    ],
)
def test_misshapen_arrays_are_named(change: dict[str, Any], message: str) -> None:
    hand = tiny_hand_model()
    arrays = {name: getattr(hand, name) for name in hand.__dataclass_fields__}
    with pytest.raises(InputError, match=f"my file: {message}"):
        hand_model_from_arrays(arrays | change, what="my file")


@pytest.mark.parametrize(
    "change",
    [
        {"kintree_table": 3},
        {"J_regressor": scipy.sparse.csc_matrix((16, 10))},
        {"J_regressor": scipy.sparse.coo_matrix((16, 10))},
        {"v_template": None},
        {"f": "faces"},
    ],
    ids=["kintree", "narrow", "coo", "none", "text"],
)
def test_malformed_official_pickles(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"a\.pkl"):
        load_hand_model(write_pickle(tmp_path / "a.pkl", official(tiny_hand_model()) | change))


def test_missing_array_is_named(tmp_path: Path) -> None:
    content = official(tiny_hand_model())
    del content["weights"]
    with pytest.raises(InputError, match="weights missing"):
        load_hand_model(write_pickle(tmp_path / "a.pkl", content))
    state = ManoLayer(tiny_hand_model()).state_dict()
    del state["lbs_weights"]
    with pytest.raises(InputError, match=r"mano\.lbs_weights is missing"):
        hand_model_from_state_dict(state, what="a.ckpt")


def test_npz_with_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", v_template=np.array([{}], object), allow_pickle=True)
    with pytest.raises(InputError, match="not a readable npz"):
        load_hand_model(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pkl"])
def test_cut_short(tmp_path: Path, suffix: str) -> None:
    hand, buffer = tiny_hand_model(), io.BytesIO()
    if suffix == ".npz":
        np.savez(buffer, **{name: getattr(hand, name) for name in hand.__dataclass_fields__})
    elif suffix == ".pkl":
        buffer.write(pickle.dumps(official(hand)))
    else:
        save_hand_model(hand, tmp_path / "whole.safetensors")
        buffer.write((tmp_path / "whole.safetensors").read_bytes())
    (tmp_path / f"a{suffix}").write_bytes(buffer.getvalue()[:-200])
    with pytest.raises(InputError, match=rf"a\{suffix}"):
        load_hand_model(tmp_path / f"a{suffix}")


def test_other_sources_are_explained(tmp_path: Path) -> None:
    for name, message in (("nothing.pkl", "no such file"), ("", "a folder"), ("MANO_LEFT.pkl", "a left hand")):
        with pytest.raises(InputError, match=message):
            load_hand_model(tmp_path / name)
    (tmp_path / "a.obj").touch()
    with pytest.raises(InputError, match=r"type '\.obj'"):
        load_hand_model(tmp_path / "a.obj")


def test_layer_turns_the_hand_about_its_wrist() -> None:
    mano = ManoLayer(tiny_hand_model())
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    pose = torch.eye(3).expand(1, 15, 3, 3)
    flat, _ = mano(torch.eye(3)[None, None], pose, torch.zeros(1, 10))
    turned, keypoints = mano(turn[None, None], pose, torch.zeros(1, 10))
    wrist = keypoints[:, :1]
    torch.testing.assert_close(turned - wrist, (flat - wrist) @ turn.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(flat[0], torch.tensor(mano.hand_model.v_template), rtol=0, atol=1e-6)


def test_layer_stays_exact_under_autocast() -> None:
    mano = ManoLayer(tiny_hand_model())
    inputs = torch.eye(3).expand(2, 1, 3, 3), torch.eye(3).expand(2, 15, 3, 3), torch.ones(2, 10)
    plain = mano(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = mano(*inputs)
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


def test_keypoints_are_joints_and_fingertips() -> None:
    mano = ManoLayer(tiny_hand_model())
    vertices, keypoints = mano(torch.eye(3)[None, None], torch.eye(3).expand(1, 15, 3, 3), torch.zeros(1, 10))
    assert torch.equal(keypoints[0, [4, 8, 12, 16, 20]], vertices[0, [744, 320, 443, 554, 671]])
    rest = torch.tensor(mano.hand_model.j_regressor @ mano.hand_model.v_template)
    torch.testing.assert_close(keypoints[0, [0, 1, 5, 9, 13, 17]], rest[[0, 13, 1, 4, 10, 7]], rtol=0, atol=1e-6)
