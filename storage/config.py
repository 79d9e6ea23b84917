"""The strict base of every configuration section, and the `cache` section of pipeline.yaml."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FeatureGrid = Literal["full", "8x8-paper", "8x6-geometric"]
FeatureEncoding = Literal["float16", "int8"]


class Section(BaseModel):
    """One section of pipeline.yaml: unknown keys and wrong types are errors, values cannot be changed after loading."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class PicturesConfig(Section):
    codec: Literal["jpeg", "png"] = "jpeg"
    """How the 256x256 pictures are stored; the teacher looks at the decoded bytes, so both see the same pixels."""
    quality: int = Field(default=95, ge=1, le=100)
    """JPEG quality; ignored for png."""


class FeaturesConfig(Section):
    grid: FeatureGrid = "8x8-paper"
    """Which map of the teacher's 16x12 tokens is stored: all of it, the paper's bilinear 8x8, or the 8x6 average
    pooling that is geometrically aligned with the student's inner six columns."""
    encoding: FeatureEncoding = "int8"
    """How a stored token's channels are written: float16, or int8 with one scale a token."""


class CacheConfig(Section):
    """What is stored for each sample. Every key here is part of the cache's identity."""

    views: int = Field(default=3, ge=1, le=64)
    """Teacher views a training sample: view 0 is the plain crop, the others are augmented. Evaluation sets always
    have two: the students' box and the teacher's own, wider one."""
    augmentation: Literal["hamer", "none"] = "hamer"
    """The ranges of the views after the first: HaMeR's own, or none (every view is the plain crop)."""
    pictures: PicturesConfig = PicturesConfig()
    features: FeaturesConfig = FeaturesConfig()
    samples_per_shard: int = Field(default=512, ge=1, le=65536)
    """At most this many samples a shard; a shard never spans two source files."""
    strict_numerics: bool = False
    """Also make a shard stale when only the device kind or the torch version that wrote it differs."""
