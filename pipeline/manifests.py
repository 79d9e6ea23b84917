"""Which manifest belongs to which source file, and the tables of the data sets that a run works on."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.digests import DigestMemory, Stamp, digest_of, stamp
from pipeline.experiment import Experiment
from stages.config import DatasetConfig, HamerNpzDataset
from stages.ingest import ingest_identity, named_files, scan_source, source_files, without_repeated_ids
from stages.sources import path_from
from storage.durable import write_bytes_atomic
from storage.errors import InputError
from storage.inputs import bring, is_file
from storage.manifest import manifest_name, read_manifest, read_plan_columns


@dataclass(frozen=True)
class Source:
    """One source file of a data set: a tar, or an evaluation npz."""

    dataset: str
    config: DatasetConfig
    path: Path
    base: Path
    identity: str
    """Digest of what, besides the file's bytes, decides its manifest."""

    @property
    def place(self) -> str:
        return f"{self.dataset}|{self.path}"

    @property
    def key(self) -> str:
        return f"{self.place}|{self.identity}"

    def inputs(self) -> list[Path]:
        """Every file but the pictures of an npz that the manifest is made from."""
        if isinstance(self.config, HamerNpzDataset):
            truth = [path for path in (self.config.truth_xyz, self.config.truth_verts) if path]
            return [self.path, *((self.base / Path(path).expanduser()) for path in truth)]
        return [self.path]


def sources_of(experiment: Experiment, dataset: str, config: DatasetConfig) -> list[Source]:
    """The data set's source files in order; those of a synthesised set may have still to be made.

    Raises:
        InputError: a file is missing.
    """
    files = named_files if dataset in experiment.synthesised else source_files
    return _sources(experiment, dataset, config, files(config, experiment.base))


def named_sources(experiment: Experiment, dataset: str, config: DatasetConfig) -> list[Source]:
    """The same, whether or not the files are there."""
    return _sources(experiment, dataset, config, named_files(config, experiment.base))


def _sources(experiment: Experiment, dataset: str, config: DatasetConfig, files: Iterable[Path]) -> list[Source]:
    identity = digest_of(ingest_identity(dataset, config))
    return [Source(dataset, config, path, experiment.base, identity) for path in files]


class ManifestIndex:
    """source -> manifest file, valid while the files it was made from keep their size, time and inode, or their bytes.

    Losing the index costs a second scan, which finds the same manifests.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._path = experiment.workdir.state / "sources.json"
        self._folder = experiment.workdir.manifests
        self._rehash = experiment.rehash
        self._digests = experiment.digests
        self._reread = experiment.reread
        self._entries: dict[str, dict[str, Any]] = {}
        if self._path.is_file():
            try:
                self._entries = json.loads(self._path.read_text(encoding="utf-8"))
            except ValueError:
                self._entries = {}  # only a memory

    def manifest(self, source: Source) -> Path | None:
        """The source's manifest, if it is known for the files as they are now."""
        entry = self._entries.get(source.key)
        if entry is None:
            return None
        path = self._folder / str(entry["manifest"])
        if not path.is_file() or not is_file(source.path):
            return None
        same = entry["stamps"] == [_stamp_or_none(item) for item in source.inputs()]
        if isinstance(source.config, HamerNpzDataset):
            same = same and entry["pictures"] == pictures_signature(source, path)
            if not same:
                return None
        if (not same or self._rehash) and not self._holds(source, path):
            return None  # only the bytes count: a tar that was touched or copied back needs no second scan
        return path

    def remembered(self, source: Source) -> Path | None:
        """The manifest of the source's last scan, whatever has become of the source since."""
        entry = self._entries.get(source.key)
        path = None if entry is None else self._folder / str(entry["manifest"])
        return path if path is not None and path.is_file() else None

    def _holds(self, source: Source, manifest: Path) -> bool:
        """Whether a source's bytes are those of its manifest. The pictures of an npz are read once a process."""
        if not isinstance(source.config, HamerNpzDataset):
            return not changed_files(source, manifest, self._digests)
        key = f"source {source.key} {manifest.name}"
        if key not in self._reread and not changed_files(source, manifest, self._digests):
            self._reread.add(key)
        return key in self._reread

    def knew(self, source: Source) -> bool:
        """Whether the source had a manifest once (so that it is changed, not new)."""
        prefix = f"{source.dataset}|{source.path}|"
        return any(key.startswith(prefix) for key in self._entries)

    def forgotten(self, sources: Iterable[Source], elsewhere: Collection[str]) -> list[str]:
        """Places of source files that had a manifest and that no configuration names any more.

        elsewhere: the places that other pipeline files name.
        """
        named = {source.place for source in sources} | set(elsewhere)
        return sorted({place for key in self._entries if (place := key.rsplit("|", 1)[0]) not in named})

    def remember(self, source: Source, stamps: list[Stamp], manifest: Path) -> None:
        npz = isinstance(source.config, HamerNpzDataset)
        self._entries[source.key] = {
            "manifest": str(manifest.relative_to(self._folder)),
            "stamps": [list(item) for item in stamps],
            "pictures": pictures_signature(source, manifest) if npz else None,
        }

    def forget(self, places: Collection[str]) -> None:
        self._entries = {key: entry for key, entry in self._entries.items() if key.rsplit("|", 1)[0] not in places}

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(self._path, json.dumps(self._entries, sort_keys=True).encode())


