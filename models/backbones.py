"""timm's models as backbones: a picture in, the last feature map out. timm is the registry; nothing is downloaded."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import reparameterize_model
from torch import Tensor, nn

from models.backbone_names import plugin
from models.checkpoint import read_checkpoint
from models.preprocessing import shrunk
from models.sizes import IMAGE_SIZE
from storage.errors import InputError


class TimmBackbone(nn.Module):
    """(B,3,256,256) to (B,C,H,W), for convolutional networks and transformers alike.

    Modules behind the feature map (pooling's norms, classifiers) are cut off: every parameter takes part.
    `weights`: a local file in timm's names; None: random. `input_px`: the side to which it shrinks the picture first.
    Raises InputError for an unknown name, and for weights of another network.
    """

    def __init__(self, name: str, weights: Path | None = None, input_px: int = IMAGE_SIZE) -> None:
        super().__init__()
        anatomy = _anatomy(name, input_px)
        self.feature_shape = anatomy.feature_shape
        """(C,H,W)"""
        self.name, self.input_px = name, input_px
        self.body = _create(name, input_px) if weights is None else _create_pretrained(name, input_px, anatomy, weights)
        for module in anatomy.unused:
            self.body.set_submodule(module, nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        return _feature_map(self.body, shrunk(images, self.input_px))

    def with_stage(self, images: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the last map of that stride on the way to it (`timm_stage_shape`)."""
        index, _ = _stage(self.name, self.input_px, stride)
        last, (stage,) = self.body.forward_intermediates(shrunk(images, self.input_px), indices=[index], norm=False)
        return _as_map(self.body, last), stage

    def fuse(self) -> None:
        """Join what timm knows to be one convolution, in place; for answering only (`Student.fused`)."""
        self.body = reparameterize_model(self.body, inplace=True)


def timm_feature_shape(name: str, input_px: int = IMAGE_SIZE) -> tuple[int, int, int]:
    """(C,H,W) of a timm model's last feature map, without building the model. Raises InputError."""
    return _anatomy(name, input_px).feature_shape


def timm_stage_shape(name: str, input_px: int, stride: int) -> tuple[int, int, int]:
    """(C,H,W) of a timm model's last map of that stride. Raises InputError where it has none, naming those it has."""
    return _stage(name, input_px, stride)[1]


@lru_cache
def _stage(name: str, input_px: int, stride: int) -> tuple[int, tuple[int, int, int]]:
    """Which of timm's stages it is, and its shape."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        body = _create(name, input_px).eval()
        if not hasattr(body, "forward_intermediates"):
            raise InputError(f"backbone {name!r}: timm gives no maps of its stages; leave at_stride out.")
        strides = [int(stage["reduction"]) for stage in body.feature_info]
        if stride not in strides:
            found = ", ".join(map(str, sorted(set(strides))))
            raise InputError(f"backbone {name!r}: found maps of stride {found}, none of {stride}; change at_stride.")
        index = max(index for index, found in enumerate(strides) if found == stride)
        picture = torch.empty(1, 3, input_px, input_px)
        (stage,) = body.forward_intermediates(picture, indices=[index], norm=False, intermediates_only=True)
    channels, height, width = stage.shape[1:]
    return index, (channels, height, width)


@dataclass(frozen=True)
class _Anatomy:
    feature_shape: tuple[int, int, int]
    unused: tuple[str, ...]
    """Modules whose parameters the feature map does not depend on."""
    used_entries: frozenset[str]
    """Entries of the state dictionary that a file of weights must have."""
    classifiers: tuple[str, ...]


@lru_cache
def _anatomy(name: str, input_px: int) -> _Anatomy:
    """Look through a model without memory or arithmetic: which parameters get a gradient from the feature map?"""
    try:
        # fork: what a seed gives must not depend on what was looked at before
        with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.enable_grad():
            body = _create(name, input_px).eval()
            features = _feature_map(body, torch.empty(1, 3, input_px, input_px))
            features.sum().backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError, AttributeError, TypeError, NotImplementedError) as error:
        raise InputError(
            f"backbone {name!r}: timm gives no feature map (B,C,H,W) of a {input_px}-pixel picture: {error}"
        ) from error
    if features.ndim != 4:
        raise InputError(f"backbone {name!r}: its features have shape {tuple(features.shape)}, wanted (B,C,H,W).")
    unused = {entry.rpartition(".")[0] for entry, parameter in body.named_parameters() if parameter.grad is None} - {""}
    kept = (entry for entry in body.state_dict() if entry.rpartition(".")[0] not in unused)
    classifier = body.pretrained_cfg.get("classifier") or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    channels, height, width = features.shape[1:]
    return _Anatomy((channels, height, width), tuple(sorted(unused)), frozenset(kept), classifiers)


def _create(name: str, input_px: int, **options: Any) -> Any:
    if not timm.is_model(name):
        _load_plugin(name)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        listing = "`.venv/bin/python -c 'import timm; print(timm.list_models())'`"
        raise InputError(f"backbone {name!r} is no timm model.{hint} {listing} lists all.")
    config = timm.models.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:  # transformers are built for one size
        options["img_size"] = input_px
    return timm.create_model(name, num_classes=0, **options)


def _load_plugin(name: str) -> None:
    """Import the package that brings a backbone of that name, if one does."""
    found = plugin(name)
    if found is None:
        return
    try:
        found.load()
    except Exception as error:  # another package's code
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"backbone {name!r}: its entry point {found.value} does not load: {why}") from error
    if not timm.is_model(name):
        raise InputError(
            f"backbone {name!r}: {found.value}, its entry point, registers no model of that name with timm"
        )


def _feature_map(body: Any, images: Tensor) -> Tensor:
    return _as_map(body, body.forward_features(images))


def _as_map(body: Any, features: Tensor) -> Tensor:
    """timm's answer, whatever the kind of network, as (B,C,H,W)."""
    if features.ndim == 3:  # tokens; the class token and registers come first
        tokens_BTC = features[:, body.num_prefix_tokens :]
        height, width = body.patch_embed.grid_size
        return tokens_BTC.transpose(1, 2).reshape(tokens_BTC.shape[0], -1, height, width)
    return features.permute(0, 3, 1, 2) if getattr(body, "output_fmt", "NCHW") == "NHWC" else features


def _create_pretrained(name: str, input_px: int, anatomy: _Anatomy, weights: Path) -> Any:
    tensors = read_checkpoint(weights)
    absent = sorted(anatomy.used_entries - tensors.keys())
    if absent:
        raise InputError(
            f"{weights}: {absent[0]} is missing ({len(absent)} of {len(anatomy.used_entries)} are). Wanted weights of "
            f"{name} in timm's names."
        )
    behind = (*anatomy.unused, *anatomy.classifiers)
    strays = [entry for entry in tensors.keys() - anatomy.used_entries if not entry.startswith(behind)]
    if strays:
        raise InputError(
            f"{weights}: {min(strays)} is no part of {name} ({len(strays)} such). Another model's weights?"
        )
    try:  # timm itself loads them: it fits a transformer's position embedding to the picture's size
        overlay = {"state_dict": tensors, "source": "timm"}
        return _create(name, input_px, pretrained=True, pretrained_cfg_overlay=overlay)
    except RuntimeError as error:
        raise InputError(f"{weights}: not the weights of {name}: {error}") from error
