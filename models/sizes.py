"""How wide and deep HaMeR's network is. Light to import: pipeline.yaml names these sizes too."""

from __future__ import annotations

from pydantic import Field, model_validator

from storage.config import Section

HAMER = "hamer"
"""The name of HaMeR's own backbone where students name theirs; any other is timm's or torchvision's."""


class VitSizes(Section):
    """Width and depth of the backbone. The defaults are ViT-H, which the released model_config.yaml means without
    saying so."""

    embed_dim: int = Field(default=1280, ge=1)
    """Channels of a token."""
    depth: int = Field(default=32, ge=1)
    """Blocks."""
    num_heads: int = Field(default=16, ge=1)
    """Of attention; they share the channels."""

    @model_validator(mode="after")
    def _divides(self) -> VitSizes:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is no multiple of num_heads {self.num_heads}")
        return self


class DecoderSizes(Section):
    """The head: TRANSFORMER_DECODER of model_config.yaml; the defaults are the released ones."""

    dim: int = Field(default=1024, ge=1)
    """Channels of its one token."""
    depth: int = Field(default=6, ge=1)
    """Layers."""
    heads: int = Field(default=8, ge=1)
    """Of attention, each `dim_head` wide."""
    dim_head: int = Field(default=64, ge=1)
    mlp_dim: int = Field(default=1024, ge=1)
