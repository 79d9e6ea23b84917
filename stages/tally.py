"""What an audit counts in one shard, in bounded memory, and how the counts of shards merge.

Letters: n samples of a shard, K views, J joints, T tokens, C channels. Rows are read in pieces of a fixed size, so that
the digits do not depend on how much memory there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.disagreement import (
    MEASURES,
    Offender,
    disagreements,
    joint_distances,
    least_over_views,
    rows_of_largest,
    worst_of,
)
from stages.moments import Distances, Moments
from stages.plausibility import QUANTITIES, beyond, quantities
from storage import layout
from storage.cache import CacheFolder
from storage.codecs import INT8_LIMIT
from storage.errors import DamageError
from storage.ledger import read_record
from storage.shard_file import ShardFile

PIECE_VALUES = 1 << 18
"""Features are decoded and counted in pieces of about so many values: 1 MB, which stays in a core's cache."""

_SAME_VIEW_PX = 1e-6
"""Views of two caches are the same view where no entry of their affine differs by more."""


@dataclass(frozen=True)
class Counterpart:
    """Samples of a shard of another cache that are also in the shard that is counted."""

    root: Path
    input_hash: str
    theirs: tuple[int, ...]
    """Their rows in that shard."""
    ours: tuple[int, ...]
    """The rows of the same samples in the shard that is counted."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to count: a partition of the graph."""

    root: Path
    input_hash: str
    dataset: str
    rows: int
    """As the snapshot says."""
    worst: int
    """How many of the worst samples are kept."""
    counterparts: tuple[Counterpart, ...] = ()


@dataclass(frozen=True)
class Tally:
    """The statistics of some shards of a cache. K: the cache's views."""

    counts: Counter[str]
    """`samples`; of int8 features `tokens`, `zero_scale`, `at_limit`, `zeros`, `values`; `beyond <quantity>`;
    `not finite <array>`: values that are NaN or infinite."""
    features: Moments
    """(K,C) of the decoded values."""
    quantities: Mapping[str, Moments]
    """(K) of each quantity of stages/plausibility.py."""
    distances: Mapping[str, Distances]
    """(K+1) of each of MEASURES between teacher and labels: by view, then of each sample the least over its views."""
    worst: Mapping[str, tuple[Offender, ...]]
    """By measure, the samples whose least is largest."""
    listed: int
    """How many of the worst are kept."""
    common: Mapping[str, Moments]
    """(K) of the joints' mean distance to the other cache's: `px`, `mm`; of nothing where there is no other."""

    def merged(self, other: Tally) -> Tally:
        """Of the shards of both."""
        return Tally(
            self.counts + other.counts,
            self.features.merged(other.features),
            {name: found.merged(other.quantities[name]) for name, found in self.quantities.items()},
            {name: found.merged(other.distances[name]) for name, found in self.distances.items()},
            {name: worst_of([*found, *other.worst[name]], self.listed) for name, found in self.worst.items()},
            self.listed,
            {name: found.merged(other.common[name]) for name, found in self.common.items()},
        )


def merge(parts: list[Tally]) -> Tally:
    """Of all shards of all parts, in their order."""
    return reduce(Tally.merged, parts)


def count_shard(job: ShardJob) -> Tally:
    """Read one shard, a piece at a time, every byte that is read checked.

    Raises:
        DamageError: bytes are not as they were written, or the shard is not the one that the snapshot means.
    """
    shard = open_shard(job.root, job.input_hash)
    if len(shard.sample_ids) != job.rows:
        raise shard.damaged(layout.SAMPLE_ID, f"it holds {len(shard.sample_ids)} samples, the snapshot {job.rows}")
    found = quantities(shard.small)
    apart = disagreements(shard.small)
    counts = Counter({"samples": job.rows}) + _not_finite(shard.small)
    counts += Counter({f"beyond {name}": int(beyond(name, values).sum()) for name, values in found.items()})
    features = _count_features(shard, counts)
    return Tally(
        counts,
        features,
        {name: Moments.of(found[name]) for name in QUANTITIES},
        {name: Distances.of(np.column_stack([apart[name], least_over_views(apart[name])])) for name in MEASURES},
        {name: worst_of(_offenders(job, shard, apart, name), job.worst) for name in MEASURES},
        job.worst,
        _common(job, shard),
    )


