"""The teacher is HaMeR's network with every entry accounted for, and it never learns."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from models.hand_model import OPEN_HAND, hand_model_digest, load_hand_model, save_hand_model
from models.teacher import load_teacher, teacher_hand_model
from storage.errors import InputError
from tests.tiny_networks import tiny_hand_model, tiny_student, write_tiny_teacher

State = dict[str, Tensor]


def rewrite(checkpoint: Path, change: Callable[[State], object]) -> Path:
    content = torch.load(checkpoint, weights_only=True)
    change(content["state_dict"])
    torch.save(content, checkpoint)
    return checkpoint


def removing(name: str) -> Callable[[State], object]:
    return lambda state: state.pop(name)


def setting(name: str, value: Tensor) -> Callable[[State], object]:
    return lambda state: state.update({name: value})


def reconfigure(checkpoint: Path, key: str, value: Any) -> None:
    path = checkpoint.parent.parent / "model_config.yaml"
    tree = yaml.safe_load(path.read_text())
    *parents, last = key.split(".")
    at = tree
    for parent in parents:
        at = at.setdefault(parent, {})
    if value is None:
        del at[last]
    else:
        at[last] = value
    path.write_text(yaml.safe_dump(tree))


def test_shapes_and_types(tmp_path: Path) -> None:
    checkpoint, hand = write_tiny_teacher(tmp_path)
    outputs = load_teacher(checkpoint, hand, precision="bf16")(torch.randn(2, 3, 256, 256))
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "features": (2, 24, 16, 12),
        "cam": (2, 3),
        "global_orient": (2, 1, 3, 3),
        "hand_pose": (2, 15, 3, 3),
        "betas": (2, 10),
        "keypoints_3d": (2, 21, 3),
        "keypoints_2d": (2, 21, 2),
        "vertices": (2, 750, 3),
        "cam_t": (2, 3),
    }
    assert {value.dtype for value in outputs.values()} == {torch.float32}
    assert not any(value.requires_grad for value in outputs.values())


def test_never_trains(tmp_path: Path) -> None:
    teacher = load_teacher(*write_tiny_teacher(tmp_path))
    with pytest.raises(RuntimeError, match="stays in eval mode"):
        teacher.train()
    with pytest.raises(RuntimeError, match="stays in eval mode"):
        torch.nn.Sequential(teacher).train()
    assert teacher.eval() is teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_exported_student_answers_as_the_student_in_halves(tmp_path: Path) -> None:
    student, images = tiny_student().half().float().eval(), torch.randn(2, 3, 256, 256)
    student.mano.load_state_dict(tiny_student().mano.state_dict())  # the hand is not exported: not halved
    teacher = load_teacher(*write_tiny_teacher(tmp_path))
    wanted = student(images)
    for name, value in teacher(images).items():
        torch.testing.assert_close(value, wanted[name].detach(), rtol=0, atol=0)


def test_picture_rows_and_columns_that_hamer_never_sees(tmp_path: Path) -> None:
    teacher = load_teacher(*write_tiny_teacher(tmp_path))
    images = torch.randn(1, 3, 256, 256)
    unseen = torch.zeros(256, 256, dtype=torch.bool)
    unseen[:, :32] = unseen[:, 222:] = unseen[254:] = True
    features = teacher(images)["features"]
    assert torch.equal(teacher(images.masked_fill(unseen, 9.0))["features"], features)
    for row, column in ((0, 32), (253, 32), (0, 221), (253, 221)):
        changed = images.clone()
        changed[..., row, column] += 1
        assert not torch.equal(teacher(changed)["features"], features), (row, column)


def test_every_entry_is_accounted_for(tmp_path: Path) -> None:
    checkpoint, hand = write_tiny_teacher(tmp_path)
    extra = ["discriminator.D_conv1.weight", "teacher.backbone.pos_embed", "channel_projection.bias", "initialized"]
    rewrite(checkpoint, lambda state: state.update({name: torch.zeros(1) for name in extra}))
    report = load_teacher(checkpoint, hand).report
    assert set(report.ignored) == set(extra)
    assert all(report.ignored.values())
    assert not report.missing
    assert not report.unexpected
    assert set(report.used) == {name for name in tiny_student().state_dict() if not name.startswith("mano.")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (removing("backbone.blocks.1.attn.qkv.weight"), "backbone.blocks.1.attn.qkv.weight is missing"),
        (removing("mano_head.init_cam"), "mano_head.init_cam is missing"),
        (setting("backbone.blocks.2.norm1.bias", torch.zeros(24)), "backbone.blocks.2.norm1.bias is left over"),
        (setting("refine_net.weight", torch.zeros(3)), "refine_net.weight is left over"),
        (setting("backbone.pos_embed", torch.zeros(1, 192, 24)), "backbone.pos_embed has shape (1, 192, 24)"),
        (setting("mano_head.decpose.bias", torch.full((96,), torch.nan)), "mano_head.decpose.bias holds NaN"),
        (setting("backbone.last_norm.bias", torch.zeros(24).long()), "backbone.last_norm.bias holds torch.int64"),
        (setting("mano.v_template", torch.zeros(750, 3)), "mano.shapedirs is missing"),
    ],
    ids=["missing", "missing buffer", "left over", "another network", "misshapen", "NaN", "integers", "half a hand"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    checkpoint, hand = write_tiny_teacher(tmp_path)
    rewrite(checkpoint, change)
    with pytest.raises(InputError, match=re.escape(message)):
        load_teacher(checkpoint, hand)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.IMAGE_SIZE", 224, "MODEL.IMAGE_SIZE: found 224"),
        ("MODEL.IMAGE_SIZE", None, "MODEL.IMAGE_SIZE: found None"),
        ("MODEL.BACKBONE.TYPE", "mobilenet", "BACKBONE.TYPE: found 'mobilenet'"),
        ("MODEL.MANO_HEAD.TYPE", "fc", "MANO_HEAD.TYPE: found 'fc'"),
        ("MODEL.MANO_HEAD.JOINT_REP", "aa", "JOINT_REP: found 'aa'"),
        ("MODEL.MANO_HEAD.TRANSFORMER_INPUT", "mean_shape", "TRANSFORMER_INPUT"),
        ("MODEL.IMAGE_MEAN", [0.5, 0.5, 0.5], "IMAGE_MEAN"),
        ("MODEL.MANO_HEAD.TRANSFORMER_DECODER.depth", None, "TRANSFORMER_DECODER: depth missing"),
        ("MODEL.MANO_HEAD.TRANSFORMER_DECODER.depth", "deep", "decoder.depth: found 'deep'"),
        ("MODEL.MANO_HEAD.TRANSFORMER_DECODER.context_dim", 99, "context_dim: found 99"),
        ("MODEL.MANO_HEAD.TRANSFORMER_DECODER", None, "depth, heads, mlp_dim missing"),
        ("MODEL.BACKBONE.NUM_HEADS", 5, "no multiple"),
        ("MODEL.BACKBONE.EMBED_DIM", 12, "context_dim: found 24"),
        ("MODEL.BACKBONE", {"TYPE": "vit"}, "context_dim: found 24, and this network is only 1280"),
        ("EXTRA.FOCAL_LENGTH", None, "focal_px: found None"),
        ("EXTRA.FOCAL_LENGTH", -1, "focal_px"),
    ],
)
def test_configurations_of_other_networks_are_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    checkpoint, hand = write_tiny_teacher(tmp_path)
    reconfigure(checkpoint, key, value)
    with pytest.raises(InputError, match=message):
        load_teacher(checkpoint, hand)


def test_the_rest_of_the_configuration_may_be_anything(tmp_path: Path) -> None:
    checkpoint, hand = write_tiny_teacher(tmp_path)
    reconfigure(checkpoint, "MANO.MODEL_PATH", "${MANO.DATA_DIR}/mano")
    reconfigure(checkpoint, "paths.output_dir", "${hydra:runtime.output_dir}")
    load_teacher(checkpoint, hand)


@pytest.mark.parametrize("text", [None, "", "- a\n", "a: [", "!!python/object/apply:os.system ['true']", "\x00"])
def test_unreadable_configuration(tmp_path: Path, text: str | None) -> None:
    checkpoint, hand = write_tiny_teacher(tmp_path)
    config = tmp_path / "model_config.yaml"
    config.unlink()
    if text is not None:
        config.write_text(text)
    with pytest.raises(InputError, match=r"model_config\.yaml"):
        load_teacher(checkpoint, hand)


def test_the_configuration_may_stand_beside_the_checkpoint(tmp_path: Path) -> None:
    """As AnyHand ships its drop-in weights; in HaMeR's place it wins."""
    checkpoint, hand = write_tiny_teacher(tmp_path)
    images = torch.randn(1, 3, 256, 256)
    wanted = load_teacher(checkpoint, hand)(images)["features"]
    checkpoint.rename(checkpoint.with_name("anyhand_hamer.ckpt"))
    (tmp_path / "model_config.yaml").rename(checkpoint.parent / "model_config.yaml")
    found = load_teacher(checkpoint.with_name("anyhand_hamer.ckpt"), hand)(images)["features"]
    assert torch.equal(found, wanted)
    (tmp_path / "model_config.yaml").write_text("MODEL: {}")
    with pytest.raises(InputError, match=r"MODEL\.BACKBONE\.TYPE"):
        load_teacher(checkpoint.with_name("anyhand_hamer.ckpt"), hand)


