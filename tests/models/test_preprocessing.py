"""Bytes of pictures to what the networks take."""

from __future__ import annotations

import torch

from models.preprocessing import IMAGE_MEAN, IMAGE_STD, normalise


def test_pixels_are_normalised_a_channel_at_a_time_and_stand_in_planes() -> None:
    pictures = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = normalise(pictures)
    assert (found.shape, found.dtype, found.is_contiguous()) == ((2, 3, 16, 16), torch.float32, True)
    for channel, (mean, std) in enumerate(zip(IMAGE_MEAN, IMAGE_STD, strict=True)):
        wanted = (pictures[..., channel].double() / 255 - mean) / std
        torch.testing.assert_close(found[:, channel].double(), wanted, rtol=0, atol=1e-6)


def test_the_pictures_themselves_stay() -> None:
    pictures = torch.full((1, 4, 4, 3), 7, dtype=torch.uint8)
    normalise(pictures)
    assert (pictures == 7).all()
