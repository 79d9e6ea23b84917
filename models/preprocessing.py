"""From a picture's bytes to what the networks take; the constants of HaMeR's camera and input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""RGB, of pixels in 0..1 (MODEL.IMAGE_MEAN and IMAGE_STD there; ImageNet's)."""

FOCAL_LENGTH_PX = 5000.0
"""Focal length of the crop's camera (EXTRA.FOCAL_LENGTH there): nearly orthographic, so the depth is a convention."""


def shrunk(images: Tensor, input_px: int) -> Tensor:
    """(B,3,256,256) to (B,3,input_px,input_px), for 128 to 256. Bilinear: no pixel is left out, and at 128 each is the
    mean of four."""
    if images.shape[-1] == input_px:
        return images
    return F.interpolate(images, size=(input_px, input_px), mode="bilinear", align_corners=False)


def normalise(pictures: Tensor) -> Tensor:
    """uint8 RGB (B,256,256,3) to float32 (B,3,256,256), mean 0 and variance 1 over ImageNet; on the same device."""
    assert pictures.dtype == torch.uint8, pictures.dtype
    mean = torch.tensor(IMAGE_MEAN, device=pictures.device)[:, None, None] * 255
    std = torch.tensor(IMAGE_STD, device=pictures.device)[:, None, None] * 255
    # contiguous: a permuted tensor is channels-last, and FastViT's training step crashes on those. Moved before the
    # arithmetic: an innermost dimension of three is nine times as slow on a CPU, for the same bits
    planes = pictures.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.sub_(mean).div_(std)
