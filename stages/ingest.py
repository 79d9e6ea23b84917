"""Scan source files once: every hand gets a row of the manifest, with a digest of its picture and of its labels.

A source is a tar or an evaluation npz. Damage to the file as a whole stops with InputError; what concerns single hands
becomes a reason in their rows. Hands in = usable rows + rows with a reason, always.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.annotations import NO_ANNOTATION, HandAnnotation, UnusableError, check_box, clean
from stages.config import DatasetConfig, HamerTarDataset
from stages.npz_source import npz_hands
from stages.pictures import Picture
from stages.sources import FoundHand, path_from, relative_to_base
from stages.tar_source import tar_hands
from storage.errors import InputError
from storage.inputs import is_file
from storage.manifest import manifest_table

ALGORITHM_VERSION = 1
"""Raised when the same source would give another manifest."""

_MAX_FILES = 1_000_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


def ingest_identity(dataset: str, config: DatasetConfig) -> dict[str, Any]:
    """What, besides the bytes of the source files, decides a manifest."""
    identity = {
        "algorithm_version": ALGORITHM_VERSION,
        "dataset": dataset,
        "format": config.format,
        "protocol": config.protocol,
        "filtering": config.filtering.model_dump(),
    }
    if not isinstance(config, HamerTarDataset):
        identity |= {"image_dir": config.image_dir, "truth_xyz": config.truth_xyz, "truth_verts": config.truth_verts}
    return identity


def named_files(config: DatasetConfig, base: Path) -> list[Path]:
    """The files that the data set's `path` names, in order, whether or not they are there."""
    patterns = [config.path] if isinstance(config.path, str) else config.path
    return [path_from(expanded, base) for pattern in patterns for expanded in expand_braces(pattern)]


def source_files(config: DatasetConfig, base: Path) -> list[Path]:
    """The data set's source files in order. `base`: the folder that relative paths start at.

    Raises InputError for files that are missing or named twice.
    """
    files = named_files(config, base)
    missing = [str(path) for path in files if not is_file(path)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(
            f"{len(missing)} of {len(files)} source files do not exist: {', '.join(missing[:3])}{more}. "
            "Wanted: every file that `path` names. Fetch them, or correct `path`."
        )
    twice = sorted({str(path) for path in files if files.count(path) > 1}) if len(set(files)) < len(files) else []
    if twice:
        raise InputError(f"{twice[0]} is named twice by `path`; each source file may stand there once.")
    return files


def expand_braces(pattern: str) -> Iterator[str]:
    """Spell out {000000..000130} and {a,b}, as HaMeR's own lists of tars are written."""
    if (found := _RANGE.search(pattern)) is not None:
        first, last = found.groups()
        step = 1 if int(first) <= int(last) else -1
        if abs(int(last) - int(first)) > _MAX_FILES:
            raise InputError(f"{pattern}: names more than {_MAX_FILES} files.")
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    elif (found := _CHOICE.search(pattern)) is not None:
        choices = found.group(1).split(",")
    else:
        yield pattern
        return
    for choice in choices:
        yield from expand_braces(pattern[: found.start()] + choice + pattern[found.end() :])


def scan_source(dataset: str, config: DatasetConfig, source: Path, base: Path) -> pa.Table:
    """The manifest of one source file (one of `source_files`). It is read once, from front to back.

    Raises InputError where the file as a whole cannot be used.
    """
    named = relative_to_base(source, base)
    scan = tar_hands(source) if isinstance(config, HamerTarDataset) else npz_hands(config, source, base)
    ordinals = count()
    rows = [_row(hand, config) | {"ordinal": next(ordinals)} for hand in scan.hands()]
    fixed = {
        "dataset": dataset,
        "source": named,
        "source_sha256": scan.sha256,
        "protocol": config.protocol or "",
    }
    return manifest_table([row | fixed | {"sample_id": f"{dataset}:{row['key']}#{row['hand']}"} for row in rows])


def _row(hand: FoundHand, config: DatasetConfig) -> dict[str, Any]:
    annotation, reason = _usable(hand.annotation, hand.picture, config)
    return {
        **annotation.columns(),
        **hand.picture.columns(),
        "key": hand.key,
        "hand": hand.hand,
        "truth_xyz": hand.truth_xyz,
        "truth_vertices": hand.truth_vertices,
        "reason": reason,
    }


def _usable(found: HandAnnotation | str, picture: Picture, config: DatasetConfig) -> tuple[HandAnnotation, str | None]:
    """The cleaned labels, or whatever labels there are and why they cannot be used."""
    if isinstance(found, str):
        return NO_ANNOTATION, found
    if picture.problem is not None:
        return found, picture.problem
    try:
        cleaned = clean(found, config.filtering)
        check_box(cleaned, picture.width, picture.height)
    except UnusableError as error:
        return found, str(error)
    return cleaned, None


def shared_pictures(train: Iterable[pa.Table], evaluation: Iterable[pa.Table]) -> list[tuple[str, str]]:
    """(sample id in training, sample id in evaluation) for every picture that stands in both, one pair a picture."""
    evaluated = _first_ids(evaluation, None)
    trained = _first_ids(train, pa.array(evaluated, pa.string()))
    return [(trained[digest], evaluated[digest]) for digest in evaluated if digest in trained]


def _first_ids(tables: Iterable[pa.Table], among: pa.Array | None) -> dict[str, str]:
    """Picture's digest -> first id that has it; `among`: of these pictures only (training sets have millions)."""
    ids: dict[str, str] = {}
    for table in tables:
        wanted = pc.is_null(table.column("reason"))
        if among is not None:
            wanted = pc.and_(wanted, pc.is_in(table.column("image_sha256"), among))
        usable = table.filter(wanted)
        for digest, sample_id in zip(
            usable.column("image_sha256").to_pylist(), usable.column("sample_id").to_pylist(), strict=True
        ):
            ids.setdefault(digest, sample_id)
    return ids


def without_repeated_ids(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """A data set's manifests, in the order of its sources, where an id that came before has a reason instead.

    Ids are the join key of everything downstream, so the first hand of a name stays and later ones are left out.
    """
    if not tables:
        return []
    ids = pa.concat_tables([table.select(["sample_id"]) for table in tables]).column("sample_id")
    if pc.count_distinct(ids).as_py() == len(ids):
        return list(tables)
    seen: set[str] = set()
    return [_marked(table, seen) for table in tables]


def _marked(table: pa.Table, seen: set[str]) -> pa.Table:
    repeated = np.zeros(len(table), bool)
    for row, sample_id in enumerate(table.column("sample_id").to_pylist()):
        repeated[row] = sample_id in seen
        seen.add(sample_id)
    reasons = pc.if_else(
        pa.array(repeated), "duplicate: its id stands in an earlier source file", table.column("reason")
    )
    return table.set_column(table.schema.get_field_index("reason"), table.schema.field("reason"), reasons)
