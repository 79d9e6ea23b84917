"""How the tokens of a feature map become stored bytes and come back: one class an encoding, numpy only.

float16 and int8 need nothing but the values. pca and codes have constants, which a calibration pass fits to a teacher
(stages/calibrate.py); they stand beside the shards in `codec.safetensors`, and the cache's identity names their sha256.

Shapes: B views, h x w the stored grid, C the teacher's channels, c what is stored of a token, k components, b codes a
token, d the dimensions that codes are chosen in; `...` any leading dimensions. Each view is a product of its own, so
that its bytes do not depend on its neighbours. Products differ in last bits between processors, which can turn a
rounding or a choice between two near codes; `verify` allows for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from storage.config import encoding_parts, is_fitted
from storage.durable import sha256_bytes
from storage.errors import DamageError

Floats = NDArray[np.float32]

CODEC_FILE = "codec.safetensors"
"""The attachment of a cache that holds the constants of its encoding."""

INT8_LIMIT = 127
"""Symmetric: -128 is not used, so that a value and its negative are stored alike."""

CODEBOOK_SIZE = 256
"""Entries that one byte can name."""


class Codec(Protocol):
    """What every encoding can do."""

    @property
    def dimension(self) -> Literal["channel", "component", "code"]:
        """The name of the stored array's last dimension."""

    @property
    def error(self) -> float:
        """Expected relative error of a map (Euclidean norms), as measured at calibration; 0 where there was none."""

    def channels(self, stored: int) -> int:
        """C, of tokens that are stored as `stored` values."""

    def representable(self, features_hwC: Floats) -> bool:
        """Whether these values can be stored: all finite, and still so when they come back."""

    def encode(self, features_BhwC: Floats) -> tuple[NDArray[Any], Floats | None]:
        """Stored values (B,h,w,c) and, where the encoding has one, the scale (B,h,w) of each token."""

    def decode(self, stored: NDArray[Any], scale: Floats | None, out: Floats) -> None:
        """Write the values of stored tokens (...,h,w,c) into `out` (...,h,w,C)."""


@dataclass(frozen=True)
class Float16Codec:
    """The values themselves, in half precision."""

    dimension: ClassVar[Literal["channel"]] = "channel"
    error: float = 0.0

    def channels(self, stored: int) -> int:
        return stored

    def representable(self, features_hwC: Floats) -> bool:
        """Whether no value becomes infinite: float16 ends at 65504."""
        return bool(np.abs(features_hwC).max() < np.finfo(np.float16).max)  # of NaN too this is False

    def encode(self, features_BhwC: Floats) -> tuple[NDArray[Any], None]:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(features_BhwC, dtype=np.float16), None

    def decode(self, stored: NDArray[Any], scale: Floats | None, out: Floats) -> None:
        assert scale is None
        np.copyto(out, stored)


@dataclass(frozen=True)
class Int8Codec:
    """A byte a channel and one scale a token: value = stored * scale. Elementwise: the same bytes on any processor."""

    dimension: ClassVar[Literal["channel"]] = "channel"
    error: float = 0.0

    def channels(self, stored: int) -> int:
        return stored

    def representable(self, features_hwC: Floats) -> bool:
        return bool(np.isfinite(features_hwC).all())

    def encode(self, features_BhwC: Floats) -> tuple[NDArray[Any], Floats]:
        magnitude = np.maximum(features_BhwC.max(axis=-1), -features_BhwC.min(axis=-1))
        scale: Floats = magnitude * np.float32(1 / INT8_LIMIT)
        return _rounded(features_BhwC / _nonzero(scale)[..., None]), scale

    def decode(self, stored: NDArray[Any], scale: Floats | None, out: Floats) -> None:
        assert scale is not None
        np.copyto(out, stored)
        out *= scale[..., None]  # after the copy: a third faster than multiplying int8 by float32


@dataclass(frozen=True, eq=False)
class PcaCodec:
    """A byte for each of the first k principal components: value = mean + (stored * scale) @ components."""

    mean: Floats
    """(C,)"""
    components: Floats
    """(k,C), orthonormal rows."""
    scale: Floats
    """(k,): a component's step, its largest magnitude at calibration / 127."""
    error: float
    dimension: ClassVar[Literal["component"]] = "component"

    def __post_init__(self) -> None:
        k, channels = self.components.shape
        assert (self.mean.shape, self.scale.shape) == ((channels,), (k,))

    def channels(self, stored: int) -> int:
        assert stored == len(self.scale)
        return len(self.mean)

    def representable(self, features_hwC: Floats) -> bool:
        return bool(np.isfinite(features_hwC).all())

    def encode(self, features_BhwC: Floats) -> tuple[NDArray[Any], None]:
        return _rounded(_projected(features_BhwC, self.mean, self.components) / self.scale), None

    def decode(self, stored: NDArray[Any], scale: Floats | None, out: Floats) -> None:
        assert scale is None
        np.matmul(stored.astype(np.float32), self._basis, out=out)
        out += self.mean

    @cached_property
    def _basis(self) -> Floats:
        basis: Floats = self.components * self.scale[:, None]
        return basis


