"""Fast-HaMeR's own student checkpoints, as students of this package. Source read: Fast-HaMeR 009821c.

Such a file holds more than the student: the whole teacher under `teacher.`, the projection of its features, HaMeR's
discriminator. All of that is left aside and reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.backbone_names import PREFIX
from models.checkpoint import read_checkpoint
from models.hamer import HamerConfig, decoder_sizes, read_model_config
from models.hand_model import OPEN_HAND, load_hand_model
from models.model_config import model_config_path
from models.preprocessing import FOCAL_LENGTH_PX
from models.sizes import HAMER
from models.student import Student, StudentSpec, feature_shape
from models.weight_loading import LEARNT, KeyReport, checkpoint_hand_model, loaded_weight
from storage.errors import InputError


@dataclass(frozen=True)
class _Kind:
    """One of Fast-HaMeR's backbones."""

    ours: str
    """Its name in a `StudentSpec`."""
    names: Mapping[str, str]
    """Beginnings of our entries' names (below `backbone.`) to theirs."""


def _torchvision(name: str, below: str = "") -> _Kind:
    return _Kind(PREFIX + name, {"body.": below})


_KINDS: dict[tuple[str, str | None], _Kind] = {
    ("mobilenet_v3", None): _torchvision("mobilenet_v3_large"),
    ("convnext", None): _torchvision("convnext_large"),
    ("resnet", "50"): _torchvision("resnet50"),
    ("resnet", "101"): _torchvision("resnet101"),
    ("wide_resnet", "50"): _torchvision("wide_resnet50_2"),
    ("wide_resnet", "101"): _torchvision("wide_resnet101_2"),
    ("efficientnet_v2", "medium"): _torchvision("efficientnet_v2_m"),
    ("efficientnet_v2", "large"): _torchvision("efficientnet_v2_l"),
    ("vit_default", "base"): _torchvision("vit_b_16", below="model."),
    ("vit_default", "large"): _torchvision("vit_l_16", below="model."),
    ("vit_default", "huge"): _torchvision("vit_h_14", below="model."),
    ("mobilevit", "small"): _Kind("mobilevit_s", {"body.stem.": "0.", "body.stages.": "1.", "body.final_conv.": "2."}),
}
"""MODEL.BACKBONE's TYPE and SIZE; None: the code knows one size only and does not look."""

_NOT_NEEDED = {"backbone.model.heads.": "ImageNet's classifier, which Fast-HaMeR never calls"}


def load_fast_hamer(checkpoint: str | Path, mano_model: str | Path | None = None) -> tuple[Student, KeyReport]:
    """A student that Fast-HaMeR trained, on the CPU in eval mode, and what became of each entry of its checkpoint.

    checkpoint: <run>/checkpoints/*.ckpt, with <run>/model_config.yaml. mano_model: a file for `load_hand_model`; None:
    the checkpoint's own `mano.*`. `Student.save` then writes it without all that is not needed: 163 MB instead of
    2.8 GB. Raises InputError that names the key or tensor that does not fit.
    """
    path = Path(checkpoint)
    tensors = read_checkpoint(path)
    spec, names = _spec_of(path)
    student = Student(spec, checkpoint_hand_model(path, tensors, mano_model))
    wanted = _entries(student, names)
    report = KeyReport.of(tensors, wanted, own_hand_model=mano_model is not None, also_ignored=_NOT_NEEDED)
    report.demand_all(path, tensors, wanted, "MODEL.BACKBONE and MODEL.MANO_HEAD.TRANSFORMER_DECODER")
    ours = dict(zip(wanted, student.state_dict(), strict=True))
    learnt = {
        ours[name]: loaded_weight(path, name, tensors[name], wanted[name])
        for name in report.used
        if name.startswith(LEARNT)
    }
    mano: dict[str, Tensor] = {name: value for name, value in student.state_dict().items() if name.startswith("mano.")}
    student.load_state_dict(learnt | mano, strict=True)
    return student.eval(), report


@dataclass(frozen=True)
class CheckpointDescription:
    """What `describe_checkpoint` found."""

    network: str
    """The backbone as a `StudentSpec` names it; `hamer` for HaMeR itself and what takes its place."""
    parameters: int
    """Of the network, without what is ignored."""
    model_config: Path
    report: KeyReport


def describe_checkpoint(checkpoint: Path) -> CheckpointDescription:
    """What loading a checkpoint of HaMeR or Fast-HaMeR would make of each entry, without building the network.

    Raises InputError for a file that is neither; entries that do not fit are in the report.
    """
    tensors = read_checkpoint(checkpoint)
    spec, names = _spec_of(checkpoint)
    with torch.device("meta"):
        student = Student(spec, load_hand_model(OPEN_HAND))
    wanted = _entries(student, names)
    report = KeyReport.of(tensors, wanted, own_hand_model=False, also_ignored=_NOT_NEEDED)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    return CheckpointDescription(spec.backbone, parameters, model_config_path(checkpoint), report)


def _entries(student: Student, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The student's entries under the checkpoint's names, in order."""
    return {_name_in_checkpoint(name, names): value for name, value in student.state_dict().items()}


def _name_in_checkpoint(name: str, names: Mapping[str, str]) -> str:
    """What an entry of ours is called in Fast-HaMeR's file."""
    for ours, theirs in names.items():
        if name.startswith(f"backbone.{ours}"):
            return f"backbone.{theirs}{name.removeprefix(f'backbone.{ours}')}"
    return name


def _spec_of(checkpoint: Path) -> tuple[StudentSpec, Mapping[str, str]]:
    path = model_config_path(checkpoint)
    tree = read_model_config(path)
    backbone = tree["MODEL"]["BACKBONE"] if isinstance(tree.get("MODEL"), dict) else None
    kind = backbone.get("TYPE") if isinstance(backbone, dict) else None
    if kind == "vit":
        config = HamerConfig.from_yaml(path)
        _check_focal(path, config.focal_px)
        return StudentSpec(backbone=HAMER, vit=config.vit, decoder=config.decoder), {}
    found = _KINDS.get((str(kind), None)) or _KINDS.get((str(kind), str(backbone["SIZE"] if backbone else None)))
    if found is None:
        known = ", ".join(sorted({name for name, _ in _KINDS} | {"vit"}))
        size = backbone.get("SIZE") if isinstance(backbone, dict) else None
        raise InputError(f"{path}: MODEL.BACKBONE: found TYPE {kind!r}, SIZE {size!r}. Wanted one of: {known}.")
    spec = StudentSpec(backbone=found.ours)
    decoder, focal_px = decoder_sizes(path, tree, feature_shape(spec)[0])
    _check_focal(path, focal_px)
    return spec.model_copy(update={"decoder": decoder}), found.names


def _check_focal(path: Path, focal_px: Any) -> None:
    if focal_px != FOCAL_LENGTH_PX:
        raise InputError(f"{path}: EXTRA.FOCAL_LENGTH: found {focal_px!r}; students have {FOCAL_LENGTH_PX:g} only.")
