"""The backbone of HaMeR: a plain vision transformer of any size, under the names of its checkpoints.

B batch, T = 16 x 12 = 192 tokens, C channels. Attention is PyTorch's fused one, but where that is slower.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.sizes import IMAGE_SIZE, VitSizes

PATCH = 16
GRID_HW = (16, 12)
FIELD_COLUMNS = slice(32, 224)
"""The columns of the 256-pixel crop that the network looks at: it was made for pictures of 256 x 192."""


class Vit(nn.Module):
    """(B,3,256,256) normalised crops to a feature map (B,C,16,12) of their columns 32..224."""

    def __init__(self, sizes: VitSizes) -> None:
        super().__init__()
        tokens = GRID_HW[0] * GRID_HW[1]
        self.patch_embed = _PatchEmbed(sizes.embed_dim)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens + 1, sizes.embed_dim), std=0.02))
        self.blocks = nn.ModuleList([_Block(sizes) for _ in range(sizes.depth)])
        self.last_norm = _norm(sizes.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        features_BCT = self.transform(self.embed(images)).transpose(1, 2)
        return features_BCT.reshape(*features_BCT.shape[:2], *GRID_HW)

    def embed(self, images: Tensor) -> Tensor:
        """(B,3,256,256) to tokens (B,T,C) that know their places, row by row."""
        x_BTC = self.patch_embed(images[..., FIELD_COLUMNS])
        # Entry 0 was the class token's place; ViTPose, whose weights these were, adds it to every token.
        embedded: Tensor = x_BTC + self.pos_embed[:, 1:] + self.pos_embed[:, :1]
        return embedded

    def transform(self, x_BTC: Tensor) -> Tensor:
        """Embedded tokens, all or some of them, to features (B,T,C)."""
        for block in self.blocks:
            x_BTC = block(x_BTC)
        features: Tensor = self.last_norm(x_BTC)
        return features


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)  # PyTorch's default is 1e-5


class _PatchEmbed(nn.Module):
    """The convolution 16 x 16, stride 16, padding 2, computed as the matrix product that it is.

    With a padding of 2 the sixteen rows of patches cover picture rows -2..253, and the twelve columns -2..189: the last
    two rows and columns have no influence. As a product it keeps fp32 exact on GPUs, whose convolutions round to TF32.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, stride=PATCH, padding=2)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        rows, columns = GRID_HW
        patches_B3RYCX = F.pad(images_B3HW, (2, -2, 2, -2)).reshape(-1, 3, rows, PATCH, columns, PATCH)
        patches_BTP = patches_B3RYCX.permute(0, 2, 4, 1, 3, 5).reshape(-1, rows * columns, 3 * PATCH * PATCH)
        return F.linear(patches_BTP, self.proj.weight.flatten(1), self.proj.bias)


class _Block(nn.Module):
    def __init__(self, sizes: VitSizes) -> None:
        super().__init__()
        self.norm1 = _norm(sizes.embed_dim)
        self.attn = _Attention(sizes)
        self.norm2 = _norm(sizes.embed_dim)
        self.mlp = _Mlp(sizes.embed_dim)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attn(self.norm1(x_BTC))
        attended: Tensor = x_BTC + self.mlp(self.norm2(x_BTC))
        return attended


class _Attention(nn.Module):
    def __init__(self, sizes: VitSizes) -> None:
        super().__init__()
        self.heads = sizes.num_heads
        self.qkv = nn.Linear(sizes.embed_dim, 3 * sizes.embed_dim)
        self.proj = nn.Linear(sizes.embed_dim, sizes.embed_dim)

    def forward(self, x_BTC: Tensor) -> Tensor:
        batch, tokens, width = x_BTC.shape
        qkv = self.qkv(x_BTC).view(batch, tokens, 3, self.heads, width // self.heads)
        q_BHTD, k_BHTD, v_BHTD = qkv.permute(2, 0, 3, 1, 4)
        mixed_BHTD = _attend(q_BHTD, k_BHTD, v_BHTD)
        projected: Tensor = self.proj(mixed_BHTD.transpose(1, 2).flatten(2))
        return projected


def _attend(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
    if torch.is_grad_enabled() and torch.is_autocast_enabled("cpu") and q_BHTD.device.type == "cpu":
        # In bfloat16 on a CPU the single products train 1.4 times as fast: the fused kernel's backward is slow there.
        scores_BHTT = (q_BHTD * q_BHTD.shape[-1] ** -0.5) @ k_BHTD.transpose(-1, -2)
        mixed_BHTD: Tensor = scores_BHTT.softmax(dim=-1) @ v_BHTD
        return mixed_BHTD
    return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD)


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        widened: Tensor = self.fc2(F.gelu(self.fc1(x_BTC)))
        return widened


assert GRID_HW[0] * PATCH == IMAGE_SIZE
assert GRID_HW[1] * PATCH == FIELD_COLUMNS.stop - FIELD_COLUMNS.start
