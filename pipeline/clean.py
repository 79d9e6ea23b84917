"""`handstill clean --stale`: outputs that no plan refers to any more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.auditing import audited_snapshots
from pipeline.caches import CacheState, cache_state
from pipeline.calibrations import CALIBRATIONS, calibration_folder
from pipeline.evaluating import evaluation_states
from pipeline.experiment import Experiment
from pipeline.ingesting import used_datasets
from pipeline.manifests import ManifestIndex, manifests_of
from pipeline.tables import bytes_below, human_bytes
from pipeline.training import StudentState, student_states
from pipeline.workdir import lease
from storage.cache import CacheFolder
from storage.config import is_fitted
from storage.durable import remove_tree
from storage.errors import InputError


def clean(experiment: Experiment, *, delete: bool) -> dict[str, Any]:
    """List what is stale, and delete it if asked to.

    Raises:
        InputError: the caches are not up to date, so what is stale is not known.
    """
    states = [cache_state(experiment, role) for role in ("train", "evaluate")]
    unfinished = [name for state in states for name in state.datasets if not state.complete(name)]
    if unfinished:
        raise InputError(
            f"clean: {', '.join(sorted(set(unfinished)))} is not cached yet, so what can go is not known; "
            "run `handstill run` first"
        )
    students = student_states(experiment, states[0])
    stale = [
        *_stale_manifests(experiment),
        *_stale_caches(experiment, states),
        *_stale_calibrations(experiment, states),
        *_stale_shards(states),
        *_stale_students(experiment, students),
        *_stale_evaluations(experiment),
        *_stale_audits(experiment, states),
    ]
    sizes = {str(path): bytes_below(path) for path in stale}
    if delete:
        with lease(experiment.workdir):
            for path in stale:
                _delete(path)
    return {"stale": sizes, "bytes": sum(sizes.values()), "deleted": delete}


def _stale_manifests(experiment: Experiment) -> Iterator[Path]:
    index = ManifestIndex(experiment)
    kept = {
        manifest.path
        for name, config in used_datasets(experiment).items()
        for _, manifest in manifests_of(experiment, name, config, index)
        if manifest is not None
    }
    yield from (path for path in sorted(experiment.workdir.manifests.glob("*/*.parquet")) if path not in kept)


def _stale_caches(experiment: Experiment, states: list[CacheState]) -> Iterator[Path]:
    kept = {state.root for state in states} | {experiment.workdir.caches / CALIBRATIONS}
    yield from (path for path in sorted(experiment.workdir.caches.glob("*")) if path not in kept)


def _stale_calibrations(experiment: Experiment, states: list[CacheState]) -> Iterator[Path]:
    kept = {
        calibration_folder(experiment, state.identity)
        for state in states
        if is_fitted(state.identity["features"]["encoding"])
    }
    found = sorted((experiment.workdir.caches / CALIBRATIONS).glob("*"))
    yield from (path for path in found if path not in kept)


def _stale_shards(states: list[CacheState]) -> Iterator[Path]:
    """Shards and snapshots of data that are gone or changed; a ledger record goes with its shard."""
    for state in states:
        shards = {plan.input_hash for dataset in state.datasets.values() for plan in dataset.plans}
        snapshots = set(state.digests.values())
        yield from (path for path in sorted(state.folder.shards_dir.glob("*.zarr")) if path.stem not in shards)
        yield from (path for path in sorted(state.folder.snapshots_dir.glob("*")) if path.stem not in snapshots)


def _stale_students(experiment: Experiment, students: list[StudentState]) -> Iterator[Path]:
    kept = {state.folder for state in students}
    yield from (path for path in sorted(experiment.workdir.students.glob("*/*/*")) if path not in kept)


def _stale_evaluations(experiment: Experiment) -> Iterator[Path]:
    states = evaluation_states(experiment)
    if any(state.identity is None for state in states):
        return  # a student is not trained yet: which of its scores are stale is not known
    kept = {state.folder for state in states}
    yield from (path for path in sorted(experiment.workdir.evaluations.glob("*/*")) if path not in kept)


def _stale_audits(experiment: Experiment, states: list[CacheState]) -> Iterator[Path]:
    """Audits of other snapshots than the current ones; what a cache was compared with may be older."""
    current = {str(state.root): state.digests for state in states}
    for path in sorted(experiment.workdir.audits.glob("*")):
        audited = audited_snapshots(path)
        if any(current.get(root, {}).get(name) != digest for root, found in audited for name, digest in found.items()):
            yield path


def _delete(path: Path) -> None:
    if path.suffix == ".zarr":
        CacheFolder(path.parent.parent).discard(path.stem)
    else:
        remove_tree(path)


def clean_text(document: Mapping[str, Any]) -> str:
    """The same for a person."""
    if not document["stale"]:
        return "Nothing is stale."
    lines = [f"{human_bytes(size):>8}  {path}" for path, size in document["stale"].items()]
    end = "deleted" if document["deleted"] else "not deleted: add --yes"
    return "\n".join([*lines, f"{len(lines)} outputs, {human_bytes(document['bytes'])}, {end}"])
