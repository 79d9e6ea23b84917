"""The head of HaMeR: one query token reads a feature map and becomes hand parameters and a camera.

Names of the modules are those of HaMeR's checkpoints (`mano_head.*`). B batch, T tokens, C channels of the feature
map, D width of the decoder, J = 16 joints.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from torch.nn import functional as F

from models.hand_model import JOINTS, SHAPE_COMPONENTS, HandModel
from models.sizes import IMAGE_SIZE, DecoderSizes

MEAN_SHAPE = (0.2056, 0.3356, -0.3507, 0.3561, 0.4175, 0.0309, 0.3048, 0.2361, 0.2091, 0.3121)
MEAN_CAMERA = (4.0, 0.0, 0.0)
"""`shape` and `cam` of the mano_mean_params.npz released with HaMeR."""


class ManoHead(nn.Module):
    """Feature map (B,C,H,W) to global_orient (B,1,3,3), hand_pose (B,15,3,3), betas (B,10) and cam (B,3).

    cam is (s, tx, ty): see `project`. The mean parameters, to which the decoders' outputs are added, are buffers.
    """

    init_hand_pose: Tensor
    init_betas: Tensor
    init_cam: Tensor

    def __init__(self, sizes: DecoderSizes, channels: int) -> None:
        super().__init__()
        self.transformer = _QueryTransformer(sizes, channels)
        self.decpose = nn.Linear(sizes.dim, 6 * JOINTS)
        self.decshape = nn.Linear(sizes.dim, SHAPE_COMPONENTS)
        self.deccam = nn.Linear(sizes.dim, 3)
        self.register_buffer("init_hand_pose", torch.zeros(1, 6 * JOINTS))
        self.register_buffer("init_betas", torch.zeros(1, SHAPE_COMPONENTS))
        self.register_buffer("init_cam", torch.zeros(1, 3))

    def forward(self, features_BCHW: Tensor) -> dict[str, Tensor]:
        token_BD = self.transformer(features_BCHW.flatten(2).transpose(1, 2))
        with torch.autocast(token_BD.device.type, enabled=False):  # bf16's 8 bits: a quarter of a degree
            token_BD = token_BD.float()
            rotations_BJ33 = rotations_from_6d((self.decpose(token_BD) + self.init_hand_pose).view(-1, JOINTS, 6))
            return {
                "global_orient": rotations_BJ33[:, :1],
                "hand_pose": rotations_BJ33[:, 1:],
                "betas": self.decshape(token_BD) + self.init_betas,
                "cam": self.deccam(token_BD) + self.init_cam,
            }

    def start_from_mean(self, hand_model: HandModel) -> None:
        """Make an untrained head answer the mean hand, nearly.

        Shape and camera are HaMeR's means. The pose is the hand model's own mean with the wrist unturned: HaMeR's mean
        has a wrist rotation whose two columns are parallel, so that its decoded value hangs on rounding (1e-7).
        """
        pose = np.concatenate([np.zeros(3, np.float32), hand_model.hands_mean]).reshape(JOINTS, 3)
        columns = Rotation.from_rotvec(pose).as_matrix()[:, :, :2]
        self.init_hand_pose.copy_(torch.from_numpy(columns.transpose(0, 2, 1).reshape(1, -1)))
        self.init_betas.copy_(torch.tensor([MEAN_SHAPE]))
        self.init_cam.copy_(torch.tensor([MEAN_CAMERA]))
        for decoder in (self.decpose, self.decshape, self.deccam):
            nn.init.xavier_uniform_(decoder.weight, gain=0.01)  # HaMeR's INIT_DECODER_XAVIER
            nn.init.zeros_(decoder.bias)


def rotations_from_6d(columns: Tensor) -> Tensor:
    """(..., 6) to rotation matrices (..., 3, 3): two triples, made orthonormal, are the first two columns."""
    first = F.normalize(columns[..., :3], dim=-1)
    along = (first * columns[..., 3:]).sum(-1, keepdim=True)
    second = F.normalize(columns[..., 3:] - along * first, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], dim=-1)


def project(keypoints_3d: Tensor, cam: Tensor, focal_px: float) -> tuple[Tensor, Tensor]:
    """Where points fall in the crop.

    keypoints_3d (B,N,3) metres; cam (B,3) = (s, tx, ty), a weak-perspective camera: the hand is put at depth
    2 f / (256 s) metres, so that s scales the picture. Returns keypoints_2d (B,N,2), crop units: -0.5..0.5 across the
    crop, 0 at its centre; and cam_t (B,3), the translation in metres.
    """
    depth = 2 * focal_px / (IMAGE_SIZE * cam[:, 0] + 1e-9)
    cam_t = torch.stack([cam[:, 1], cam[:, 2], depth], dim=-1)
    placed = keypoints_3d + cam_t[:, None]
    return focal_px / IMAGE_SIZE * placed[..., :2] / placed[..., 2:], cam_t


class _QueryTransformer(nn.Module):
    """A decoder of one token, which attends to itself and to the feature map's tokens. Returns (B,D)."""

    def __init__(self, sizes: DecoderSizes, channels: int) -> None:
        super().__init__()
        self.to_token_embedding = nn.Linear(1, sizes.dim)
        self.pos_embedding = nn.Parameter(torch.randn(1, 1, sizes.dim))
        self.transformer = _Layers(sizes, channels)

    def forward(self, context_BTC: Tensor) -> Tensor:
        nothing = context_BTC.new_zeros(context_BTC.shape[0], 1, 1)  # HaMeR's TRANSFORMER_INPUT: zero
        token_BD: Tensor = self.transformer(self.to_token_embedding(nothing) + self.pos_embedding, context_BTC)[:, 0]
        return token_BD