@pytest.mark.slow
def test_compiled_answers_the_same(tmp_path: Path) -> None:
    checkpoint, hand = write_tiny_teacher(tmp_path)
    images = torch.randn(2, 3, 256, 256)
    plain, compiled = load_teacher(checkpoint, hand), load_teacher(checkpoint, hand, compiled=True)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain(images).items():
        torch.testing.assert_close(compiled(images)[name], value, rtol=1e-4, atol=1e-5)


def test_without_a_hand_model(tmp_path: Path) -> None:
    checkpoint, _ = write_tiny_teacher(tmp_path)
    for load in (load_teacher, teacher_hand_model):
        with pytest.raises(InputError, match=r"teacher\.mano_model"):
            load(checkpoint)
    assert load_teacher(checkpoint, OPEN_HAND).hand_model.n_vertices == load_hand_model(OPEN_HAND).n_vertices


def test_given_hand_model_wins_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint, _ = write_tiny_teacher(tmp_path)
    inside = {f"mano.{name}": value for name, value in tiny_student().mano.state_dict().items()}
    rewrite(checkpoint, lambda state: state.update(inside))
    assert hand_model_digest(load_teacher(checkpoint).hand_model) == hand_model_digest(tiny_hand_model())
    assert hand_model_digest(teacher_hand_model(checkpoint)) == hand_model_digest(tiny_hand_model())
    other = tiny_hand_model(seed=1)
    save_hand_model(other, tmp_path / "other.safetensors")
    with caplog.at_level(logging.WARNING):
        teacher = load_teacher(checkpoint, tmp_path / "other.safetensors")
    assert hand_model_digest(teacher.hand_model) == hand_model_digest(other)
    assert hand_model_digest(teacher_hand_model(checkpoint, tmp_path / "other.safetensors")) == hand_model_digest(other)
    assert "another one" in caplog.text


def test_file_may_be_replaced_while_the_teacher_works(tmp_path: Path) -> None:
    checkpoint, hand = write_tiny_teacher(tmp_path)
    teacher, images = load_teacher(checkpoint, hand), torch.randn(1, 3, 256, 256)
    before = teacher(images)["features"]
    with checkpoint.open("r+b") as file:
        file.write(bytes(checkpoint.stat().st_size))
    assert torch.equal(teacher(images)["features"], before)


def test_same_batch_size_same_answer_whatever_the_neighbours(tmp_path: Path) -> None:
    teacher = load_teacher(*write_tiny_teacher(tmp_path))
    images = torch.randn(4, 3, 256, 256)
    one = teacher(images)
    other = teacher(torch.cat([images[:1], torch.zeros(3, 3, 256, 256)]))
    assert all(torch.equal(one[name][0], other[name][0]) for name in one)
