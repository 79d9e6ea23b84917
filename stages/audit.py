"""Statistics over whole caches that do not fit in memory: Dask graphs with a partition a shard, merged as trees.

No scheduler is named here: whoever computes a graph brings one (Dask's threads, or Ray). The shape of the trees follows
from the list of shards alone and parts are merged in its order, so that every scheduler gives the same digits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.tally import Counterpart, ShardJob, Tally, count_shard, merge
from storage import layout
from storage.cache import CacheFolder
from storage.errors import InputError, WorkError
from storage.ledger import read_record
from storage.snapshots import read_snapshot, snapshot_path

GROUP = 64
"""Shards of one graph; a graph is done before its memory is forgotten, and progress is told then."""
FAN_IN = 8
"""So many tallies are merged at a time (0.3 MB each at three views of 1280 channels)."""

SMALL_COPIES = 4
"""Working on a shard's small arrays takes at most so many times their bytes (float64, differences, alignments): 2
measured."""
PIECE_BYTES = 24 << 20
"""What a partition takes besides: decoded pieces, one-off allocations of the first. 22 MiB measured."""

Compute = Callable[[Sequence[Any]], Sequence[Tally]]
"""Computes several graphs (dask Delayed) at once, in order."""


@dataclass(frozen=True)
class AuditedCache:
    """A cache at one moment: the snapshots say which of its samples are meant."""

    name: str
    """Its role, or `against`."""
    root: Path
    snapshots: Mapping[str, str]
    """Data set -> digest."""

    @property
    def identity(self) -> dict[str, Any]:
        return CacheFolder(self.root).identity

    @cached_property
    def shards(self) -> dict[str, dict[str, int]]:
        """By data set its shards, in the snapshot's order, with how many samples of the snapshot each holds."""
        found = {}
        for dataset in self.snapshots:
            places = self.samples(dataset, "shard").group_by("shard", use_threads=False).aggregate([([], "count_all")])
            found[dataset] = dict(zip(places["shard"].to_pylist(), places["count_all"].to_pylist(), strict=True))
        return found

    def samples(self, dataset: str, *columns: str) -> pa.Table:
        """The cached samples of a data set: these columns of the snapshot."""
        table = read_snapshot(snapshot_path(self.root, self.snapshots[dataset]), columns)
        return table.filter(pc.is_valid(table["shard"]))

    @cached_property
    def shard_bytes(self) -> dict[str, dict[str, int]]:
        """By shard: `small` and `features`, what reading them without pictures takes."""
        found = {}
        for shard in (shard for shards in self.shards.values() for shard in shards):
            files = read_record(CacheFolder(self.root).record_path(shard)).files
            sizes = {
                part: sum(digest.bytes for name, digest in files.items() if name.startswith(f"{part}/"))
                for part in (layout.FEATURES, layout.PICTURE_BYTES)
            }
            total = sum(digest.bytes for digest in files.values())
            found[shard] = {"small": total - sum(sizes.values()), "features": sizes[layout.FEATURES]}
        return found


def shard_jobs(cache: AuditedCache, worst: int, other: AuditedCache | None = None) -> dict[str, list[ShardJob]]:
    """By data set, a partition for each shard; data sets without a cached sample are left out.

    other: a cache whose answers to the same samples are compared.
    """
    jobs = {}
    for dataset, shards in cache.shards.items():
        matches = _counterparts(cache, other, dataset) if other and dataset in other.snapshots else {}
        if shards:
            jobs[dataset] = [
                ShardJob(cache.root, shard, dataset, rows, worst, matches.get(shard, ()))
                for shard, rows in shards.items()
            ]
    return jobs