class _Layers(nn.Module):
    def __init__(self, sizes: DecoderSizes, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_layer(sizes, channels) for _ in range(sizes.depth)])

    def forward(self, token_B1D: Tensor, context_BTC: Tensor) -> Tensor:
        for layer in self.layers:
            for part in layer:  # type: ignore[attr-defined]  # a ModuleList holds Modules, mypy cannot see which
                token_B1D = token_B1D + part(token_B1D, context_BTC)
        return token_B1D


def _layer(sizes: DecoderSizes, channels: int) -> nn.ModuleList:
    parts = (_SelfAttention(sizes), _CrossAttention(sizes, channels), _Mlp(sizes))
    return nn.ModuleList([_PreNorm(sizes.dim, part) for part in parts])


class _PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, token_B1D: Tensor, context_BTC: Tensor) -> Tensor:
        changed: Tensor = self.fn(self.norm(token_B1D), context_BTC)
        return changed


class _SelfAttention(nn.Module):
    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        inner = sizes.heads * sizes.dim_head
        self.heads = sizes.heads
        self.to_qkv = nn.Linear(sizes.dim, 3 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, sizes.dim))

    def forward(self, token_B1D: Tensor, _context: Tensor) -> Tensor:
        q, k, v = self.to_qkv(token_B1D).chunk(3, dim=-1)
        mixed: Tensor = self.to_out(_attend(q, k, v, self.heads))
        return mixed


class _CrossAttention(nn.Module):
    def __init__(self, sizes: DecoderSizes, channels: int) -> None:
        super().__init__()
        inner = sizes.heads * sizes.dim_head
        self.heads = sizes.heads
        self.to_kv = nn.Linear(channels, 2 * inner, bias=False)
        self.to_q = nn.Linear(sizes.dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, sizes.dim))

    def forward(self, token_B1D: Tensor, context_BTC: Tensor) -> Tensor:
        k, v = self.to_kv(context_BTC).chunk(2, dim=-1)
        mixed: Tensor = self.to_out(_attend(self.to_q(token_B1D), k, v, self.heads))
        return mixed


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (part.view(*part.shape[:2], heads, -1).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Mlp(nn.Module):
    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        # Identities where HaMeR has dropout (0.0 in the released configuration): the names count places.
        self.net = nn.Sequential(
            nn.Linear(sizes.dim, sizes.mlp_dim), nn.GELU(), nn.Identity(), nn.Linear(sizes.mlp_dim, sizes.dim)
        )

    def forward(self, token_B1D: Tensor, _context: Tensor) -> Tensor:
        widened: Tensor = self.net(token_B1D)
        return widened
