"""Which sample comes when: pure functions of the seed, the data set and the number of the draw.

An epoch of a source shows every one of its training rows once. `GlobalEpochs` draws an order of all rows anew each
epoch; `WindowEpochs` draws an order of the shards, cuts it into windows of at most W shards and mixes the rows of each
window, so that whoever reads needs W shards at a time. How much less that mixes: docs/decisions/013.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

BLOCK = 1000
"""Draws within which each source gets exactly its share: weights are honoured to a thousandth, and at least one."""
VALIDATION_SHARDS = 16
"""Where shards must be fetched, the held-out samples come from about so many, at least one a source: 2,048 samples
chosen among all shards of the real job would be in some 1,700 of them."""


class Epochs(Protocol):
    """The order of one source's training rows in every epoch."""

    def picks(self, epoch: int, places: Ints) -> Ints:
        """Which training rows (positions among them) stand at these places of the epoch's order."""
        ...


class GlobalEpochs:
    """Every order is as likely as any other. Needs 8 bytes a row for each epoch that is in use."""

    def __init__(self, seed: int, source: str, size: int) -> None:
        self._seed, self._source, self._size = seed, source, size

    def picks(self, epoch: int, places: Ints) -> Ints:
        return _permutation(self._seed, self._source, epoch, self._size)[places]


class WindowEpochs:
    """Shards in random order, `window_shards` of them mixed at a time. Needs 8 bytes a row, and as much a window."""

    def __init__(self, seed: int, source: str, shards: NDArray[np.int32], window_shards: int) -> None:
        """shards: (n,) the shard of each training row."""
        self._seed, self._source = seed, source
        self._names, numbers, counts = np.unique(shards, return_inverse=True, return_counts=True)
        self._counts: Ints = counts
        self._rows: Ints = np.argsort(numbers, kind="stable")
        self._starts: Ints = np.concatenate([[0], np.cumsum(counts)])
        self.n_windows = -(-len(self._names) // window_shards)
        """Of each epoch. Their sizes differ by at most one shard, so that none is badly mixed."""
        self._layout = lru_cache(maxsize=4)(self._draw_layout)
        self._members = lru_cache(maxsize=4)(self._draw_members)

    def picks(self, epoch: int, places: Ints) -> Ints:
        _, starts = self._layout(epoch)
        windows = np.searchsorted(starts, places, side="right") - 1
        picks = np.empty(len(places), np.int64)
        for window in np.unique(windows).tolist():
            now = windows == window
            picks[now] = self._members(epoch, window)[places[now] - starts[window]]
        return picks

    def window_of(self, number: int) -> tuple[int, int]:
        """(epoch, window) of a draw, counted from the run's start; windows compare in the order they come in."""
        epoch, place = divmod(number, len(self._rows))
        _, starts = self._layout(epoch)
        return epoch, int(np.searchsorted(starts, place, side="right")) - 1

    def after(self, epoch: int, window: int) -> tuple[int, int]:
        """The window that comes next."""
        return (epoch, window + 1) if window + 1 < self.n_windows else (epoch + 1, 0)

    def shards(self, epoch: int, window: int) -> list[int]:
        """The shards that a window mixes."""
        shards: list[int] = self._names[self._layout(epoch)[0][window]].tolist()
        return shards

    def _draw_layout(self, epoch: int) -> tuple[list[Ints], Ints]:
        """The shards of each window (positions in `_names`), and at which place of the epoch each one begins."""
        order = random_generator(self._seed, f"shards of {self._source}", epoch).permutation(len(self._names))
        windows = np.array_split(order, self.n_windows)
        sizes = [int(self._counts[window].sum()) for window in windows]
        return windows, np.concatenate([[0], np.cumsum(sizes)[:-1]])

    def _draw_members(self, epoch: int, window: int) -> Ints:
        shards = self._layout(epoch)[0][window].tolist()
        rows = np.concatenate([self._rows[self._starts[shard] : self._starts[shard + 1]] for shard in shards])
        return random_generator(self._seed, f"epoch {epoch} of {self._source}", window).permutation(rows)


def quotas(weights: Sequence[float]) -> list[int]:
    """How many of BLOCK draws each source gets: largest remainders, at least one each."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while (missing := BLOCK - int(counts.sum())) != 0:
        counts[np.argmax((exact - counts) * np.sign(missing))] += np.sign(missing)
    return [int(count) for count in counts]


def held_out(
    ids: Sequence[Sequence[str]],
    fraction: float,
    at_most: int,
    shards: Sequence[NDArray[np.int32]] | None = None,
) -> list[Ints]:
    """Rows of each source to validate on: chosen by the hash of the sample's id, the same ones in every run.

    shards: (n,) for each source, the shard of each row; given, the rows come from about VALIDATION_SHARDS shards, those
    that hold the smallest hashes.

    A new sample never moves an old one between the two halves, unless the `at_most` smallest hashes change. With a
    fraction above 0 at least one sample is held out, and every source keeps one to train on.
    """
    if not fraction:
        return [np.zeros(0, np.int64) for _ in ids]
    hashes = [np.array([_hash64(i) for i in source], dtype=np.uint64) for source in ids]
    below = int((np.concatenate(hashes) < np.uint64(fraction * 2**64)).sum())
    eligible = [np.ones(len(h), np.bool_) for h in hashes]
    if shards is not None:
        a_source = max(VALIDATION_SHARDS // len(ids), 1)
        eligible = [_in_first_shards(h, s, a_source) for h, s in zip(hashes, shards, strict=True)]
    chosen = np.sort(np.concatenate([h[e] for h, e in zip(hashes, eligible, strict=True)]))
    limit = chosen[min(max(min(below, at_most), 1), len(chosen)) - 1]
    return [np.flatnonzero((h <= limit) & e)[: max(len(h) - 1, 0)] for h, e in zip(hashes, eligible, strict=True)]


def _in_first_shards(hashes: NDArray[np.uint64], shards: NDArray[np.int32], count: int) -> NDArray[np.bool_]:
    """Whether a row is in one of the `count` shards with the smallest hashes."""
    if not len(hashes):
        return np.zeros(0, np.bool_)
    smallest = np.full(int(shards.max()) + 1, np.iinfo(np.uint64).max)
    np.minimum.at(smallest, shards, hashes)
    return np.isin(shards, np.argsort(smallest, kind="stable")[:count])


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_generator(seed: int, what: str, number: int) -> np.random.Generator:
    """Random numbers for one purpose and one number of it."""
    return np.random.default_rng([seed, _hash64(what), number])


@lru_cache(maxsize=64)
def block_order(seed: int, block: int, quota: tuple[int, ...]) -> Ints:
    """(BLOCK,) which source each draw of the block is of."""
    return random_generator(seed, "block", block).permutation(np.repeat(np.arange(len(quota)), quota))


@lru_cache(maxsize=32)
def _permutation(seed: int, dataset: str, epoch: int, size: int) -> Ints:
    return random_generator(seed, f"epoch of {dataset}", epoch).permutation(size)


@lru_cache(maxsize=32)
def first_views(seed: int, dataset: str, views: int, size: int) -> Ints:
    """(size,) the view that each training row shows in the first epoch."""
    return random_generator(seed, f"views of {dataset}", 0).integers(views, size=size)