def changed_files(source: Source, manifest: Path, digests: DigestMemory) -> list[str]:
    """Files of a source that do not hold what its manifest says; all of them are read.

    A tar is one file. Of an npz the pictures are named, or itself where none of them is other than it was.
    """
    if not isinstance(source.config, HamerNpzDataset):
        return [] if digests.sha256(source.path) == _source_digest(manifest) else [str(source.path)]
    try:
        for path in source.inputs():
            bring(path)
        now = scan_source(source.dataset, source.config, source.path, source.base)
    except InputError:
        return [str(source.path)]
    if manifest_name(now) == manifest.name:
        return []
    pictures = ["image_name", "image_sha256"]
    was, found = (
        set(zip(*table.to_pydict().values(), strict=True))
        for table in (read_manifest(manifest, pictures), now.select(pictures))
    )
    folder = path_from(source.config.image_dir, source.base)
    return [str(folder / name) for name in sorted({name for name, _ in was - found})] or [str(source.path)]


def pictures_signature(source: Source, manifest: Path) -> str:
    """Digest of the sizes, times and inodes of the pictures that an npz names; a missing one counts as missing."""
    assert isinstance(source.config, HamerNpzDataset)
    folder = source.base / Path(source.config.image_dir).expanduser()
    names = sorted(set(read_manifest(manifest, columns=["image_name"]).column("image_name").to_pylist()))
    return digest_of([[name, _stamp_or_none(folder / name)] for name in names])


def _stamp_or_none(path: Path) -> list[int] | None:
    try:
        return list(stamp(path))
    except OSError:
        return None


def _source_digest(manifest: Path) -> str | None:
    column = read_manifest(manifest, columns=["source_sha256"]).column("source_sha256")
    return str(column[0].as_py()) if len(column) else None


@dataclass(frozen=True, eq=False)
class Manifest:
    """A source's manifest as planning needs it."""

    path: Path
    table: pa.Table
    """PLAN_COLUMNS only: labels and truth are four fifths of the bytes. Cut to a smoke run's limit."""


def manifests_of(
    experiment: Experiment, dataset: str, config: DatasetConfig, index: ManifestIndex
) -> Iterator[tuple[Source, Manifest | None]]:
    """(source, its manifest or None where it has still to be scanned), as far as a smoke run's limit needs them."""
    left = experiment.limit
    for source in sources_of(experiment, dataset, config):
        if left is not None and left <= 0:
            return
        path = index.manifest(source)
        if path is None:
            yield source, None
            if left is not None:
                return  # how many samples it holds decides whether another is needed
            continue
        manifest = _manifest(path, left)
        if left is not None:
            left -= len(manifest.table)
        yield source, manifest


@cache
def _manifest(path: Path, limit: int | None) -> Manifest:
    """Read once a process: a manifest's name is its content, and every stage's plan asks for all of them."""
    table = read_plan_columns(path)
    return Manifest(path, table if limit is None else table.slice(0, limit))


@lru_cache(maxsize=64)
def tables_of(manifests: tuple[Manifest, ...]) -> list[pa.Table]:
    """One data set's manifests (told apart as objects), a hand whose id came before marked as left out."""
    return without_repeated_ids([manifest.table for manifest in manifests])
