"""What a run learns from: batches, and the student that they teach. Those of a job come from its caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, cast

from models.hand_model import load_hand_model
from models.student import Student
from storage.cache import HAND_MODEL, open_cache
from storage.config import FeatureGrid
from storage.durable import canonical_json
from storage.errors import InputError
from storage.identity import sound_attachment
from trainer.data import Batch, Source, TrainMix
from trainer.distributed import Group
from trainer.features import feature_decoder
from trainer.job import TrainJob
from trainer.learner import StudentUnderTraining, keys_for, student_spec


class Mix(Protocol):
    """Batches by number, each a pure function of it; `TrainMix` is the one over caches.

    A batch holds `pictures` (B,256,256,3) uint8, `sample_id` (B,) strings, and what the student's losses read.
    """

    @property
    def validation_size(self) -> int: ...

    def batch(self, step: int) -> Batch: ...

    def batches(self, first_step: int, last_step: int, workers: int) -> Iterator[Batch]: ...

    def validation_batches(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Lessons:
    """Batches of this worker, and who learns from them."""

    mix: Mix
    learner: Callable[[], StudentUnderTraining]
    """Makes the network; called when random numbers are seeded."""


def from_caches(job: TrainJob, group: Group) -> Lessons:
    """Those of the job's caches. Raises InputError where they cannot serve its student together."""
    recipe, limit_bytes = job.recipe, int(job.recipe.disk_cache_gb * 1e9)
    readers = [
        open_cache(cache, {dataset: digest}, local=job.disk_cache, limit_bytes=limit_bytes)
        for dataset, cache, digest, _ in job.snapshots
    ]
    mix = TrainMix(
        [Source(name, reader, weight) for (name, _, _, weight), reader in zip(job.snapshots, readers, strict=True)],
        batch_size=recipe.batch_size,
        seed=job.seed,
        keys=keys_for(recipe.distill),
        validation_fraction=recipe.validation_fraction,
        validation_samples=recipe.validation_samples,
        colour_jitter=recipe.colour_jitter,
        shuffle=recipe.shuffle_of(job.remote),
        window_shards=recipe.window_shards,
        rank=group.rank,
        workers=group.size,
    )
    kinds = {canonical_json(reader.identity["features"] | {"C": reader.feature_shape[-1]}) for reader in readers}
    if len(kinds) != 1:
        told = ", ".join(kind.decode() for kind in sorted(kinds))
        raise InputError(f"the data sets of {job.name} are cached differently: {told}; use one cache")
    first = readers[0]

    def learner() -> StudentUnderTraining:
        hand_model = load_hand_model(sound_attachment(job.hand_model or first.root / HAND_MODEL))
        student = Student(student_spec(recipe, job.weights), hand_model)
        grid = cast(FeatureGrid, first.grid)
        return StudentUnderTraining(student, recipe, grid, first.feature_shape[-1], feature_decoder(first.codec))

    return Lessons(mix, learner)
