from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate

from storage.encodings import decode_picture, encode_picture, grid_shape, to_grid
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
