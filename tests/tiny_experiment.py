"""A whole experiment in a folder, small enough to run from tars to report in about half a minute on two cores.

    tars/alpha-000000.tar, alpha-000001.tar    training set alpha: 4 hands each, 2 shards each
    tars/beta-000000.tar                       training set beta: 4 hands, 2 shards
    tars/val-000000.tar                        evaluation set val: 4 hands, 2 shards
    teacher/                                   a teacher of HaMeR's architecture, 24 wide, in the official layout
    pipeline.yaml                              two students: `plain` learns from alpha, `hybrid` from alpha and beta

The same folder name or another, the same bytes: hands and weights follow from seeds. Hands are joints of a stiff hand,
turned and projected; pictures are smooth noise.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from models.hand_model import OPEN_HAND, load_hand_model
from models.student import Student, export_hamer_checkpoint
from tests.tars import write_tar
from tests.tiny_networks import TINY_HAMER

HANDS_A_TAR = 4
SAMPLES_PER_SHARD = 2
TARS = {"alpha": 2, "beta": 1, "val": 1}
CONFIG: dict[str, Any] = {
    "schema_version": 1,
    "name": "tiny",
    "workdir": "work",
    "seed": 0,
    "datasets": {
        "alpha": {"format": "hamer_tar", "path": "tars/alpha-{000000..000001}.tar"},
        "beta": {"format": "hamer_tar", "path": "tars/beta-000000.tar", "weight": 0.5},
        "val": {"format": "hamer_tar", "path": "tars/val-000000.tar"},
    },
    "teacher": {"checkpoint": "teacher/checkpoints/hamer.ckpt", "mano_model": OPEN_HAND, "batch_size": 4},
    "cache": {"views": 2, "samples_per_shard": SAMPLES_PER_SHARD},
    "train": {
        "on": ["alpha", "beta"],
        "steps": 3,
        "batch_size": 4,
        "lr": 1e-4,
        "validation_fraction": 0,
        "log_every": 1,
        "checkpoint_every": 1,
    },
    "students": {
        "plain": {"backbone": "mobilenetv3_small_050", "head": "light", "on": ["alpha"]},
        "hybrid": {
            "backbone": "mobilenetv3_small_050",
            "head": "light",
            "distill": {"outputs": 0.3, "features": 1.8},
        },
    },
    "evaluate": {
        "on": ["val"],
        "batch_size": 4,
        "latency": {"batch_sizes": [1], "warmup": 0, "iterations": 1},
    },
    "compare": {"bootstrap": 100},
    "audit": {"memory_gib": 64.0},  # counts what the process has already: all that the tests before it left there
    "tracking": {"experiment": "tiny"},
    "cluster": {"max_retries": 3},
}


def make_experiment(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write tars, teacher and pipeline.yaml into a folder; the configuration's path.

    changes: dotted key -> value for the configuration, as `configure` takes them.
    """
    for dataset, count in TARS.items():
        for index in range(count):
            write_hands(tar_path(folder, dataset, index), dataset, index)
    write_teacher(folder / "teacher")
    config = folder / "pipeline.yaml"
    config.write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    return configure(config, changes or {})


def configure(config: Path, changes: Mapping[str, Any]) -> Path:
    """Change dotted keys of a configuration file, e.g. {"cache.views": 3}; None as a value is YAML's null.

    A key that ends in `!` is taken out: {"students.hybrid!": None}. What lies on the way to a key is made.
    """
    document = yaml.safe_load(config.read_text())
    for dotted, value in changes.items():
        *way, last = dotted.removesuffix("!").split(".")
        section = document
        for part in way:
            section = section.setdefault(part, {})
        if dotted.endswith("!"):
            del section[last]
        else:
            section[last] = copy.deepcopy(value)
    config.write_text(yaml.safe_dump(document, sort_keys=False))
    return config


def tar_path(folder: Path, dataset: str, index: int = 0) -> Path:
    """Where a data set's tar of that number lies."""
    return folder / "tars" / f"{dataset}-{index:06d}.tar"


def write_hands(
    path: Path, dataset: str, index: int = 0, *, count: int = HANDS_A_TAR, edits: Mapping[int, int] | None = None
) -> Path:
    """A tar of `count` hands, unlike those of every other (data set, index).

    edits: position -> seed: these hands look different from what they would otherwise, under the same keys.
    """
    members: dict[str, bytes] = {}
    edited = edits or {}
    for position in range(count):
        seed = [*f"{dataset}-{index}-{position}".encode(), *([edited[position]] if position in edited else [])]
        members |= hand_members(f"{index:02d}{position:04d}", seed)
    return write_tar(path, members)


def hand_members(key: str, seed: int | list[int]) -> dict[str, bytes]:
    """The two members of one sample: a picture and its one hand."""
    draw = np.random.default_rng(seed)
    return {f"{key}.jpg": _picture(draw), f"{key}.data.pyd": pickle.dumps([annotation(draw)])}


def annotation(draw: np.random.Generator, **changes: Any) -> dict[str, Any]:
    """Labels of a stiff hand in front of a camera of 240 px focal length, in a picture of 96 x 96."""
    turn, _ = cv2.Rodrigues(draw.normal(0, 0.6, 3))
    joints = _stiff_hand() @ turn.T + np.array([0, 0, 0.6]) + draw.normal(0, 0.01, 3)
    points = joints[:, :2] / joints[:, 2:] * 240 + 48
    low, high = points.min(0), points.max(0)
    ones = np.ones((21, 1))
    return {
        "keypoints_2d": np.concatenate([points, ones], axis=1).astype(np.float32),
        "keypoints_3d": np.concatenate([joints, ones], axis=1).astype(np.float32),
        "center": (low + high) / 2,
        "scale": (high - low) * 1.3 / 200,
        "hand_pose": np.concatenate([cv2.Rodrigues(turn)[0].ravel(), draw.normal(0, 0.2, 45)]).astype(np.float32),
        "betas": draw.normal(0, 0.5, 10).astype(np.float32),
        "right": np.float32(draw.integers(0, 2)),
        "has_hand_pose": np.float32(1),
        "has_betas": np.float32(1),
        "personid": 0,
        "extra_info": {},
    } | changes


def write_teacher(folder: Path, seed: int = 0) -> Path:
    """A tiny teacher for the open hand model; the checkpoint's path."""
    torch.manual_seed(seed)
    export_hamer_checkpoint(Student(TINY_HAMER, load_hand_model(OPEN_HAND)), folder)
    return folder / "checkpoints" / "hamer.ckpt"


def events_of(config: Path, since: int = 0) -> list[dict[str, Any]]:
    """The event log from its line number `since` on."""
    path = config.parent / "work" / "logs" / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines[since:]]


def _picture(draw: np.random.Generator) -> bytes:
    coarse = draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(cv2.resize(coarse, (96, 96), interpolation=cv2.INTER_LINEAR)).save(encoded, "JPEG")
    return encoded.getvalue()


def _stiff_hand() -> NDArray[np.float64]:
    """(21,3) joints in OpenPose order, metres: a wrist and five straight fingers in a plane."""
    return np.array([[0.0, 0.0, 0.0], *_fingers()])


def _fingers() -> Iterator[list[float]]:
    for angle_deg, first_m in ((-50, 0.04), (-15, 0.085), (0, 0.09), (12, 0.085), (25, 0.08)):
        across, along = np.sin(np.radians(angle_deg)), -np.cos(np.radians(angle_deg))
        for joint in range(4):
            length_m = first_m + 0.025 * joint
            yield [across * length_m, along * length_m, 0.0]
