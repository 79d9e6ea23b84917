"""The teacher: HaMeR's network with a checkpoint's weights. It looks; it never learns.

No training process imports this module (the import contracts in pyproject.toml say so, and the trainer checks).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from models.checkpoint import read_checkpoint
from models.hamer import Hamer, HamerConfig
from models.hand_model import HandModel, hand_model_digest, hand_model_from_state_dict, load_hand_model
from models.mano import ManoLayer
from models.preprocessing import IMAGE_SIZE
from storage.errors import InputError

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]

_LEARNT = ("backbone.", "mano_head.")
"""What must be in the checkpoint, entry for entry."""

_IGNORED = {
    "discriminator.": "judges poses while HaMeR trains",
    "teacher.": "the teacher that Fast-HaMeR stores inside each of its students",
    "channel_projection.": "projects a teacher's features while Fast-HaMeR trains",
    "initialized": "a flag of HaMeR's training",
}


@dataclass(frozen=True)
class KeyReport:
    """What became of each entry of a checkpoint's state dictionary."""

    used: tuple[str, ...]
    ignored: Mapping[str, str]
    """Name to reason."""
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @classmethod
    def of(cls, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], own_hand_model: bool) -> KeyReport:
        """`wanted`: the network's state dictionary; `own_hand_model`: the user gave one beside the checkpoint."""
        reasons = _IGNORED | ({"mano.": "another hand model was given"} if own_hand_model else {})
        ignored = {name: why for name in found for start, why in reasons.items() if name.startswith(start)}
        learnt = [name for name in wanted if name.startswith(_LEARNT)]
        mano = [] if own_hand_model else [name for name in found if name.startswith("mano.")]
        used = [name for name in learnt if name in found] + mano
        missing = [name for name in learnt if name not in found]
        unexpected = [name for name in found if name not in ignored and name not in set(used)]
        return cls(tuple(used), ignored, tuple(missing), tuple(unexpected))


class Teacher(nn.Module):
    """HaMeR in eval mode for good; call it on normalised crops (B,3,256,256). Made by `load_teacher`.

    Returns the mapping of `models.hamer.Hamer`, all float32, outside of any gradient.
    """

    def __init__(self, network: Hamer, precision: Precision, report: KeyReport) -> None:
        super().__init__()
        if precision == "bf16":
            _store_products_in_bf16(network)
        self.network = network.eval().requires_grad_(False)
        self.precision = precision
        self.report = report
        self.training = False

    @property
    def hand_model(self) -> HandModel:
        return self.network.mano.hand_model

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        assert images.shape[1:] == (3, IMAGE_SIZE, IMAGE_SIZE), images.shape
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return {name: value.float() for name, value in self.network(images).items()}

    def train(self, mode: bool = True) -> Teacher:
        """Refuses `train(True)`: HaMeR's drop path of 0.55 would make its answers random."""
        if mode:
            raise RuntimeError("a teacher stays in eval mode; it was asked to train")
        return self


def load_teacher(
    checkpoint: str | Path,
    mano_model: str | Path | None = None,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
) -> Teacher:
    """HaMeR with the weights of an official Lightning checkpoint, model_config.yaml in the folder above its own.

    `mano_model`: a file for `load_hand_model`, or `open-hand`; None: the checkpoint's own `mano.*`, as HaMeR does.
    `precision`: bf16 runs matrix products in bf16 and keeps sums, norms and the hand in fp32.
    Raises InputError that names the key or tensor that is missing, left over, misshapen or not finite.
    """
    path = Path(checkpoint)
    tensors = read_checkpoint(path)
    config = HamerConfig.from_yaml(path.absolute().parent.parent / "model_config.yaml")
    mano = ManoLayer(_hand_model(path, tensors, mano_model))
    with torch.device("meta"):  # no memory, no random numbers: every entry is replaced
        network = Hamer(config, mano)
    report = _checked_report(path, tensors, network, own_hand_model=mano_model is not None)
    learnt = {name: _weight(path, name, tensors[name], device) for name in report.used if name.startswith(_LEARNT)}
    network.load_state_dict(learnt | _under("mano.", mano.state_dict()), strict=True, assign=True)
    return Teacher(network.to(device), precision, report)


def teacher_hand_model(checkpoint: str | Path, mano_model: str | Path | None = None) -> HandModel:
    """The hand model that `load_teacher` would use, without loading the network."""
    path = Path(checkpoint)
    return load_hand_model(mano_model) if mano_model is not None else _hand_model(path, read_checkpoint(path), None)


def _hand_model(path: Path, tensors: Mapping[str, Tensor], mano_model: str | Path | None) -> HandModel:
    inside = {
        name.removeprefix("mano."): value.float() if value.is_floating_point() else value  # numpy knows no bfloat16
        for name, value in tensors.items()
        if name.startswith("mano.")
    }
    if mano_model is None:
        if not inside:
            raise InputError(f"{path}: holds no hand model (mano.*). Name MANO_RIGHT.pkl in teacher.mano_model.")
        return hand_model_from_state_dict(inside, what=str(path))
    given = load_hand_model(mano_model)
    if inside and hand_model_digest(given) != hand_model_digest(hand_model_from_state_dict(inside, what=str(path))):
        log.warning("%s: its own hand model is another one than %s, which is used", path, mano_model)
    return given


def _checked_report(path: Path, tensors: Mapping[str, Tensor], network: Hamer, own_hand_model: bool) -> KeyReport:
    wanted = network.state_dict()
    report = KeyReport.of(tensors, wanted, own_hand_model)
    for what, names in (("missing", report.missing), ("left over", report.unexpected)):
        if names:
            raise InputError(
                f"{path}: {names[0]} is {what} ({len(names)} such entries). Wanted HaMeR's network at the sizes of "
                "model_config.yaml: another network's checkpoint, or another checkpoint's configuration?"
            )
    for name in report.used:
        if name.startswith(_LEARNT) and tensors[name].shape != wanted[name].shape:
            raise InputError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, wanted {tuple(wanted[name].shape)} by "
                "model_config.yaml (MODEL.BACKBONE: EMBED_DIM, DEPTH, NUM_HEADS; absent: ViT-H)."
            )
    return report


def _weight(path: Path, name: str, tensor: Tensor, device: str | torch.device) -> Tensor:
    """The tensor as float32 on the device; always a copy, so that the file may be replaced while the teacher works."""
    if not tensor.is_floating_point():
        raise InputError(f"{path}: {name} holds {tensor.dtype}, wanted floating-point numbers.")
    loaded = tensor.to(device, torch.float32, copy=True)
    if not torch.isfinite(loaded).all():
        raise InputError(f"{path}: {name} holds NaN or infinity. The file is damaged: fetch it again.")
    return loaded


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def _store_products_in_bf16(network: Hamer) -> None:
    """Cast the weights of matrix products once: autocast would cast 0.6 G parameters anew in every call."""
    head = network.mano_head
    exact = (head.decpose, head.decshape, head.deccam)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in exact:
            module.to(torch.bfloat16)
