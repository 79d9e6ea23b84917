"""A whole teach stage in one process: tiny tars, a teacher made of sums, the order of steps that a run follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.config import HamerTarDataset
from stages.ingest import scan_source
from stages.teach import Forward, ShardJob, TeachSettings, prepared_batches, teach_identity, teach_shard
from storage.cache import CacheFolder
from storage.config import CacheConfig, FeatureGrid, FeaturesConfig
from storage.encodings import to_grid
from storage.manifest import Role, shards_of
from storage.snapshots import build_snapshot, publish_snapshot, write_head
from tests import tars

DATASET = "tiny-train"
CACHE = CacheConfig(views=2, samples_per_shard=2, features=FeaturesConfig(grid="8x6-geometric", encoding="int8"))
BATCH_SIZE = 3
PROVENANCE = {"device": "cpu", "torch": "none", "threads": 1}


def settings(role: Role = "train", cache: CacheConfig = CACHE, seed: int = 0) -> TeachSettings:
    return TeachSettings.of(role, cache, BATCH_SIZE, seed)


def forward(pictures: NDArray[np.uint8], grid: FeatureGrid) -> Mapping[str, NDArray[Any]]:
    """A teacher: every answer follows from its own picture alone, and the batch size must be the fixed one."""
    assert pictures.shape == (BATCH_SIZE, 256, 256, 3)
    patches_Bxyc = pictures.astype(np.float32).reshape(BATCH_SIZE, 16, 16, 16, 16, 3).mean(axis=(2, 4)) / 255
    features = patches_Bxyc[:, :, 2:14]
    mean = features.mean(axis=(1, 2, 3))
    return {
        "features": to_grid(features, grid),
        "global_orient": np.eye(3, dtype=np.float32) * mean[:, None, None, None],
        "hand_pose": np.tile(np.eye(3, dtype=np.float32), (BATCH_SIZE, 15, 1, 1)) * mean[:, None, None, None],
        "betas": np.outer(mean, np.arange(10)).astype(np.float32),
        "cam": np.outer(mean, [1, 2, 3]).astype(np.float32),
        "keypoints_2d": np.einsum("b,jx->bjx", mean, np.ones((21, 2))).astype(np.float32),
        "keypoints_3d": np.einsum("b,jx->bjx", mean, np.ones((21, 3))).astype(np.float32),
    }


def write_data(base: Path, members: Mapping[str, bytes] | None = None) -> pa.Table:
    """One tar of five hands in four pictures (a left hand, one undecodable picture); its manifest."""
    left = tars.annotation(right=np.float32(0))
    default = {
        **tars.sample("000000", seed=0),
        **tars.sample("000001", tars.annotation(), left, seed=1),
        **tars.sample("000002", seed=2),
        **tars.sample("000003", seed=3),
    }
    default["000002.jpg"] = default["000002.jpg"][:-700]  # the header is whole: ingest lets it pass
    source = tars.write_tar(base / "data" / "000000.tar", members or default)
    return scan_source(DATASET, HamerTarDataset(format="hamer_tar", path="data/000000.tar"), source, base)


def jobs(
    base: Path, root: Path, table: pa.Table, use: TeachSettings, per_shard: int = CACHE.samples_per_shard
) -> list[ShardJob]:
    return [
        ShardJob(DATASET, plan.input_hash, table.take(pa.array(plan.rows)), use, root, base, base / "events.jsonl")
        for plan in shards_of(table, use.role, per_shard)
    ]


def identity(use: TeachSettings) -> dict[str, Any]:
    return teach_identity(
        use, checkpoint_sha256="ab" * 32, model_config={"WIDTH": 3}, hand_model_sha256="cd" * 32, precision="fp32"
    )


def run(
    base: Path, parent: Path, table: pa.Table, use: TeachSettings | None = None, teacher: Forward = forward
) -> CacheFolder:
    """What `handstill run teach` does: make ready, sweep, adopt, teach what is missing, snapshot, point at it."""
    use = use or settings()
    cache = CacheFolder.create(parent, identity(use), {"hand_model.safetensors": b"stands for a hand model"})
    cache.sweep_temporary()
    cache.adopt()
    for job in jobs(base, cache.root, table, use):
        teach_shard(job, prepared_batches(job), teacher, PROVENANCE)
    snapshot = build_snapshot(table, shards_of(table, use.role, CACHE.samples_per_shard), cache.finished())
    write_head(cache.root, {DATASET: publish_snapshot(cache.root, cache.fingerprint, DATASET, snapshot)})
    return cache


def contents(folder: Path, ignoring: Iterable[str] = ()) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes; None for folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name not in ignoring
    }
