"""The strict base of every configuration section, and the `cache` section of pipeline.yaml."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

FeatureGrid = Literal["full", "8x8-paper", "8x6-geometric"]
EncodingKind = Literal["float16", "int8", "pca", "codes"]

_ENCODING = re.compile(r"^(?:(float16|int8)|(pca)([1-9][0-9]{0,3})-int8|(codes)([1-9]|[1-5][0-9]|6[0-4]))$")


def encoding_parts(encoding: str) -> tuple[EncodingKind, int]:
    """The kind of an encoding and its number: components for pca, bytes a token for codes, 0 for the others.

    Raises:
        ValueError: it is none of the four forms.
    """
    found = _ENCODING.fullmatch(encoding)
    if found is None:
        raise ValueError(
            f"found {encoding!r}, want float16, int8, pca<k>-int8 (k components of 1 to 9999, as pca128-int8), "
            "or codes<b> (b bytes a token of 1 to 64, as codes16)"
        )
    if found[2]:
        return "pca", int(found[3])
    if found[4]:
        return "codes", int(found[5])
    return ("float16" if found[1] == "float16" else "int8"), 0


def is_fitted(encoding: str) -> bool:
    """Whether the encoding has constants that a calibration pass fits."""
    return encoding_parts(encoding)[0] in ("pca", "codes")


def token_bytes(encoding: str, channels: int) -> int:
    """Stored bytes of one token of that many channels, its scale included."""
    kind, number = encoding_parts(encoding)
    return {"float16": 2 * channels, "int8": channels + 4, "pca": number, "codes": number}[kind]


def _one_of_the_forms(encoding: str) -> str:
    encoding_parts(encoding)
    return encoding


FeatureEncoding = Annotated[
    str, AfterValidator(_one_of_the_forms), WithJsonSchema({"type": "string", "pattern": _ENCODING.pattern})
]


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
    """How a stored token's channels are written: float16; int8 with one scale a token; pca<k>-int8, k principal
    components with a byte each; codes<b>, b bytes that name entries of codebooks. The last two are fitted to the
    teacher by a calibration pass before the first shard."""


class CalibrationConfig(Section):
    """The pass that fits pca and codes encodings; the other encodings have none."""

    views: int = Field(default=4096, ge=1)
    """About this many views of training samples are looked at: all those of each chosen sample."""
    seed: int = Field(default=0, ge=0)
    """Of the choice of samples, and of the fit."""


class CacheConfig(Section):
    """What is stored for each sample. Every key but `root` is part of the cache's identity, `calibration` of those only
    whose encoding it fits."""

    root: str | None = Field(default=None, min_length=1)
    """The folder of the caches; null: `cache` in the workdir. Pipelines that name the same folder share what they have
    in common: a data set of one name and content that one teacher saw under the same settings is cached once."""
    views: int = Field(default=3, ge=1, le=64)
    """Teacher views a training sample: view 0 is the plain crop, the others are augmented. Evaluation sets always
    have two: the students' box and the teacher's own, wider one."""
    augmentation: Literal["hamer", "none"] = "hamer"
    """The ranges of the views after the first: HaMeR's own, or none (every view is the plain crop)."""
    pictures: PicturesConfig = PicturesConfig()
    features: FeaturesConfig = FeaturesConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    samples_per_shard: int = Field(default=512, ge=1, le=65536)
    """At most this many samples a shard; a shard never spans two source files."""
    strict_numerics: bool = False
    """Also make a shard stale when only the device kind or the torch version that wrote it differs."""
