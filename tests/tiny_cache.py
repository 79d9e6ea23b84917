"""A small real cache, written by the real writer in well under a second: for tests of whatever reads caches.

Labels are plausible hands (about 0.18 m, before the camera), the teacher's answers are the labels with a little noise,
the pictures are real JPEGs. The same arguments give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage import layout
from storage.cache import CacheFolder
from storage.codecs import CODEC_FILE, Codec, CodesCodec, FittedCodec, PcaCodec, codec_bytes
from storage.config import FeatureEncoding, FeatureGrid, encoding_parts, is_fitted
from storage.durable import partial_path, publish_directory, sha256_bytes
from storage.encodings import encode_picture, to_grid
from storage.ledger import Quarantined, ShardRecord, write_record
from storage.shards import ShardHeader, ShardWriter
from storage.snapshots import build_snapshot, publish_snapshot, read_head, write_head


@dataclass(frozen=True)
class TinyPlan:
    """One shard of the tiny cache: which rows of the manifest it holds."""

    input_hash: str
    rows: tuple[int, ...]


def write_tiny_cache(
    parent: Path,
    *,
    n: int = 12,
    views: int = 3,
    dataset: str = "tiny",
    seed: int = 0,
    grid: FeatureGrid = "8x8-paper",
    encoding: FeatureEncoding = "int8",
    channels: int = 32,
    samples_per_shard: int = 8,
    truth_vertices: int = 0,
    quarantined: int = 0,
    role: str = "train",
    alike: bool = False,
) -> Path:
    """Write a cache of `n` samples under `parent`; returns its folder, to be given to `open_cache`.

    truth_vertices: > 0 gives 3D truth with meshes of that many vertices. quarantined: that many more samples, left out
    of the shards by the teacher. alike: every sample of a shard has the arrays of its first, for caches that have to
    be big. Writing another data set with the same other arguments adds it to the same folder.
    """
    features = {"grid": grid, "encoding": encoding, "teacher_shape": [16, 12, channels]}
    attachments = {}
    if is_fitted(encoding):
        attachments[CODEC_FILE] = codec_bytes(tiny_codec(encoding, channels))
        features["codec_sha256"] = sha256_bytes(attachments[CODEC_FILE])
    identity = {"kind": "tiny", "role": role, "views": views, "features": features}
    folder = CacheFolder.create(parent, identity, attachments)
    ids = [f"{dataset}:{index:06d}#0" for index in range(n + quarantined)]
    bad = set(ids[1 : 1 + quarantined])
    plans, records = [], {}
    for start in range(0, len(ids), samples_per_shard):
        rows = tuple(range(start, min(start + samples_per_shard, len(ids))))
        plan = TinyPlan(sha256_bytes(repr((seed, [ids[row] for row in rows])).encode()), rows)
        header = ShardHeader(plan.input_hash, dataset, role, len(rows), (), {"device": "cpu"})
        records[plan.input_hash] = _write_shard(
            folder,
            header,
            [ids[row] for row in rows],
            bad,
            seed,
            views,
            grid,
            channels,
            truth_vertices,
            alike,
        )
        plans.append(plan)
    table = build_snapshot(_manifest(dataset, ids), plans, records)
    digests = {dataset: publish_snapshot(folder.root, folder.fingerprint, dataset, table)}
    write_head(folder.root, read_head(folder.root) | digests)
    return folder.root


def _manifest(dataset: str, ids: list[str]) -> pa.Table:
    digests = [sha256_bytes(name.encode()) for name in ids]
    return pa.table(
        {
            "sample_id": ids,
            "dataset": [dataset] * len(ids),
            "source": ["tiny.tar"] * len(ids),
            "image_sha256": digests,
            "labels_sha256": digests,
            "reason": pa.array([None] * len(ids), pa.string()),
        }
    )


def _write_shard(
    folder: CacheFolder,
    header: ShardHeader,
    ids: list[str],
    bad: set[str],
    seed: int,
    views: int,
    grid: FeatureGrid,
    channels: int,
    truth_vertices: int,
    alike: bool,
) -> ShardRecord:
    final = folder.shard_path(header.input_hash)
    partial = partial_path(final)
    left_out = tuple(Quarantined(name, "undecodable: made so by the test") for name in ids if name in bad)
    codec = folder.codec()
    with ShardWriter(partial, codec.dimension) as writer:
        for place, name in enumerate(ids):
            if name in bad:
                continue
            if place == 0 or not alike:
                rng = np.random.default_rng([seed, *name.encode()])
                values = hand(rng, views) | teacher(rng, views, grid, codec, channels)
                if truth_vertices:
                    values |= truth(rng, truth_vertices)
                pictures = [encode_picture(picture(rng), "jpeg", 95) for _ in range(views)]
            writer.append(name, values, pictures)
        header = ShardHeader(
            header.input_hash, header.dataset, header.role, header.samples_in, left_out, header.provenance
        )
        record = writer.finish(header)
    assert publish_directory(partial, final) or final.is_dir()
    write_record(folder.record_path(header.input_hash), record)
    return record


def picture(rng: np.random.Generator) -> NDArray[np.uint8]:
    """A smooth random picture (256,256,3)."""
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, (256, 256), interpolation=cv2.INTER_LINEAR), np.uint8)


def hand(rng: np.random.Generator, views: int) -> dict[str, NDArray[Any]]:
    """Labels and view parameters of one sample."""
    f4 = np.float32
    joints = (rng.normal(0, 0.04, (views, 21, 3)) + np.array([0, 0, 0.6])).astype(f4)
    ones = np.ones((views, 21, 1), f4)
    return {
        "labels/keypoints_2d": np.concatenate([joints[..., :2] / joints[..., 2:] * 2, ones], axis=-1),
        "labels/keypoints_3d": np.concatenate([joints, ones], axis=-1),
        "labels/global_orient": rng.normal(0, 0.5, (views, 3)).astype(f4),
        "labels/hand_pose": np.tile(rng.normal(0, 0.3, 45).astype(f4), (views, 1)),
        "labels/betas": np.tile(rng.normal(0, 1, 10).astype(f4), (views, 1)),
        "labels/has_hand_pose": np.array(1, f4),
        "labels/has_betas": np.array(1, f4),
        "labels/right": np.array(rng.integers(0, 2), f4),
        "labels/box_size": np.array([120.0, 140.0]),
        "labels/image_size": np.array([640, 480]),
        "views/scale": rng.uniform(0.7, 1.3, views),
        "views/rotation_deg": rng.uniform(-60, 60, views),
        "views/translation": rng.uniform(-0.02, 0.02, (views, 2)),
        "views/colour": rng.uniform(0.8, 1.2, (views, 3)),
        "views/flip": np.zeros(views, np.bool_),
        "views/center": np.tile([320.0, 240.0], (views, 1)),
        "views/box_px": np.full(views, 140.0),
        "views/affine": np.tile([[1.8, 0.0, -448.0], [0.0, 1.8, -304.0]], (views, 1, 1)),
    }


def teacher(
    rng: np.random.Generator, views: int, grid: FeatureGrid, codec: Codec, channels: int
) -> dict[str, NDArray[Any]]:
    """A teacher's answers for one sample: proper rotations, a camera, encoded features."""
    f4 = np.float32
    features = to_grid(rng.normal(0, 1, (views, 16, 12, channels)).astype(f4), grid)
    stored, scale = codec.encode(features)
    joints = (rng.normal(0, 0.04, (views, 21, 3))).astype(f4)
    values: dict[str, NDArray[Any]] = {
        layout.FEATURES: stored,
        "teacher/global_orient": _rotations(rng, views, 1),
        "teacher/hand_pose": _rotations(rng, views, 15),
        "teacher/betas": rng.normal(0, 1, (views, 10)).astype(f4),
        "teacher/cam": np.tile(np.array([0.9, 0.0, 0.0], f4), (views, 1)),
        "teacher/keypoints_2d": rng.uniform(-0.4, 0.4, (views, 21, 2)).astype(f4),
        "teacher/keypoints_3d": joints,
    }
    return values if scale is None else values | {layout.FEATURES_SCALE: scale}