@dataclass(frozen=True, eq=False)
class CodesCodec:
    """b bytes a token, each naming a row of its codebook: value = mean + (the sum of the rows) @ components.

    Residual quantisation: every byte names the row nearest to what the bytes before it have left.
    """

    mean: Floats
    """(C,)"""
    components: Floats
    """(d,C), orthonormal rows: the space that the codebooks are in."""
    codebooks: Floats
    """(b,256,d)"""
    error: float
    dimension: ClassVar[Literal["code"]] = "code"

    def __post_init__(self) -> None:
        d, channels = self.components.shape
        assert (self.mean.shape, self.codebooks.shape[1:]) == ((channels,), (CODEBOOK_SIZE, d))

    def channels(self, stored: int) -> int:
        assert stored == len(self.codebooks)
        return len(self.mean)

    def representable(self, features_hwC: Floats) -> bool:
        return bool(np.isfinite(features_hwC).all())

    def encode(self, features_BhwC: Floats) -> tuple[NDArray[Any], None]:
        left = _projected(features_BhwC, self.mean, self.components)
        codes = np.empty((*left.shape[:-1], len(self.codebooks)), np.uint8)
        for place, codebook in enumerate(self.codebooks):
            distances = left @ (codebook.T * np.float32(-2))  # and |left|^2, which is the same for every row
            distances += np.square(codebook).sum(axis=-1)
            nearest = distances.argmin(axis=-1)
            codes[..., place] = nearest
            left -= codebook[nearest]
        return codes, None

    def decode(self, stored: NDArray[Any], scale: Floats | None, out: Floats) -> None:
        assert scale is None
        total = self.codebooks[0][stored[..., 0]]
        for place in range(1, len(self.codebooks)):
            total += self.codebooks[place][stored[..., place]]
        np.matmul(total, self.components, out=out)
        out += self.mean


FittedCodec = PcaCodec | CodesCodec


def _projected(features_BhwC: Floats, mean: Floats, components: Floats) -> Floats:
    """Coordinates (B,h,w,k) of tokens along components (k,C); one product a view."""
    B, h, w, C = features_BhwC.shape
    centred_BTC: Floats = features_BhwC.reshape(B, h * w, C) - mean
    projected_BTk: Floats = centred_BTC @ components.T
    return projected_BTk.reshape(B, h, w, len(components))


def _nonzero(scale: Floats) -> Floats:
    """1 where a scale is 0, of what is nothing but zeros."""
    return np.where(scale > 0, scale, np.float32(1)).astype(np.float32, copy=False)


def _rounded(values: Floats) -> NDArray[np.int8]:
    """To the nearest whole number, ties to even, and no further than +-127."""
    np.rint(values, out=values)
    np.clip(values, -INT8_LIMIT, INT8_LIMIT, out=values)
    return values.astype(np.int8)


def as_stored(features_BhwC: Floats, codec: Codec) -> Floats:
    """Features through an encoding and back."""
    decoded = np.empty(features_BhwC.shape, np.float32)
    codec.decode(*codec.encode(features_BhwC), decoded)
    return decoded


def codec_bytes(codec: FittedCodec) -> bytes:
    """The content of `codec.safetensors`."""
    return save_tensors({field.name: np.atleast_1d(getattr(codec, field.name)) for field in fields(codec)})


def read_codec(encoding: str, data: bytes) -> FittedCodec:
    """The codec of a fitted encoding, from the bytes of its file.

    Raises:
        ValueError: they are not those of such a codec.
    """
    kind, number = encoding_parts(encoding)
    try:
        arrays = load_tensors(data)
        error = float(arrays.pop("error").item())
        constants: dict[str, Any] = {name: value.astype(np.float32, copy=False) for name, value in arrays.items()}
        codec = PcaCodec(**constants, error=error) if kind == "pca" else CodesCodec(**constants, error=error)
    except (SafetensorError, KeyError, TypeError, ValueError, AssertionError) as problem:
        raise ValueError(f"is no codec of {encoding}: {problem}") from problem
    if number != len(codec.scale if isinstance(codec, PcaCodec) else codec.codebooks):
        raise ValueError(f"is not the codec of {encoding}, but of another number")
    return codec


def open_codec(root: Path, features: Mapping[str, Any]) -> Codec:
    """The codec of a cache folder. features: that part of its identity (`encoding`, and `codec_sha256` if fitted).

    Raises:
        DamageError: `codec.safetensors` is not the one that the identity names.
    """
    encoding = str(features["encoding"])
    if not is_fitted(encoding):
        return Float16Codec() if encoding == "float16" else Int8Codec()
    path = root / CODEC_FILE
    try:
        data = path.read_bytes()
        if sha256_bytes(data) != features["codec_sha256"]:
            raise ValueError("has other bytes than the identity names")
        return read_codec(encoding, data)
    except (OSError, ValueError) as error:
        raise DamageError(f"{path} is damaged ({error}); run `handstill verify`, then `handstill run`") from error
