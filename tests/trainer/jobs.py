"""Tiny training jobs on tiny caches: the real student, loop and reader, a network of 0.4 M parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.hand_model import load_hand_model, save_hand_model
from storage.config import FeatureEncoding, FeatureGrid
from storage.snapshots import read_head
from tests.tiny_cache import write_tiny_cache
from trainer.config import StudentRecipe
from trainer.job import PinnedSet, TrainJob

SMALL: dict[str, Any] = {
    "on": ["tiny"], "backbone": "test_efficientnet", "head": "light", "steps": 6, "batch_size": 2, "lr": 1e-3,
    "validate_every": 4, "checkpoint_every": 3, "log_every": 1, "validation_fraction": 0.3,
}  # fmt: skip


def pinned(cache: Path, weights: dict[str, float] | None = None) -> tuple[PinnedSet, ...]:
    return tuple((name, cache, digest, (weights or {}).get(name, 1.0)) for name, digest in read_head(cache).items())


def tiny_job(
    folder: Path,
    grid: FeatureGrid = "8x8-paper",
    encoding: FeatureEncoding = "int8",
    samples_per_shard: int = 8,
    **recipe: Any,
) -> TrainJob:
    """A job whose cache and results lie under `folder`."""
    cache = write_tiny_cache(folder / "cache", n=10, grid=grid, encoding=encoding, samples_per_shard=samples_per_shard)
    hand_model = folder / "hand_model.safetensors"
    save_hand_model(load_hand_model("open-hand"), hand_model)
    return TrainJob(
        name="tiny",
        seed=3,
        recipe=StudentRecipe.model_validate(SMALL | recipe),
        snapshots=pinned(cache),
        hand_model=hand_model,
        out_dir=folder / "out",
        identity="identity",
        device="cpu",
    )