def _counterparts(cache: AuditedCache, other: AuditedCache, dataset: str) -> dict[str, tuple[Counterpart, ...]]:
    """By shard of the cache, where the same samples stand in the other one."""
    ours, theirs = (each.samples(dataset, "sample_id", "shard", "row") for each in (cache, other))
    both = ours.join(theirs, "sample_id", join_type="inner", right_suffix="_there", use_threads=False)
    both = both.sort_by([("shard", "ascending"), ("shard_there", "ascending"), ("row", "ascending")])
    found: dict[str, list[Counterpart]] = {}
    for shard, there, rows in _runs(both):
        ours_at, theirs_at = rows["row"].to_pylist(), rows["row_there"].to_pylist()
        found.setdefault(shard, []).append(Counterpart(other.root, there, tuple(theirs_at), tuple(ours_at)))
    return {shard: tuple(parts) for shard, parts in found.items()}


def _runs(table: pa.Table) -> Iterator[tuple[str, str, pa.Table]]:
    """The pieces of a sorted table in which both shards stay the same."""
    if not len(table):
        return
    names = [table[name].combine_chunks().dictionary_encode().indices.to_numpy() for name in ("shard", "shard_there")]
    cuts = np.flatnonzero((np.diff(names[0]) != 0) | (np.diff(names[1]) != 0)) + 1
    for start, stop in zip([0, *cuts], [*cuts, len(table)], strict=True):
        part = table.slice(start, stop - start)
        yield part["shard"][0].as_py(), part["shard_there"][0].as_py(), part


def graph(jobs: Sequence[ShardJob]) -> Any:
    """A dask Delayed that counts every shard and merges the tallies as a tree."""
    from dask.delayed import delayed

    level = [delayed(count_shard, pure=False)(job) for job in jobs]
    while len(level) > 1:
        level = [delayed(merge, pure=False)(level[at : at + FAN_IN]) for at in range(0, len(level), FAN_IN)]
    return level[0]


def tally_of(
    jobs: Sequence[ShardJob], compute: Compute, at_once: int = 1, done: Callable[[int], None] | None = None
) -> Tally:
    """The statistics of some shards, `at_once` graphs of GROUP shards at a time.

    done: told how many shards came to an end.
    """
    groups = [jobs[at : at + GROUP] for at in range(0, len(jobs), GROUP)]
    parts: list[Tally] = []
    for at in range(0, len(groups), at_once):
        batch = groups[at : at + at_once]
        parts += compute([graph(group) for group in batch])
        if done is not None:
            done(sum(map(len, batch)))
    return merge(parts)


def computed_by_threads(workers: int) -> Compute:
    """Dask's own scheduler in this process. Threads: numpy leaves the interpreter's lock in all that takes long."""

    def compute(graphs: Sequence[Any]) -> Sequence[Tally]:
        from dask.base import compute as computed

        found: Sequence[Tally] = computed(*graphs, scheduler="threads", num_workers=workers)  # type: ignore[no-untyped-call]
        return found

    return compute


def partition_bytes(cache: AuditedCache, other: AuditedCache | None = None) -> int:
    """The most memory that counting one of the shards takes."""
    small = max((sizes["small"] for each in (cache, other) if each for sizes in each.shard_bytes.values()), default=0)
    return PIECE_BYTES + small * SMALL_COPIES * (2 if other else 1)


def partitions_at_once(memory_bytes: int, taken_bytes: int, one_bytes: int, cores: int) -> int:
    """How many shards may be read at a time within the memory, of which some is taken already.

    Raises:
        InputError: not even one.
    """
    fitting = (memory_bytes - taken_bytes) // one_bytes
    if fitting < 1:
        raise InputError(
            f"audit.memory_gib: found {memory_bytes / 2**30:.2f}; this process takes {taken_bytes / 2**30:.2f} and one "
            f"shard {one_bytes / 2**30:.2f} more. Allow at least {(taken_bytes + one_bytes) / 2**30:.2f}."
        )
    return int(min(fitting, cores))


def resident_bytes() -> int:
    """What this process holds of the machine's memory."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError) as error:
        raise WorkError(f"cannot tell how much memory this process has: {error}") from error
    return pages * os.sysconf("SC_PAGE_SIZE")
