"""How wide and deep HaMeR's network is. Light to import: pipeline.yaml names these sizes too."""

from __future__ import annotations

from pydantic import Field, model_validator

from storage.config import Section

_WIDEST, _DEEPEST = 1 << 14, 256
"""Far beyond any hand network: sizes from a damaged or hostile file end here, not in an allocation."""

HAMER = "hamer"
"""The name of HaMeR's own backbone where students name theirs; any other is timm's or torchvision's."""


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
