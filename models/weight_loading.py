"""Matching a checkpoint's entries with a network's, so that every one of them is accounted for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.hand_model import HandModel, hand_model_digest, hand_model_from_state_dict, load_hand_model
from storage.errors import InputError

log = logging.getLogger(__name__)

LEARNT = ("backbone.", "mano_head.")
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
    def of(
        cls,
        found: Mapping[str, Tensor],
        wanted: Mapping[str, Tensor],
        *,
        own_hand_model: bool,
        also_ignored: Mapping[str, str] | None = None,
    ) -> KeyReport:
        """`wanted`: the network's entries, under the checkpoint's names; `own_hand_model`: one was given beside it.

        also_ignored: beginnings of names that this kind of checkpoint may hold without need, and why.
        """
        reasons = _IGNORED | ({"mano.": "another hand model was given"} if own_hand_model else {})
        reasons |= dict(also_ignored or {})
        ignored = {name: why for name in found for start, why in reasons.items() if name.startswith(start)}
        learnt = [name for name in wanted if name.startswith(LEARNT)]
        mano = [] if own_hand_model else [name for name in found if name.startswith("mano.")]
        used = [name for name in learnt if name in found] + mano
        missing = [name for name in learnt if name not in found]
        unexpected = [name for name in found if name not in ignored and name not in set(used)]
        return cls(tuple(used), ignored, tuple(missing), tuple(unexpected))

    def demand_all(
        self, path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], sizes_from: str
    ) -> None:
        """Raise InputError unless the network's own entries are all there, with its shapes, and nothing is left over.

        sizes_from: the keys of model_config.yaml that decide the shapes, for the message.
        """
        for what, names in (("missing", self.missing), ("left over", self.unexpected)):
            if names:
                raise InputError(
                    f"{path}: {names[0]} is {what} ({len(names)} such entries). Wanted the network that "
                    "model_config.yaml describes: another network's checkpoint, or another checkpoint's configuration?"
                )
        for name in self.used:
            if name.startswith(LEARNT) and found[name].shape != wanted[name].shape:
                raise InputError(
                    f"{path}: {name} has shape {tuple(found[name].shape)}, wanted {tuple(wanted[name].shape)} by "
                    f"model_config.yaml ({sizes_from})."
                )


def loaded_weight(
    path: Path, name: str, tensor: Tensor, wanted: Tensor | None = None, device: str | torch.device = "cpu"
) -> Tensor:
    """The tensor as float32 on the device; always a copy, so that the file may be replaced while the network works.

    wanted: the network's own entry; one of whole numbers (batch norm's counter) stays one.
    """
    if wanted is not None and not wanted.is_floating_point():
        return tensor.to(device, wanted.dtype, copy=True)
    if not tensor.is_floating_point():
        raise InputError(f"{path}: {name} holds {tensor.dtype}, wanted floating-point numbers.")
    loaded = tensor.to(device, torch.float32, copy=True)
    if not torch.isfinite(loaded).all():
        raise InputError(f"{path}: {name} holds NaN or infinity. The file is damaged: fetch it again.")
    return loaded


def checkpoint_hand_model(path: Path, tensors: Mapping[str, Tensor], mano_model: str | Path | None) -> HandModel:
    """The hand model to use with a checkpoint: the one given, else its own `mano.*`; a difference is warned of.

    Raises InputError when there is neither.
    """
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
