"""Muon for the matrices of linear layers, AdamW for all else."""

from __future__ import annotations

import pytest
import timm.optim.muon
import torch

from models.hand_model import load_hand_model
from models.sizes import DecoderSizes, VitSizes
from models.student import Student, StudentSpec
from trainer.config import StudentRecipe
from trainer.learner import StudentUnderTraining
from trainer.optimizing import inner_matrices, optimizer_for

CPU = torch.device("cpu")
SPEC = StudentSpec(
    backbone="hamer",
    vit=VitSizes(embed_dim=32, depth=1, num_heads=2),
    decoder=DecoderSizes(dim=32, depth=1, heads=2, dim_head=16, mlp_dim=64),
)
LR, WEIGHT_DECAY = 0.01, 0.1


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", timm.optim.muon.zeropower_via_newtonschulz)


def learner(optimizer: str) -> tuple[StudentUnderTraining, StudentRecipe]:
    torch.manual_seed(0)
    given = SPEC.model_dump(exclude={"head", "weights"}) | {"on": ["tiny"], "optimizer": optimizer}
    recipe = StudentRecipe.model_validate(given | {"lr": LR, "weight_decay": WEIGHT_DECAY})
    return StudentUnderTraining(Student(SPEC, load_hand_model("open-hand")), recipe, "full", 4), recipe


def test_what_reads_pictures_and_what_says_parameters_is_no_inner_matrix() -> None:
    module, _ = learner("muon")
    inner = {id(matrix) for matrix in inner_matrices(module)}
    names = {name for name, parameter in module.student.named_parameters() if id(parameter) in inner}
    assert {"backbone.blocks.0.attn.qkv.weight", "backbone.blocks.0.mlp.fc2.weight"} < names
    assert any(name.startswith("mano_head.transformer.") for name in names)
    assert not any("patch_embed" in name or name.startswith("mano_head.dec") for name in names)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_muon_makes_steps_orthogonal_and_adamw_makes_the_others(
    bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.optimizing.has_bfloat16", lambda _device: bfloat16)
    (module, recipe), (other, others) = learner("muon"), learner("adamw")
    optimizers = optimizer_for(module, recipe, CPU), optimizer_for(other, others, CPU)
    inner = {id(matrix) for matrix in inner_matrices(module)}
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for one, same in zip(module.parameters(), other.parameters(), strict=True):
        one.grad = torch.randn_like(one)
        one.grad += 0.01 * one.grad.sign()  # AdamW's epsilon shows beside the smallest
        same.grad = one.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    turned = 0
    for (name, one), same in zip(module.named_parameters(), other.parameters(), strict=True):
        if not one.requires_grad:
            continue
        step = before[name] * (1 - LR * WEIGHT_DECAY) - one.detach()
        if id(one) in inner and min(one.shape) > 3:
            singular = torch.linalg.svdvals(step) / (LR * 0.2 * max(one.shape) ** 0.5)
            assert singular.min() > 0.6
            assert singular.max() < 1.3
            turned += 1
        else:  # AdamW's first step moves every element by the learning rate
            assert torch.allclose(step.abs(), torch.full_like(step, LR), rtol=0.02), name
            assert torch.allclose(one, same, atol=LR * 0.02), name
    assert turned > 8


def test_all_that_learns_is_moved_once() -> None:
    module, recipe = learner("muon")
    groups = optimizer_for(module, recipe, CPU).param_groups
    moved = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(moved) == sorted(id(parameter) for parameter in module.parameters() if parameter.requires_grad)
