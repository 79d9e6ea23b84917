"""The teacher: HaMeR's network with a checkpoint's weights. It looks; it never learns.

No training process imports this module (the import contracts in pyproject.toml say so, and the trainer checks).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from models.checkpoint import read_checkpoint
from models.hamer import Hamer, HamerConfig
from models.hand_model import HandModel
from models.mano import ManoLayer
from models.model_config import model_config_path
from models.sizes import IMAGE_SIZE
from models.weight_loading import LEARNT, KeyReport, checkpoint_hand_model, loaded_weight

Precision = Literal["fp32", "bf16"]

_SIZES_FROM = "MODEL.BACKBONE: EMBED_DIM, DEPTH, NUM_HEADS; absent: ViT-H"


class Teacher(nn.Module):
    """HaMeR in eval mode for good; call it on normalised crops (B,3,256,256). Made by `load_teacher`.

    Returns the mapping of `models.hamer.Hamer`, all float32, outside of any gradient.
    """

    def __init__(self, network: Hamer, precision: Precision, report: KeyReport, *, compiled: bool = False) -> None:
        super().__init__()
        if precision == "bf16":
            _store_products_in_bf16(network)
        self.network = network.eval().requires_grad_(False)
        self.precision = precision
        self.report = report
        self.training = False
        if compiled:
            network.backbone.compile()  # the backbone is 94% of the parameters; the head would only be slower to start

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
    *,
    compiled: bool = False,
) -> Teacher:
    """HaMeR with the weights of an official Lightning checkpoint, or of one that takes its place (AnyHand's).

    model_config.yaml stands in the folder above the checkpoint's own, or beside the checkpoint.
    `mano_model`: a file for `load_hand_model`, or `open-hand`; None: the checkpoint's own `mano.*`, as HaMeR does.
    `precision`: bf16 runs matrix products in bf16 and keeps sums, norms and the hand in fp32. `compiled`: through
    torch.compile, which takes minutes at the first call and a C++ compiler, and moves the answers' last bits.
    Raises InputError that names the key or tensor that is missing, left over, misshapen or not finite.
    """
    path = Path(checkpoint)
    tensors = read_checkpoint(path)
    config = HamerConfig.from_yaml(model_config_path(path))
    mano = ManoLayer(checkpoint_hand_model(path, tensors, mano_model))
    with torch.device("meta"):  # no memory, no random numbers: every entry is replaced
        network = Hamer(config, mano)
    report = KeyReport.of(tensors, network.state_dict(), own_hand_model=mano_model is not None)
    report.demand_all(path, tensors, network.state_dict(), _SIZES_FROM)
    learnt = {
        name: loaded_weight(path, name, tensors[name], device=device) for name in report.used if name.startswith(LEARNT)
    }
    network.load_state_dict(learnt | _under("mano.", mano.state_dict()), strict=True, assign=True)
    return Teacher(network.to(device), precision, report, compiled=compiled)


def teacher_hand_model(checkpoint: str | Path, mano_model: str | Path | None = None) -> HandModel:
    """The hand model that `load_teacher` would use, without loading the network."""
    path = Path(checkpoint)
    return checkpoint_hand_model(path, read_checkpoint(path) if mano_model is None else {}, mano_model)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def _store_products_in_bf16(network: Hamer) -> None:
    """Cast the weights of matrix products once: autocast would cast 0.6 G parameters anew in every call."""
    head = network.mano_head
    exact = (head.decpose, head.decshape, head.deccam)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in exact:
            module.to(torch.bfloat16)
