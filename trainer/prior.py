"""The adversarial pose prior of HaMeR: a judge learns to tell predicted hands from real ones, the student to please it.

Least-squares GAN on rotation matrices and shape (models/discriminator.py; HAMER_SPEC section 4). B predicted hands,
R real ones. Real ones come from a motion-capture file, or else from the labels of the batch that may be trusted.

The published losses divide both sums by B while R is 2 B, so real hands weigh double; preset `paper` keeps that, the
corrected one takes the mean of each side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.discriminator import HAND_JOINTS, Discriminator
from models.hand_model import SHAPE_COMPONENTS
from storage.errors import InputError
from storage.npz import read_npz
from trainer.config import PriorConfig
from trainer.distributed import Group
from trainer.losses import rotations

Tensors = dict[str, Tensor]

_REAL_A_PREDICTED = {"paper": 2, "corrected": 1}
"""HaMeR's NUM_TRAIN_SAMPLES: so many real hands are drawn for each predicted one."""


def pleasing_loss(opinions: Tensor) -> Tensor:
    """(B,): how far the judge's opinions (B,17) on predicted hands are from `real`; what the student minimises."""
    return (opinions - 1).square().sum(1)


def judging_loss(on_predicted: Tensor, on_real: Tensor, *, published: bool, real_hands: float | None = None) -> Tensor:
    """What the judge minimises: its opinions (B,17) on predicted hands towards 0, those (R,17) on real ones towards 1.

    published: both sums over B, as HaMeR and Fast-HaMeR do it; else each side's mean. real_hands: what to divide the
    real ones' sum by instead of R, where these are one worker's.
    """
    predicted, real = on_predicted.square().sum(), (on_real - 1).square().sum()
    counted = len(on_real) if real_hands is None else real_hands
    return predicted / len(on_predicted) + real / (len(on_predicted) if published else counted)


@dataclass(frozen=True)
class Mocap:
    """Real hands: right hands' poses, M of them."""

    hand_pose: NDArray[np.float32]
    """(M,45) axis-angle, radians, absolute: the mean pose is included."""
    betas: NDArray[np.float32]
    """(M,10)"""

    def draw(self, count: int, seed: int, step: int, share: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """`count` hands for step `step`, or a share of them: rotation matrices (count,15,3,3), shapes (count,10)."""
        rows = np.random.default_rng([seed, 0x6D6F636170, step]).integers(len(self.hand_pose), size=count)[share]
        return rotations(torch.from_numpy(self.hand_pose[rows])), torch.from_numpy(self.betas[rows])


def read_mocap(path: Path) -> Mocap:
    """HaMeR's freihand_mocap.npz: `hand_pose` (M,48), the first three the wrist's, or (M,45); `betas` (M,10).

    Raises InputError for another layout, or numbers that are not finite.
    """
    arrays = read_npz(path, ("hand_pose", "betas"))
    shapes = {name: array.shape for name, array in arrays.items()}
    pose, betas = arrays.get("hand_pose"), arrays.get("betas")
    fits = (
        pose is not None
        and betas is not None
        and pose.ndim == betas.ndim == 2
        and len(pose) == len(betas) > 0
        and pose.shape[1] in (3 * HAND_JOINTS, 3 * HAND_JOINTS + 3)
        and betas.shape[1] == SHAPE_COMPONENTS
        and all(array.dtype.kind == "f" and np.isfinite(array).all() for array in (pose, betas))
    )
    if not fits:
        raise InputError(f"{path}: found {shapes or 'neither array'}. Wanted finite hand_pose (M,48), betas (M,10).")
    assert pose is not None
    assert betas is not None
    return Mocap(pose[:, -3 * HAND_JOINTS :].astype(np.float32), betas.astype(np.float32))


class PosePrior:
    """The judge in training, with an optimizer of its own; what a checkpoint must hold of it is `state_dict`."""

    def __init__(
        self,
        config: PriorConfig,
        *,
        published: bool,
        mocap: Mocap | None,
        seed: int,
        lr: float,
        weight_decay: float,
        group: Group | None = None,
    ) -> None:
        """group: the workers that share each batch; their judges learn from all of it and stay the same."""
        self.weight, self.published, self.mocap, self.seed = config.weight, published, mocap, seed
        self._group = group or Group()
        self.judge = Discriminator()
        self._rate = (lr, weight_decay)
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> PosePrior:
        """Move the judge; its optimizer begins anew."""
        self.judge.to(device)
        lr, weight_decay = self._rate
        self.optimizer = torch.optim.AdamW(self.judge.parameters(), lr=lr, weight_decay=weight_decay)
        return self

    def loss(self, outputs: Tensors) -> Tensor:
        """To be added to the student's loss: the weighted mean over the batch."""
        return self.weight * pleasing_loss(self.judge(outputs["hand_pose"], outputs["betas"])).mean()

    def learn(self, outputs: Tensors, batch: Tensors, step: int) -> Tensors:
        """One step of the judge's own, after the student's backward; its parts for the record.

        Without a motion-capture file a batch without trusted labels teaches it nothing.
        """
        pose, betas = outputs["hand_pose"].detach(), outputs["betas"].detach()
        real = self._real(batch, step, len(pose))
        real_hands = self._group.total(len(real[0]))
        if not real_hands:
            return {}
        loss = judging_loss(
            self.judge(pose, betas),
            self.judge(*real),
            published=self.published,
            real_hands=real_hands / self._group.size,  # the workers' losses are averaged
        )
        self.optimizer.zero_grad(set_to_none=True)
        (self.weight * loss).backward()  # type: ignore[no-untyped-call]  # torch ships it untyped
        self._group.average_gradients(self.judge.parameters())
        self.optimizer.step()
        parts = {"prior/judging": loss.detach()}
        self._group.average(list(parts.values()))
        return parts

    def _real(self, batch: Tensors, step: int, predicted: int) -> tuple[Tensor, Tensor]:
        """This worker's real hands (R,15,3,3) and their shapes (R,10); R may be 0."""
        device = next(self.judge.parameters()).device
        if self.mocap is None:
            trusted = (batch["labels/has_hand_pose"] > 0) & (batch["labels/has_betas"] > 0)
            return rotations(batch["labels/hand_pose"][trusted]), batch["labels/betas"][trusted]
        group = self._group
        count = group.size * predicted * _REAL_A_PREDICTED["paper" if self.published else "corrected"]
        pose, betas = self.mocap.draw(count, self.seed, step, slice(group.rank, None, group.size))
        return pose.to(device), betas.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {"judge": self.judge.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.judge.load_state_dict(state["judge"])
        self.optimizer.load_state_dict(state["optimizer"])
