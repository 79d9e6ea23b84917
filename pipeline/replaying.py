"""Replaying cached rows: what ingest knew of them is found, their views made again from the sources and compared.

A source that is gone or holds something else by now is no damage of the cache: it is counted apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.caches import CacheState
from pipeline.experiment import Experiment
from stages.pictures import decode
from stages.preparation import Row, photo_file, read_photo
from stages.replay import LIBRARIES, Comparison, View, compare, picture_libraries, remake, stored_view
from stages.sources import SourceChangedError, SourceMissingError
from storage.errors import DamageError
from storage.manifest import labels_sha256, read_manifest
from storage.reading import CacheReader
from storage.snapshots import read_snapshot, snapshot_path

REMEDY = "Its checksums are right, so `handstill run` keeps it: delete that folder, then run"
"""What to do about a shard that is whole and wrong."""


@dataclass
class Replays:
    """What became of the rows that were to be replayed."""

    rows: int = 0
    """Rows all of whose views were made again and compared."""
    missing: set[str] = field(default_factory=set)
    """Source files that are not there."""
    changed: set[str] = field(default_factory=set)
    """Source files that hold something else than when they were ingested."""
    wrong: list[str] = field(default_factory=list)
    """Sample, view and what differs."""
    identical: int = 0
    """Pictures that came out the same to the bit."""
    pictures: int = 0
    max_pixel_difference: int = 0
    max_label_difference: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count one row."""
        self.missing |= outcome.missing
        self.changed |= outcome.changed
        self.wrong += outcome.wrong
        self.rows += bool(outcome.views)
        for _, _, comparison in outcome.views:
            self.pictures += 1
            self.identical += comparison.identical_picture
            self.max_pixel_difference = max(self.max_pixel_difference, comparison.max_pixel_difference)
            self.max_label_difference = max(self.max_label_difference, comparison.max_label_difference)


@dataclass
class Outcome:
    """What became of one row."""

    sample_id: str
    views: list[tuple[View, View, Comparison]] = field(default_factory=list)
    """(stored, made again, how they differ), one a view; empty where the source could not be used."""
    missing: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)


def replay(
    experiment: Experiment,
    state: CacheState,
    reader: CacheReader,
    positions: Sequence[int],
    advance: Callable[[], None] = lambda: None,
) -> Iterator[Outcome]:
    """Make all views of these rows again, from whichever manifest knows them, in order.

    A manifest that cannot be read is an outcome of its own, of no sample.
    """
    rows = _rows_of(state, reader, positions)
    known, unreadable = _manifest_rows(experiment, rows)
    yield from (Outcome("", wrong=[message]) for message in unreadable)

    def look(row: _CachedRow) -> Outcome:
        return _replay_row(experiment.base, state, reader, row, known.pop(row.join))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for outcome in pool.map(look, rows):
            advance()
            yield outcome


@dataclass(frozen=True)
class _CachedRow:
    """A row of a snapshot."""

    position: int
    dataset: str
    sample_id: str
    shard: str
    source: str
    image_sha256: str
    labels_sha256: str

    @property
    def join(self) -> tuple[str, str, str]:
        """What it must share with a row of a manifest."""
        return self.sample_id, self.image_sha256, self.labels_sha256


def _rows_of(state: CacheState, reader: CacheReader, positions: Sequence[int]) -> list[_CachedRow]:
    columns = ["dataset", "sample_id", "shard", "source", "image_sha256", "labels_sha256", "row"]
    tables = [read_snapshot(snapshot_path(state.root, digest)).select(columns) for digest in reader.digests.values()]
    table = pa.concat_tables(tables)
    cached = table.filter(pc.is_valid(table["row"])).drop_columns(["row"]).take(pa.array(positions, pa.int64()))
    return [_CachedRow(position, **row) for position, row in zip(positions, cached.to_pylist(), strict=True)]


def _manifest_rows(
    experiment: Experiment, rows: Sequence[_CachedRow]
) -> tuple[dict[tuple[str, str, str], list[dict[str, Any]]], list[str]]:
    """For each row those of the manifests that know its picture and labels under its id; manifests that cannot be read.

    All manifests are looked through, older ones too: what was cached from them is still in the cache. The source may be
    another one by now.
    """
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {row.join: [] for row in rows}
    unreadable = []
    for dataset in sorted({row.dataset for row in rows}):
        wanted = pa.array([row.sample_id for row in rows if row.dataset == dataset])
        for path in sorted((experiment.workdir.manifests / dataset).glob("*.parquet")):
            try:
                known = _rows_in(path, wanted)
            except DamageError as error:
                unreadable.append(str(error))
                continue
            for row in known:
                found.get((row["sample_id"], row["image_sha256"], row["labels_sha256"]), []).append(row)
    return found, unreadable


def _rows_in(path: Path, wanted: pa.Array) -> list[dict[str, Any]]:
    """The rows of one manifest with these ids; it is read in full only where it has some."""
    here = pc.is_in(read_manifest(path, ["sample_id"])["sample_id"], wanted)
    if not pc.any(here).as_py():
        return []
    rows: list[dict[str, Any]] = read_manifest(path).filter(here).to_pylist()
    return [row | {"manifest": path} for row in rows]


def _replay_row(
    base: Path, state: CacheState, reader: CacheReader, cached: _CachedRow, known: Sequence[Row]
) -> Outcome:
    outcome = Outcome(cached.sample_id)
    for row in known:
        if labels_sha256(dict(row)) != cached.labels_sha256:
            outcome.wrong.append(
                f"{row['manifest']}: the labels of {cached.sample_id} are not those of their digest. Delete it; "
                "`handstill run` writes it again."
            )
            continue
        try:
            photo = decode(read_photo(row, base))
        except SourceMissingError:
            outcome.missing.add(str(photo_file(row, base)))
            continue
        except SourceChangedError:
            outcome.changed.add(str(photo_file(row, base)))
            continue
        assert photo is not None, f"{cached.sample_id} was cached from a picture that cannot be decoded"
        return _compared(state, reader, cached, row, photo)
    if not known:
        outcome.missing.add(str(base / cached.source))
    return outcome


def _compared(state: CacheState, reader: CacheReader, cached: _CachedRow, row: Row, photo: Any) -> Outcome:
    outcome = Outcome(cached.sample_id)
    record = state.records[cached.shard]
    same_libraries = record.provenance.get(LIBRARIES) == picture_libraries()
    for view in range(reader.n_views):
        try:
            stored = stored_view(reader, cached.position, view)
        except DamageError as error:
            outcome.wrong.append(str(error))
            continue
        remade = remake(stored, row, photo, state.role, state.settings.pictures)
        comparison = compare(stored, remade, same_libraries)
        outcome.views.append((stored, remade, comparison))
        if comparison.differences:
            shard = state.folder.shard_path(cached.shard)
            told = "; ".join(comparison.differences)
            outcome.wrong.append(
                f"{shard}: {cached.sample_id} view {view} is not what its source gives: {told}. {REMEDY}"
            )
    return outcome
