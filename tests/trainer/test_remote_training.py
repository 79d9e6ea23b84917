"""Training from a cache on an object store: the same batches, the same weights as from the folder it was made in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from storage.cache import HAND_MODEL, CacheFolder, open_cache
from storage.ledger import read_record
from storage.snapshots import read_head
from storage.upload import upload_cache
from tests.object_store import BUCKET, s3_server
from tests.trainer.jobs import tiny_job
from trainer.data import Source, TrainMix
from trainer.job import TrainJob
from trainer.loop import train


@pytest.fixture(scope="module")
def _server() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def job(tmp_path: Path, _server: str) -> TrainJob:
    """Five small shards, and the hand model attached to the cache."""
    job = tiny_job(tmp_path, samples_per_shard=2, shuffle="window", window_shards=2, distill={"features": 1.8})
    ((_, cache, _, _),) = job.snapshots
    folder = CacheFolder(Path(cache))
    assert isinstance(job.hand_model, Path)
    CacheFolder.create(folder.root.parent, folder.identity, {HAND_MODEL: job.hand_model.read_bytes()})
    return job


def remote_job(job: TrainJob, folder: Path, disk_cache_gb: float) -> TrainJob:
    ((name, cache, digest, weight),) = job.snapshots
    url = upload_cache(Path(cache), f"s3://{BUCKET}/{folder.name}").url
    return dataclasses.replace(
        job,
        snapshots=((name, url, digest, weight),),
        hand_model=None,
        out_dir=folder / "remote",
        disk_cache=folder / "disk",
        recipe=job.recipe.model_copy(update={"shuffle": "auto", "disk_cache_gb": disk_cache_gb}),
    )


def test_a_remote_cache_gives_the_same_batches_and_weights(job: TrainJob, tmp_path: Path) -> None:
    ((_, cache, digest, _),) = job.snapshots
    shard_bytes = max(read_record(path).bytes for path in (Path(cache) / "ledger").glob("*.json"))
    remote = remote_job(job, tmp_path, 4.1 * shard_bytes / 1e9)  # two windows of two, and less than the cache
    assert remote.remote
    assert not job.remote
    train(job)
    result = train(remote)
    weights = [(out / "student" / "model.safetensors") for out in (job.out_dir, remote.out_dir)]
    files = [sorted(path.name for path in out.parent.iterdir()) for out in weights]
    assert files[0] == files[1] != []
    for name in files[0]:
        assert (weights[0].parent / name).read_bytes() == (weights[1].parent / name).read_bytes()
    assert result.validation
    on_disk = sum(path.stat().st_size for path in (tmp_path / "disk").rglob("*.zarr/**/*") if path.is_file())
    assert 0 < on_disk <= 4.1 * shard_bytes

    assert read_head(Path(cache)) == {"tiny": digest}
    readers = [open_cache(cache), open_cache(remote.snapshots[0][1], local=tmp_path / "other", limit_bytes=10**9)]
    mixes = [
        TrainMix(
            [Source("tiny", reader, 1)], batch_size=3, seed=1, keys=("pictures", "teacher/features"),
            validation_fraction=0.2, shuffle="window", window_shards=2,
        )
        for reader in readers
    ]  # fmt: skip
    for here, there in zip(mixes[0].batches(0, 8, 1), mixes[1].batches(0, 8, 1), strict=True):
        assert here.keys() == there.keys()
        assert all(np.array_equal(here[key], there[key]) for key in here)
