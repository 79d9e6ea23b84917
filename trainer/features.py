"""The teacher's stored features as tensors: what storage/codecs.py decodes, decoded where the student trains.

Shapes: B views, h x w the stored grid, C the teacher's channels, k components, b codes a token, d the dimensions that
codes are chosen in. The result is (B,C,h,w), as networks have it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from storage.codecs import Codec, CodesCodec, PcaCodec


class FeatureDecoder(nn.Module):
    """float16 and int8: the values, times the scale of their token where there is one. Of any number of channels."""

    def forward(self, stored_Bhwc: Tensor, scale_Bhw: Tensor | None = None) -> Tensor:
        """The teacher's map (B,C,h,w) as float32."""
        values_BhwC = stored_Bhwc.float()
        if scale_Bhw is not None:
            values_BhwC = values_BhwC * scale_Bhw[..., None]
        return values_BhwC.permute(0, 3, 1, 2)


class PcaDecoder(FeatureDecoder):
    """Principal components: one product with what makes channels of them."""

    mean: Tensor
    """(C,)"""
    basis: Tensor
    """(k,C): the components, each times its step."""

    def __init__(self, codec: PcaCodec) -> None:
        super().__init__()
        _constants(self, mean=codec.mean, basis=codec.components * codec.scale[:, None])

    def forward(self, stored_Bhwc: Tensor, scale_Bhw: Tensor | None = None) -> Tensor:
        assert scale_Bhw is None
        values_BhwC = torch.matmul(stored_Bhwc.float(), self.basis) + self.mean
        return values_BhwC.permute(0, 3, 1, 2)


class CodesDecoder(FeatureDecoder):
    """Codes: rows of all codebooks, looked up and summed in one go, then one product."""

    mean: Tensor
    """(C,)"""
    basis: Tensor
    """(d,C)"""
    rows: Tensor
    """(b*256,d): all codebooks, one after the other."""
    first: Tensor
    """(b,): where each begins."""

    def __init__(self, codec: CodesCodec) -> None:
        super().__init__()
        b, size, d = codec.codebooks.shape
        _constants(self, mean=codec.mean, basis=codec.components, rows=codec.codebooks.reshape(b * size, d))
        _constants(self, first=np.arange(b) * size)

    def forward(self, stored_Bhwc: Tensor, scale_Bhw: Tensor | None = None) -> Tensor:
        assert scale_Bhw is None
        B, h, w, b = stored_Bhwc.shape
        rows_Tb = (stored_Bhwc.long() + self.first).reshape(-1, b)
        summed_Td = nn.functional.embedding_bag(rows_Tb, self.rows, mode="sum")
        values_TC = torch.matmul(summed_Td, self.basis) + self.mean
        return values_TC.reshape(B, h, w, -1).permute(0, 3, 1, 2)


def feature_decoder(codec: Codec) -> FeatureDecoder:
    """The decoder of a cache's features."""
    if isinstance(codec, PcaCodec):
        return PcaDecoder(codec)
    return CodesDecoder(codec) if isinstance(codec, CodesCodec) else FeatureDecoder()


def _constants(module: nn.Module, **arrays: NDArray[np.float32] | NDArray[np.int64]) -> None:
    """Buffers that move with the module and are no part of its checkpoints: the cache has them."""
    for name, values in arrays.items():
        module.register_buffer(name, torch.from_numpy(np.array(values)), persistent=False)
