"""HaMeR's file formats, written: training tars, evaluation npz, and the truth files of FreiHAND's authors.

Equal pictures give equal bytes: no times, no users, no random names.
"""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.hand_scenes import HandPicture

_TRUTH_DECIMALS = 6
"""Of a metre: a micrometre, as FreiHAND's own files have."""


def annotation(picture: HandPicture) -> dict[str, Any]:
    """The dictionary of one hand in a tar's `data.pyd`, dtypes and units as in HaMeR's own tars."""
    ones = np.ones((21, 1))
    return {
        "keypoints_2d": np.hstack([picture.keypoints_2d, ones]).astype(np.float32),
        "keypoints_3d": np.hstack([picture.keypoints_3d, ones]).astype(np.float32),
        "center": picture.center.astype(np.float64),
        "scale": picture.box_px.astype(np.float64) / 200,  # a tar's boxes are in units of 200 px
        "hand_pose": picture.pose.astype(np.float32),
        "betas": picture.betas.astype(np.float32),
        # 0-d arrays: HaMeR's loader copies them, which a Python number cannot do
        "right": np.array(picture.right, dtype=np.float32),
        "has_hand_pose": np.array(1, dtype=np.float32),
        "has_betas": np.array(1, dtype=np.float32),
        "personid": 0,
        "extra_info": {},
    }


def write_tar(path: Path, pictures: Iterable[tuple[str, HandPicture]]) -> None:
    """A WebDataset tar of (key, picture): `<key>.jpg` and `<key>.data.pyd`, a list with the picture's one hand."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, picture in pictures:
            labels = pickle.dumps([annotation(picture)], protocol=4)
            for name, data in ((f"{key}.jpg", picture.jpeg), (f"{key}.data.pyd", labels)):
                member = tarfile.TarInfo(name)  # times and owners are zero by default
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def evaluation_arrays(names: Sequence[str], pictures: Sequence[HandPicture]) -> dict[str, NDArray[Any]]:
    """The arrays of an evaluation npz; its boxes are in pixels, unlike a tar's."""
    hands = [annotation(picture) for picture in pictures]
    return {
        "imgname": np.array(names),
        "center": np.stack([hand["center"] for hand in hands]),
        "scale": np.stack([hand["scale"] * 200 for hand in hands]),
        "right": np.stack([hand["right"] for hand in hands]),
        "hand_pose": np.stack([hand["hand_pose"] for hand in hands]),
        "has_hand_pose": np.stack([hand["has_hand_pose"] for hand in hands]),
        "betas": np.stack([hand["betas"] for hand in hands]),
        "has_betas": np.stack([hand["has_betas"] for hand in hands]),
        "hand_keypoints_2d": np.stack([hand["keypoints_2d"] for hand in hands]),
        "hand_keypoints_3d": np.stack([hand["keypoints_3d"] for hand in hands]),
        "personid": np.zeros(len(hands), dtype=np.int64),
    }


def truth_json(points: Iterable[NDArray[np.floating]]) -> bytes:
    """FreiHAND's truth files: a list with one list of [x, y, z] in metres for each picture."""
    rounded = [np.round(np.asarray(one, dtype=np.float64), _TRUTH_DECIMALS).tolist() for one in points]
    return json.dumps(rounded, separators=(",", ":")).encode()
