"""Batches from caches: which sample and which view a step sees is a pure function of (seed, step).

So a resumed run continues where it stopped without any reader's state, and the number of loader threads changes
nothing. B is the batch size; a source is one data set of the mix.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from storage.errors import InputError

T = TypeVar("T")
Batch = dict[str, NDArray[Any]]
Ints = NDArray[np.int64]

BLOCK = 1000
"""Draws within which each source gets exactly its share: weights are honoured to a thousandth, and at least one."""

LABELS = (
    "labels/keypoints_2d", "labels/keypoints_3d", "labels/global_orient", "labels/hand_pose", "labels/betas",
    "labels/has_hand_pose", "labels/has_betas",
)  # fmt: skip
TEACHER_OUTPUTS = (
    "teacher/keypoints_2d", "teacher/keypoints_3d", "teacher/global_orient", "teacher/hand_pose", "teacher/betas",
)  # fmt: skip
FEATURES = "teacher/features"
FEATURES_SCALE = "teacher/features_scale"
PICTURES = "pictures"


class Reader(Protocol):
    """The part of `storage.reading.CacheReader` that training uses."""

    @property
    def ids(self) -> list[str]: ...

    @property
    def n_views(self) -> int: ...

    def read(
        self, rows: Sequence[int], views: Sequence[int], keys: Collection[str] | None = None, *, decoded: bool = True
    ) -> Batch: ...


@dataclass(frozen=True)
class Source:
    """One data set of the mix and its share (normalised over the mix)."""

    dataset: str
    reader: Reader
    weight: float


class TrainMix:
    """The training batches of a student, and the samples held out to validate it.

    Each source is seen without replacement, in an order drawn anew every epoch; a sample's views take turns, so that
    after as many epochs as there are views each was seen once.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        batch_size: int,
        seed: int,
        keys: Collection[str],
        validation_fraction: float = 0.0,
        validation_samples: int = 2048,
        colour_jitter: float = 0.0,
    ) -> None:
        self.sources = tuple(sources)
        self.batch_size, self.seed, self.keys, self.colour_jitter = batch_size, seed, tuple(keys), colour_jitter
        ids = [source.reader.ids for source in self.sources]
        self.held_out = held_out(ids, validation_fraction, validation_samples)
        self.training = [np.setdiff1d(np.arange(len(i)), out) for i, out in zip(ids, self.held_out, strict=True)]
        for source, rows in zip(self.sources, self.training, strict=True):
            if not len(rows):
                raise InputError(f"data set {source.dataset} has no sample to train on; leave it out of train.on")
        self.quotas = tuple(quotas([source.weight for source in self.sources]))

    def draws(self, step: int) -> list[tuple[Ints, Ints]]:
        """Rows and views of step `step` (from 0), one pair a source."""
        return [self._rows_and_views(i, numbers) for i, numbers in enumerate(self._numbers(step))]

    def batch(self, step: int) -> Batch:
        """The arrays `keys` of one step's samples, `pictures` (B,256,256,3) uint8 and `sample_id` among them.

        Features come as they are stored: whoever trains multiplies them by `teacher/features_scale`, where it trains.
        """
        parts = [
            source.reader.read(rows.tolist(), views.tolist(), self.keys, decoded=False)
            for source, (rows, views) in zip(self.sources, self.draws(step), strict=True)
            if len(rows)
        ]
        batch = _joined(parts)
        if self.colour_jitter:
            batch[PICTURES] = _jittered(batch[PICTURES], self.colour_jitter, _rng(self.seed, "colour", step))
        return batch

    def batches(self, first_step: int, last_step: int, workers: int) -> Iterator[Batch]:
        """Batches of steps [first_step, last_step), read ahead by `workers` threads (0: in the caller's)."""
        return in_order(self.batch, range(first_step, last_step), workers)

    @property
    def validation_size(self) -> int:
        """How many samples are held out."""
        return sum(len(rows) for rows in self.held_out)

    def validation_batches(self) -> Iterator[Batch]:
        """The held-out samples, their plain view, in the snapshots' order; the last batch may be smaller."""
        for source, rows in zip(self.sources, self.held_out, strict=True):
            for start in range(0, len(rows), self.batch_size):
                chunk = rows[start : start + self.batch_size].tolist()
                yield source.reader.read(chunk, [0] * len(chunk), self.keys, decoded=False)

    def _numbers(self, step: int) -> list[Ints]:
        """For each source, which of its own draws (counted from the run's start) fall into this step."""
        first, last = step * self.batch_size, (step + 1) * self.batch_size
        numbers: list[list[Ints]] = [[] for _ in self.sources]
        for block in range(first // BLOCK, (last - 1) // BLOCK + 1):
            order = _block_order(self.seed, block, self.quotas)
            low, high = max(first - block * BLOCK, 0), min(last - block * BLOCK, BLOCK)
            for i, quota in enumerate(self.quotas):
                before = int((order[:low] == i).sum())
                inside = int((order[low:high] == i).sum())
                numbers[i].append(block * quota + before + np.arange(inside))
        return [np.concatenate(parts) for parts in numbers]

    def _rows_and_views(self, i: int, numbers: Ints) -> tuple[Ints, Ints]:
        rows, name, views = self.training[i], self.sources[i].dataset, self.sources[i].reader.n_views
        epochs, places = np.divmod(numbers, len(rows))
        picks = np.zeros(len(numbers), np.int64)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            picks[now] = _permutation(self.seed, name, epoch, len(rows))[places[now]]
        return rows[picks], (_first_views(self.seed, name, views, len(rows))[picks] + epochs) % views


def quotas(weights: Sequence[float]) -> list[int]:
    """How many of BLOCK draws each source gets: largest remainders, at least one each."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while (missing := BLOCK - int(counts.sum())) != 0:
        counts[np.argmax((exact - counts) * np.sign(missing))] += np.sign(missing)
    return [int(count) for count in counts]


def held_out(ids: Sequence[Sequence[str]], fraction: float, at_most: int) -> list[Ints]:
    """Rows of each source to validate on: chosen by the hash of the sample's id, the same ones in every run.

    A new sample never moves an old one between the two halves, unless the `at_most` smallest hashes change. With a
    fraction above 0 at least one sample is held out, and every source keeps one to train on.
    """
    if not fraction:
        return [np.zeros(0, np.int64) for _ in ids]
    hashes = [np.array([_hash64(i) for i in source], dtype=np.uint64) for source in ids]
    everything = np.sort(np.concatenate(hashes))
    below = int(np.searchsorted(everything, np.uint64(fraction * 2**64)))
    limit = everything[max(min(below, at_most), 1) - 1]
    return [np.flatnonzero(h <= limit)[: max(len(h) - 1, 0)] for h in hashes]


def in_order(make: Callable[[int], T], keys: Sequence[int], workers: int) -> Iterator[T]:
    """make(key) for each key in turn, computed ahead by threads; an error is raised where its result was due."""
    if not workers:
        yield from map(make, keys)
        return
    ahead: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="loader") as pool:
        try:
            for key in keys:
                ahead.append(pool.submit(make, key))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _joined(parts: Sequence[Batch]) -> Batch:
    return parts[0] if len(parts) == 1 else {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _jittered(pictures: NDArray[np.uint8], amount: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    colour = rng.uniform(1 - amount, 1 + amount, size=(len(pictures), 1, 1, 3)).astype(np.float32)
    return np.asarray(np.clip(pictures * colour, 0, 255), dtype=np.uint8)


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _rng(seed: int, what: str, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, _hash64(what), number])


@lru_cache(maxsize=64)
def _block_order(seed: int, block: int, quota: tuple[int, ...]) -> Ints:
    return _rng(seed, "block", block).permutation(np.repeat(np.arange(len(quota)), quota))


@lru_cache(maxsize=32)
def _permutation(seed: int, dataset: str, epoch: int, size: int) -> Ints:
    return _rng(seed, f"epoch of {dataset}", epoch).permutation(size)


@lru_cache(maxsize=32)
def _first_views(seed: int, dataset: str, views: int, size: int) -> Ints:
    return _rng(seed, f"views of {dataset}", 0).integers(views, size=size)