def open_shard(root: Path, input_hash: str) -> ShardFile:
    """A published shard by its ledger record; DamageError when there is none."""
    folder = CacheFolder(root)
    try:
        record = read_record(folder.record_path(input_hash))
    except FileNotFoundError as error:
        gone = folder.record_path(input_hash)
        raise DamageError(f"{gone} is gone: the shard was withdrawn or cleaned; run `handstill run`") from error
    return ShardFile(folder.shard_path(input_hash), record, folder.codec())


def _not_finite(arrays: Mapping[str, NDArray[Any]]) -> Counter[str]:
    bad = {name: values.size - int(np.isfinite(values).sum()) for name, values in arrays.items() if _real(values)}
    return Counter({f"not finite {name}": count for name, count in bad.items() if count})


def _real(values: NDArray[Any]) -> bool:
    return bool(np.issubdtype(values.dtype, np.floating))


def _count_features(shard: ShardFile, counts: Counter[str]) -> Moments:
    """(K,C) moments of the decoded features; adds what it counts on the way to `counts`."""
    shape = shard.feature_shape
    by_view = [Moments.empty((shape[-1],))] * shard.n_views
    piece = max(1, PIECE_VALUES // int(np.prod(shape)))
    decoded = np.empty((piece, *shape), np.float32)
    for rows in _pieces(len(shard.sample_ids), piece):
        for record in range(rows.start * shard.n_views, rows.stop * shard.n_views):
            shard.will_need(record)
        for view in range(shard.n_views):
            for place, row in enumerate(rows):
                record = row * shard.n_views + view
                shard.features_into(record, decoded[place])
                _count_stored(shard, record, counts)
            values_TC = decoded[: len(rows)].reshape(-1, shape[-1])
            part = Moments.of(values_TC)
            if bad := values_TC.size - int(part.count.sum()):
                counts[f"not finite {layout.FEATURES}"] += bad
            by_view[view] = by_view[view].merged(part)
        shard.forget_pages()
    return Moments.stacked(by_view)


def _pieces(n_rows: int, piece: int) -> Iterator[range]:
    for start in range(0, n_rows, piece):
        yield range(start, min(start + piece, n_rows))


def _count_stored(shard: ShardFile, record: int, counts: Counter[str]) -> None:
    """How int8 uses its range: a token's largest channel stands at the limit, all others share what is below."""
    if shard.feature_dtype != np.int8 or layout.FEATURES_SCALE not in shard.small:
        return
    stored, scale = shard.stored_features(record), shard.by_record[layout.FEATURES_SCALE][record]
    counts["tokens"] += scale.size
    counts["zero_scale"] += scale.size - int(np.count_nonzero(scale))
    counts["values"] += stored.size
    counts["zeros"] += stored.size - int(np.count_nonzero(stored))
    counts["at_limit"] += int(np.count_nonzero(stored == INT8_LIMIT)) + int(np.count_nonzero(stored == -INT8_LIMIT))


def _offenders(
    job: ShardJob, shard: ShardFile, apart: Mapping[str, NDArray[np.float64]], measure: str
) -> Iterator[Offender]:
    least = least_over_views(apart[measure])
    for row in rows_of_largest(least, job.worst):
        view = int(np.nanargmin(apart[measure][row]))
        values = {name: float(apart[name][row, view]) for name in MEASURES}
        yield Offender(float(least[row]), shard.sample_ids[row], job.dataset, job.input_hash, int(row), view, values)


def _common(job: ShardJob, shard: ShardFile) -> dict[str, Moments]:
    """How far the teachers' joints of two caches are apart, on samples and views that both have."""
    found = {name: [Moments.empty((shard.n_views,))] for name in ("px", "mm")}
    for other in job.counterparts:
        theirs = open_shard(other.root, other.input_hash)
        for ours_row, row in zip(other.ours, other.theirs, strict=True):
            if shard.sample_ids[ours_row] != theirs.sample_ids[row]:
                raise theirs.damaged(layout.SAMPLE_ID, f"row {row} is not {shard.sample_ids[ours_row]}")
        views = min(shard.n_views, theirs.n_views)
        ours_at, theirs_at = np.array(other.ours), np.array(other.theirs)
        affine = [shard.small["views/affine"][ours_at, :views], theirs.small["views/affine"][theirs_at, :views]]
        same = (np.abs(affine[0] - affine[1]) <= _SAME_VIEW_PX).all((2, 3))
        for name, values in joint_distances(shard.small, ours_at, theirs.small, theirs_at, views).items():
            padded = np.full((len(ours_at), shard.n_views), np.nan)
            padded[:, :views] = np.where(same, values, np.nan)
            found[name].append(Moments.of(padded))
    return {name: reduce(Moments.merged, parts) for name, parts in found.items()}
