"""Batches from caches: which sample and which view a step sees is a pure function of (seed, step).

So a resumed run continues where it stopped without any reader's state, and the number of loader threads changes
nothing. B is the batch size; a source is one data set of the mix.

Memory: 2 * workers + 1 batches at most are made and not yet used. Shards are mapped files: pages that the system may
drop. Disk, with a window shuffle over remote caches: two windows of shards a source, the current one and the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from storage.errors import InputError
from storage.reading import Indices
from trainer.config import ShuffleKind
from trainer.order import (
    BLOCK,
    Epochs,
    GlobalEpochs,
    Ints,
    WindowEpochs,
    block_order,
    first_views,
    held_out,
    quotas,
    random_generator,
)
from trainer.windows import SHARDS_AT_ONCE, WindowFetcher

T = TypeVar("T")
Batch = dict[str, NDArray[Any]]

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

    @property
    def shards(self) -> NDArray[np.int32]: ...

    def prefetch(self, shard: int) -> None: ...

    def read(
        self, rows: Indices, views: Indices, keys: Collection[str] | None = None, *, decoded: bool = True
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
        shuffle: ShuffleKind = "global",
        window_shards: int = 16,
        rank: int = 0,
        workers: int = 1,
    ) -> None:
        """shuffle: global, or window: at most `window_shards` shards of a source are mixed at a time, and the samples
        to validate on come from few shards. rank, workers: of B samples this one of so many workers reads the places
        rank, rank + workers, ..., so that each share is as mixed as the whole."""
        self.sources = tuple(sources)
        self.rank, self.workers = rank, workers
        self.batch_size, self.seed, self.keys, self.colour_jitter = batch_size, seed, tuple(keys), colour_jitter
        ids = [source.reader.ids for source in self.sources]
        shards = [source.reader.shards for source in self.sources]
        among = shards if shuffle == "window" else None
        self.held_out = held_out(ids, validation_fraction, validation_samples, among)
        self.training = [np.setdiff1d(np.arange(len(i)), out) for i, out in zip(ids, self.held_out, strict=True)]
        for source, rows in zip(self.sources, self.training, strict=True):
            if not len(rows):
                raise InputError(f"data set {source.dataset} has no sample to train on; leave it out of train.on")
        self.quotas = tuple(quotas([source.weight for source in self.sources]))
        names = [source.dataset for source in self.sources]
        self._windows: list[WindowEpochs] = []
        self._epochs: Sequence[Epochs] = [
            GlobalEpochs(seed, name, len(rows)) for name, rows in zip(names, self.training, strict=True)
        ]
        if shuffle == "window":
            self._epochs = self._windows = [
                WindowEpochs(seed, name, s[rows], window_shards)
                for name, s, rows in zip(names, shards, self.training, strict=True)
            ]

    def draws(self, step: int) -> list[tuple[Ints, Ints]]:
        """Rows and views of step `step` (from 0), one pair a source; of all workers."""
        return [self._rows_and_views(i, numbers) for i, numbers in enumerate(self._numbers(step))]

    def share(self, step: int) -> list[tuple[Ints, Ints]]:
        """Those of the step's draws that this worker reads."""
        shares, place = [], 0
        for rows, views in self.draws(step):
            mine = slice((self.rank - place) % self.workers, None, self.workers)
            shares.append((rows[mine], views[mine]))
            place += len(rows)
        return shares

    def batch(self, step: int) -> Batch:
        """The arrays `keys` of this worker's share of a step, `pictures` (B / workers,256,256,3) uint8 and `sample_id`
        among them.

        Features come as they are stored: whoever trains multiplies them by `teacher/features_scale`, where it trains.
        """
        parts = [
            source.reader.read(rows, views, self.keys, decoded=False)
            for source, (rows, views) in zip(self.sources, self.share(step), strict=True)
            if len(rows)
        ]
        batch = _joined(parts)
        if self.colour_jitter:
            rng = random_generator(self.seed, "colour", step)
            colour = rng.uniform(1 - self.colour_jitter, 1 + self.colour_jitter, size=(self.batch_size, 1, 1, 3))
            batch[PICTURES] = _tinted(batch[PICTURES], colour[self.rank :: self.workers])
        return batch

    def batches(self, first_step: int, last_step: int, workers: int) -> Iterator[Batch]:
        """Batches of steps [first_step, last_step), read ahead by `workers` threads (0: in the caller's)."""
        steps = range(first_step, last_step)
        if not self._windows:
            yield from in_order(self.batch, steps, workers)
            return
        with WindowFetcher(self._windows, [source.reader for source in self.sources]) as fetcher:

            def fetching_ahead(step: int) -> Batch:
                fetcher.reached(self._numbers(step))
                return self.batch(step)

            yield from in_order(fetching_ahead, steps, workers)

    @property
    def validation_size(self) -> int:
        """How many samples are held out."""
        return sum(len(rows) for rows in self.held_out)

    def validation_batches(self) -> Iterator[Batch]:
        """The held-out samples, their plain view, in the snapshots' order; the last batch may be smaller.

        Of several workers each has every so manyth batch, in turn.
        """
        chunks = [
            (source.reader, rows[start : start + self.batch_size].tolist())
            for source, rows in zip(self.sources, self.held_out, strict=True)
            for start in range(0, len(rows), self.batch_size)
        ][self.rank :: self.workers]

        def read(chunk: int) -> Batch:
            reader, rows = chunks[chunk]
            return reader.read(rows, [0] * len(rows), self.keys, decoded=False)

        # Where shards may have to be fetched, several come at a time.
        yield from in_order(read, range(len(chunks)), SHARDS_AT_ONCE if self._windows else 0)

    def _numbers(self, step: int) -> list[Ints]:
        """For each source, which of its own draws (counted from the run's start) fall into this step."""
        first, last = step * self.batch_size, (step + 1) * self.batch_size
        numbers: list[list[Ints]] = [[] for _ in self.sources]
        for block in range(first // BLOCK, (last - 1) // BLOCK + 1):
            order = block_order(self.seed, block, self.quotas)
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
            picks[now] = self._epochs[i].picks(epoch, places[now])
        return rows[picks], (first_views(self.seed, name, views, len(rows))[picks] + epochs) % views


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


def _tinted(pictures: NDArray[np.uint8], colour: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.asarray(np.clip(pictures * colour.astype(np.float32), 0, 255), dtype=np.uint8)
