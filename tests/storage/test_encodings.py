from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate

from storage.config import FeatureEncoding
from storage.encodings import (
    decode_features,
    decode_picture,
    encode_features,
    encode_picture,
    grid_shape,
    representable,
    to_grid,
)
from storage.errors import DamageError


def features(shape: tuple[int, ...] = (2, 16, 12, 40)) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 3, shape).astype(np.float32)


def channels_first(values_BHWC: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(values_BHWC).permute(0, 3, 1, 2)


def test_paper_grid_is_torchs_interpolate() -> None:
    wanted = interpolate(channels_first(features()), scale_factor=(8 / 16, 8 / 12), mode="bilinear")
    np.testing.assert_allclose(channels_first(to_grid(features(), "8x8-paper")), wanted, rtol=1e-6, atol=1e-6)


def test_geometric_grid_is_average_pooling() -> None:
    wanted = avg_pool2d(channels_first(features()), 2)
    np.testing.assert_allclose(channels_first(to_grid(features(), "8x6-geometric")), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grid", ["full", "8x8-paper", "8x6-geometric"])
def test_grid_shapes(grid: str) -> None:
    assert to_grid(features(), grid).shape[1:3] == grid_shape(grid, (16, 12))  # type: ignore[arg-type]


def decoded(values: NDArray[np.float32], encoding: FeatureEncoding) -> NDArray[np.float32]:
    stored, scale = encode_features(values, encoding)
    out = np.empty_like(values)
    for item in range(len(values)):
        decode_features(stored[item], None if scale is None else scale[item], out[item])
    return out


@given(hnp.arrays(np.float32, (1, 2, 2, 5), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)))
def test_int8_is_within_half_a_step_of_each_token(values: NDArray[np.float32]) -> None:
    step = np.abs(values).max(axis=-1, keepdims=True) / 127
    assert (np.abs(decoded(values, "int8") - values) <= step * 0.5001 + 1e-30).all()


def test_int8_of_nothing_is_nothing() -> None:
    zeros = np.zeros((1, 8, 8, 4), np.float32)
    assert (decoded(zeros, "int8") == 0).all()


def test_float16_is_numpys() -> None:
    values = features((2, 8, 8, 40))
    np.testing.assert_array_equal(decoded(values, "float16"), values.astype(np.float16).astype(np.float32))


def test_what_cannot_be_stored_is_known() -> None:
    values = np.ones((8, 8, 4), np.float32)
    assert representable(values, "float16")
    values[0, 0, 0] = 1e5
    assert not representable(values, "float16")
    assert representable(values, "int8")
    values[0, 0, 0] = np.nan
    assert not representable(values, "int8")


def picture() -> NDArray[np.uint8]:
    coarse = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC))


def test_png_gives_the_same_pixels() -> None:
    np.testing.assert_array_equal(decode_picture(encode_picture(picture(), "png", 95)), picture())


def test_jpeg_is_a_plain_file_that_other_decoders_read_alike() -> None:
    data = encode_picture(picture(), "jpeg", 95)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decode_picture(data), np.asarray(image))
    assert np.abs(decode_picture(data).astype(int) - picture()).mean() < 3


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8 not a picture", b"\x89PNG", encode_picture(picture(), "jpeg", 95)[:900]]
)
def test_bytes_that_are_no_picture_are_damage(data: bytes) -> None:
    with pytest.raises(DamageError, match="handstill verify"):
        decode_picture(data)
