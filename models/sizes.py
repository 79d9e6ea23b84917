"""How wide and deep networks are and what they look at. Light to import: pipeline.yaml names these sizes too."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from storage.config import Section

_WIDEST, _DEEPEST = 1 << 14, 256
"""Far beyond any hand network: sizes from a damaged or hostile file end here, not in an allocation."""

HAMER = "hamer"
"""The name of HaMeR's own backbone where students name theirs; any other is timm's or torchvision's."""

IMAGE_SIZE = 256
"""Side of the square crop, pixels (MODEL.IMAGE_SIZE of the released model_config.yaml)."""

InputPx = Annotated[int, Field(ge=128, le=256, multiple_of=32)]
"""Side of the picture that a backbone looks at, pixels. Below 128 two pixels of four would be left out by the resize,
and networks halve a picture five times."""


class VitSizes(Section):
    """Width and depth of the backbone. The defaults are ViT-H, which the released model_config.yaml means without
    saying so."""

    embed_dim: int = Field(default=1280, ge=1, le=_WIDEST)
    """Channels of a token."""
    depth: int = Field(default=32, ge=1, le=_DEEPEST)
    """Blocks."""
    num_heads: int = Field(default=16, ge=1, le=_WIDEST)
    """Of attention; they share the channels."""

    @model_validator(mode="after")
    def _divides(self) -> VitSizes:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is no multiple of num_heads {self.num_heads}")
        return self


def input_problem(backbone: str, input_px: int) -> str | None:
    """Why a backbone cannot look at a picture of that side; None: it can, as far as its name tells."""
    if backbone != HAMER or input_px == IMAGE_SIZE:
        return None
    return f"input_px {input_px} with backbone {HAMER}: HaMeR's own network looks at {IMAGE_SIZE}; leave input_px out"


class DecoderSizes(Section):
    """The head: TRANSFORMER_DECODER of model_config.yaml; the defaults are the released ones."""

    dim: int = Field(default=1024, ge=1, le=_WIDEST)
    """Channels of its one token."""
    depth: int = Field(default=6, ge=1, le=_DEEPEST)
    """Layers."""
    heads: int = Field(default=8, ge=1, le=_WIDEST)
    """Of attention, each `dim_head` wide."""
    dim_head: int = Field(default=64, ge=1, le=_WIDEST)
    mlp_dim: int = Field(default=1024, ge=1, le=_WIDEST)
