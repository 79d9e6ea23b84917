"""torchvision's networks as backbones, cut where Fast-HaMeR cuts them: they read that code's checkpoints.

For new students timm's (models/backbones.py) are the wider choice; the same network has other names for its weights
there, and for some another epsilon.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone_names import PREFIX
from models.checkpoint import read_checkpoint
from models.preprocessing import shrunk
from models.sizes import IMAGE_SIZE
from storage.errors import InputError

_FEATURES = ("mobilenet_v3_large", "mobilenet_v3_small", "convnext_tiny", "convnext_base", "convnext_large")
_FEATURES_POOLED = ("efficientnet_v2_m", "efficientnet_v2_l")
_RESNETS = ("resnet50", "resnet101", "wide_resnet50_2", "wide_resnet101_2")
_TRANSFORMERS = ("vit_b_16", "vit_l_16", "vit_h_14")
NAMES = (*_FEATURES, *_FEATURES_POOLED, *_RESNETS, *_TRANSFORMERS)

_VIT_INPUT = 224
"""Fast-HaMeR shrinks the crop to the size that torchvision's transformers were made for."""


class TorchvisionBackbone(nn.Module):
    """(B,3,256,256) to (B,C,H,W). `body`'s entries are named as in Fast-HaMeR's checkpoints under `backbone.`.

    The EfficientNets end in their average pooling, as published: a map of one token. `weights`: a local file in
    torchvision's names. `input_px`: the side to which it shrinks the picture first. Raises InputError for an unknown
    name and for weights of another network.
    """

    def __init__(self, name: str, weights: Path | None = None, input_px: int = IMAGE_SIZE) -> None:
        super().__init__()
        self.input_px = input_px
        model = _create(name)
        if weights is not None:
            try:
                model.load_state_dict(read_checkpoint(weights), strict=True)
            except RuntimeError as error:
                raise InputError(f"{weights}: not the weights of {name} in torchvision's names: {error}") from error
        self.is_transformer = name in _TRANSFORMERS
        self.body = _without_classifier(name, model)

    def forward(self, images: Tensor) -> Tensor:
        images = shrunk(images, self.input_px)
        features: Tensor = _token_map(self.body, images) if self.is_transformer else self.body(images)
        return features


@lru_cache
def torchvision_feature_shape(name: str, input_px: int = IMAGE_SIZE) -> tuple[int, int, int]:
    """(C,H,W) of the feature map of a picture of that side, without memory or arithmetic. Raises InputError."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        features = TorchvisionBackbone(name, input_px=input_px).eval()(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    channels, height, width = features.shape[1:]
    return channels, height, width


def _create(name: str) -> Any:
    if name not in NAMES:
        raise InputError(f"backbone {PREFIX}{name}: found no such network. Wanted one of {', '.join(NAMES)}.")
    return torchvision.models.get_model(name, weights=None)


def _without_classifier(name: str, model: Any) -> nn.Module:
    if name in _FEATURES:
        features: nn.Module = model.features
        return features
    if name in _TRANSFORMERS:
        del model.heads
        whole: nn.Module = model
        return whole
    return nn.Sequential(*list(model.children())[: -1 if name in _FEATURES_POOLED else -2])


def _token_map(model: Any, images: Tensor) -> Tensor:
    """A transformer's tokens after its last norm, without the class token, as a map."""
    images = F.interpolate(images, size=(_VIT_INPUT, _VIT_INPUT), mode="bilinear", align_corners=False)
    patches: Tensor = model.conv_proj(images)
    tokens_BTC = patches.flatten(2).transpose(1, 2)
    tokens_BTC = torch.cat([model.class_token.expand(len(tokens_BTC), -1, -1), tokens_BTC], dim=1)
    seen: Tensor = model.encoder(tokens_BTC)[:, 1:]
    return seen.transpose(1, 2).reshape(patches.shape)
