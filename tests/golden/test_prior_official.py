"""The adversarial prior against HaMeR's own discriminator and loss, from the same weights."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType

import numpy as np
import torch

from models.discriminator import Discriminator
from models.mano_head import rotations_from_6d
from tests.shared import REFERENCE, needs_shared
from trainer.prior import judging_loss, pleasing_loss

pytestmark = needs_shared


def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("weight_recipe", REFERENCE / "weight_recipe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def official_judge() -> Discriminator:
    weights = recipe().state_dict(json.loads((REFERENCE / "hamer_state_dict.json").read_text()), "discriminator.")
    judge = Discriminator()
    judge.load_state_dict({name.removeprefix("discriminator."): value for name, value in weights.items()})
    return judge.double()


def test_opinions_and_the_students_loss_are_the_originals() -> None:
    judge = official_judge()
    assert sum(parameter.numel() for parameter in judge.parameters()) == 1_545_211
    with np.load(REFERENCE / "reference_mano.npz") as arrays:
        pose, betas = (torch.from_numpy(arrays[name]).double() for name in ("rotmat", "betas"))
        opinions, loss = arrays["discriminator_out"], float(arrays["adversarial_generator_loss"])
    ours = judge(pose[:, 1:], betas)
    np.testing.assert_allclose(ours.detach(), opinions, rtol=1e-6, atol=1e-6 * np.abs(opinions).max())
    np.testing.assert_allclose(float(pleasing_loss(ours).mean().detach()), loss, rtol=1e-6)


def test_the_published_judge_weighs_real_hands_double() -> None:
    judge = official_judge()
    draw = torch.Generator().manual_seed(0)

    def opinions(hands: int) -> torch.Tensor:
        pose = rotations_from_6d(torch.randn(hands, 15, 6, generator=draw))
        with torch.no_grad():
            return judge(pose.double(), torch.randn(hands, 10, generator=draw).double())

    predicted, real = opinions(3), opinions(6)
    by_hand = (
        sum(float((row**2).sum()) for row in predicted) / 3 + sum(float(((row - 1) ** 2).sum()) for row in real) / 3
    )
    np.testing.assert_allclose(float(judging_loss(predicted, real, published=True)), by_hand, rtol=1e-12)
    corrected = float(judging_loss(predicted, real, published=False))
    real_part = float(((real - 1) ** 2).sum()) / 6
    np.testing.assert_allclose(by_hand - corrected, real_part, rtol=1e-9)
