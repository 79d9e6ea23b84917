"""`handstill clean --stale`: outputs that no plan refers to any more, whichever pipeline file's plan it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.auditing import audited_snapshots
from pipeline.caches import cache_state
from pipeline.calibrations import CALIBRATIONS
from pipeline.evaluating import evaluation_states
from pipeline.experiment import Experiment
from pipeline.references import Reference, others
from pipeline.referring import current_reference
from pipeline.sharing import alone
from pipeline.tables import bytes_below, human_bytes
from pipeline.teaching import ROLES
from pipeline.workdir import lease
from storage.cache import CacheFolder
from storage.durable import remove_tree
from storage.errors import InputError

_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


def clean(experiment: Experiment, *, delete: bool) -> dict[str, Any]:
    """List what is stale, and delete it if asked to. What another pipeline file refers to is kept.

    Raises:
        InputError: the caches are not up to date, so what is stale is not known.
        WorkError: a run is at work on the workdir, or on the caches that it shares.
    """
    states = [cache_state(experiment, role) for role in ROLES]
    unfinished = [name for state in states for name in state.datasets if not state.complete(name)]
    if unfinished:
        raise InputError(
            f"clean: {', '.join(sorted(set(unfinished)))} is not cached yet, so what can go is not known; "
            "run `handstill run` first"
        )
    own = current_reference(experiment)
    if not delete:
        return _document(experiment, own, deleted=False)
    with lease(experiment.workdir), alone(experiment.cache_references, "clean"):
        document = _document(experiment, own, deleted=True)  # now that nobody begins to refer to more
        for path in map(Path, document["stale"]):
            _delete(path)
    return document


def _document(experiment: Experiment, own: Reference, *, deleted: bool) -> dict[str, Any]:
    beside, sharing = (
        others(experiment, folder) for folder in (experiment.workdir.references, experiment.cache_references)
    )
    stale = [
        *_stale_outputs(experiment, [own, *beside.values()]),
        *_stale_audits(experiment, [own, *beside.values()]),
        *_stale_calibrations(experiment.caches_folder / CALIBRATIONS, [own, *sharing.values()]),
        *_stale_in_caches(experiment.caches_folder, [own, *sharing.values()]),
    ]
    sizes = {str(path): bytes_below(path) for path in stale}
    kept_for = [
        {"config": reference.config, "gone": reference.gone, "reference": str(path)}
        for path, reference in (beside | sharing).items()
    ]
    return {"stale": sizes, "bytes": sum(sizes.values()), "deleted": deleted, "kept_for": kept_for}


def _stale_outputs(experiment: Experiment, references: list[Reference]) -> Iterator[Path]:
    """Manifests, students and evaluations."""
    workdir = experiment.workdir
    kept = {workdir.root / path for reference in references for path in reference.outputs}
    found = [*workdir.manifests.glob("*/*.parquet"), *workdir.students.glob("*/*/*")]
    if all(state.identity is not None for state in evaluation_states(experiment)):
        found += workdir.evaluations.glob("*/*")  # else which scores are stale is not known: a student is not trained
    yield from (path for path in sorted(found) if path not in kept)


def _stale_in_caches(folder: Path, references: list[Reference]) -> Iterator[Path]:
    """Whole caches, and shards and snapshots of data that are gone or changed; a ledger record goes with its shard."""
    for root in sorted(path for path in folder.glob("*") if _FINGERPRINT.fullmatch(path.name)):
        concerned = [reference for reference in references if root.name in reference.shards]
        if not concerned:
            yield root
            continue
        shards = {name for reference in concerned for name in reference.shards[root.name]}
        snapshots = {name for reference in concerned for name in reference.snapshots[root.name].values()}
        cache = CacheFolder(root)
        yield from (path for path in sorted(cache.shards_dir.glob("*.zarr")) if path.stem not in shards)
        yield from (path for path in sorted(cache.snapshots_dir.glob("*")) if path.stem not in snapshots)


def _stale_calibrations(folder: Path, references: list[Reference]) -> Iterator[Path]:
    kept = {name for reference in references for name in reference.calibrations}
    yield from (path for path in sorted(folder.glob("*")) if path.name not in kept)


def _stale_audits(experiment: Experiment, references: list[Reference]) -> Iterator[Path]:
    """Audits of other snapshots than the current ones; what a cache was compared with may be older."""
    current = {
        (fingerprint, name, digest)
        for reference in references
        for fingerprint, snapshots in reference.snapshots.items()
        for name, digest in snapshots.items()
    }
    for path in sorted(experiment.workdir.audits.glob("*")):
        audited = {
            (Path(root).name, name, digest) for root, found in audited_snapshots(path) for name, digest in found.items()
        }
        if not audited <= current:
            yield path


def _delete(path: Path) -> None:
    if path.suffix == ".zarr":
        CacheFolder(path.parent.parent).discard(path.stem)
    else:
        remove_tree(path)


def clean_text(document: Mapping[str, Any]) -> str:
    """The same for a person."""
    kept = [
        f"kept for {other['config']}"
        + (f", which is gone: delete {other['reference']} if it will not return" if other["gone"] else "")
        for other in document["kept_for"]
    ]
    if not document["stale"]:
        return "\n".join(["Nothing is stale.", *kept])
    lines = [f"{human_bytes(size):>8}  {path}" for path, size in document["stale"].items()]
    end = "deleted" if document["deleted"] else "not deleted: add --yes"
    return "\n".join([*lines, *kept, f"{len(lines)} outputs, {human_bytes(document['bytes'])}, {end}"])