def tiny_codec(encoding: FeatureEncoding, channels: int) -> FittedCodec:
    """A codec for tokens of normal numbers: random directions, random codebooks. A poor one, but one that decodes."""
    rng = np.random.default_rng(0)
    kind, number = encoding_parts(encoding)
    size = number if kind == "pca" else min(channels, 8)
    components = np.ascontiguousarray(np.linalg.qr(rng.normal(size=(channels, size)))[0].T, np.float32)
    mean = rng.normal(0, 0.1, channels).astype(np.float32)
    if kind == "pca":
        return PcaCodec(mean, components, rng.uniform(0.01, 0.03, size).astype(np.float32), error=0.5)
    codebooks = rng.normal(0, 0.5, (number, 256, size)).astype(np.float32)
    return CodesCodec(mean, components, codebooks, error=0.5)


def truth(rng: np.random.Generator, n_vertices: int) -> dict[str, NDArray[Any]]:
    """The authors' 3D truth of one sample."""
    return {
        "labels/truth_xyz": rng.normal(0, 0.04, (21, 3)).astype(np.float32),
        "labels/truth_vertices": rng.normal(0, 0.04, (n_vertices, 3)).astype(np.float32),
        "labels/has_truth": np.array(1, np.float32),
    }


def _rotations(rng: np.random.Generator, views: int, joints: int) -> NDArray[np.float32]:
    vectors = rng.normal(0, 0.4, (views * joints, 3))
    matrices = np.stack([cv2.Rodrigues(vector)[0] for vector in vectors])
    return matrices.reshape(views, joints, 3, 3).astype(np.float32)
