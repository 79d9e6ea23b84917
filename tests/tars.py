"""Tiny tars in HaMeR's layout, their annotations and pictures made here."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(width: int = 60, height: int = 50, seed: int = 0, kind: str = "JPEG") -> bytes:
    """An encoded picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, kind)
    return encoded.getvalue()


def annotation(**changes: Any) -> dict[str, Any]:
    """A hand that every rule keeps."""
    rng = np.random.default_rng(1)
    keypoints_2d = np.concatenate([rng.uniform(10, 40, (21, 2)), np.ones((21, 1))], axis=1).astype(np.float32)
    keypoints_3d = np.concatenate([rng.normal(0, 0.05, (21, 3)), np.ones((21, 1))], axis=1).astype(np.float32)
    return {
        "keypoints_2d": keypoints_2d,
        "keypoints_3d": keypoints_3d,
        "center": np.array([30.0, 25.0]),
        "scale": np.array([0.2, 0.15]),
        "hand_pose": rng.normal(0, 0.3, 48).astype(np.float32),
        "betas": rng.normal(0, 0.5, 10).astype(np.float32),
        "right": np.float32(1),
        "has_hand_pose": np.float32(1),
        "has_betas": np.float32(1),
        "personid": 0,
        "extra_info": {},
    } | changes


def sample(key: str, *hands: dict[str, Any], seed: int = 0) -> dict[str, bytes]:
    """The members of one sample."""
    return {f"{key}.jpg": picture(seed=seed), f"{key}.data.pyd": pickle.dumps(list(hands or [annotation()]))}


def write_tar(path: Path, members: Mapping[str, bytes], **options: Any) -> Path:
    """A tar of these members in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path
