"""The MANO layer against the original's numbers."""

from __future__ import annotations

import numpy as np
import smplx.lbs
import torch

from models.hand_model import hand_model_digest, hand_model_from_state_dict, load_hand_model
from models.mano import ManoLayer
from tests.shared import REFERENCE, needs_shared

pytestmark = needs_shared
STAND_IN = REFERENCE / "mano_stand_in" / "MANO_RIGHT.pkl"
CHUMPY = REFERENCE / "mano_stand_in_chumpy" / "MANO_RIGHT.pkl"


def test_vertices_and_joints_are_the_originals() -> None:
    with np.load(REFERENCE / "reference_mano.npz") as file:
        golden = dict(file)
    mano = ManoLayer(load_hand_model(STAND_IN))
    rotations = torch.from_numpy(golden["rotmat"])
    vertices, keypoints = mano(rotations[:, :1], rotations[:, 1:], torch.from_numpy(golden["betas"]))
    np.testing.assert_allclose(vertices, golden["vertices"], rtol=0, atol=1e-7)  # metres
    np.testing.assert_allclose(keypoints, golden["joints"], rtol=0, atol=1e-7)
    np.testing.assert_array_equal(mano.faces_tensor, golden["faces"])


def test_released_layout_with_chumpy_gives_the_same_hand() -> None:
    assert hand_model_digest(load_hand_model(CHUMPY)) == hand_model_digest(load_hand_model(STAND_IN))


def test_checkpoint_entries_give_the_same_hand() -> None:
    mano = ManoLayer(load_hand_model(STAND_IN))
    inside = hand_model_from_state_dict(mano.state_dict(), what="checkpoint")
    assert hand_model_digest(inside) == hand_model_digest(mano.hand_model)


def test_forward_is_smplxs_own() -> None:
    mano = ManoLayer(load_hand_model(STAND_IN)).double()
    draw = torch.Generator().manual_seed(1)
    rotations = torch.linalg.qr(torch.randn(3, 16, 3, 3, generator=draw, dtype=torch.float64))[0].contiguous()
    betas = torch.randn(3, 10, generator=draw, dtype=torch.float64)
    wanted, joints = smplx.lbs.lbs(
        *(betas, rotations, mano.v_template, mano.shapedirs, mano.posedirs),
        *(mano.J_regressor, mano.parents, mano.lbs_weights),
        pose2rot=False,
    )
    vertices, keypoints = mano.float()(rotations[:, :1].float(), rotations[:, 1:].float(), betas.float())
    torch.testing.assert_close(vertices.double(), wanted, rtol=0, atol=2e-7)
    torch.testing.assert_close(
        keypoints[:, [0, 5, 9, 17, 13, 1]].double(), joints[:, [0, 1, 4, 7, 10, 13]], rtol=0, atol=2e-7
    )
