"""`handstill clean --stale`: outputs that no plan refers to any more, whichever pipeline file's plan it is."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.auditing import audited_snapshots
from pipeline.caches import cache_state
from pipeline.calibrations import CALIBRATIONS
from pipeline.config import KeepConfig
from pipeline.evaluating import evaluation_states
from pipeline.events import append_event
from pipeline.experiment import Experiment
from pipeline.references import Reference, others
from pipeline.referring import current_reference
from pipeline.retention import (
    Stale,
    cut_events,
    kept,
    old_event_bytes,
    old_summaries,
    stale_cache,
    stale_output,
)
from pipeline.sharing import alone
from pipeline.store_lease import is_held
from pipeline.tables import bytes_below, human_bytes
from pipeline.teaching import ROLES
from pipeline.workdir import lease
from storage.cache import CacheFolder
from storage.errors import InputError
from storage.mirror import Mirror

_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


def clean(experiment: Experiment, *, delete: bool) -> dict[str, Any]:
    """List what is stale, and delete it if asked to. What another pipeline file refers to is kept.

    Raises:
        InputError: the caches are not up to date, so what is stale is not known; or a pin names nothing.
        BusyError: a run is at work on the workdir, or on the caches that it shares.
    """
    if not delete:
        return _document(experiment, _own_reference(experiment), deleted=False)
    with lease(experiment.workdir):
        document = clean_up(experiment)
        cut_events(experiment.workdir.events, experiment.config.retention.events, time.time())
    return document


def clean_up(experiment: Experiment) -> dict[str, Any]:
    """The same for whoever has the workdir and uses no cache: delete what is stale and not kept. Not the event log."""
    own = _own_reference(experiment)
    with alone(experiment.cache_references, "clean"):
        document = _document(experiment, own, deleted=True)  # now that nobody begins to refer to more
        for path in map(Path, document["stale"]):
            if path != experiment.workdir.events:
                experiment.workdir.remove(path)
    append_event(experiment.workdir.events, "cleaned", outputs=len(document["stale"]), freed=document["bytes"])
    return document


def _own_reference(experiment: Experiment) -> Reference:
    states = [cache_state(experiment, role) for role in ROLES]
    unfinished = [name for state in states for name in state.datasets if not state.complete(name)]
    if unfinished:
        raise InputError(
            f"clean: {', '.join(sorted(set(unfinished)))} is not cached yet, so what can go is not known; "
            "run `handstill run` first"
        )
    return current_reference(experiment)


def _document(experiment: Experiment, own: Reference, *, deleted: bool) -> dict[str, Any]:
    beside, sharing = (
        others(experiment, folder) for folder in (experiment.workdir.references, experiment.cache_references)
    )
    retention = experiment.config.retention
    stale = [
        *_stale_outputs(experiment, [own, *beside.values()]),
        *_stale_audits(experiment, [own, *beside.values()]),
        *_stale_calibrations(experiment, [own, *sharing.values()]),
        *_stale_in_caches(experiment, [own, *sharing.values()]),
    ]
    keeping = kept(experiment, stale, remember=deleted)
    going = [item.path for item in stale if item.path not in keeping]
    store = experiment.workdir.store
    if store is None:
        sizes = {str(path): bytes_below(path) for path in going}
    else:
        going += [path for path in _orphans(store, under_lease=deleted) if path not in going and path not in keeping]
        sizes = {str(path): store.bytes_below(path) for path in going}
    sizes |= _old_records(experiment, retention.events)
    kept_for = [
        {"config": reference.config, "gone": reference.gone, "reference": str(path)}
        for path, reference in (beside | sharing).items()
    ]
    return {
        "stale": sizes,
        "bytes": sum(sizes.values()),
        "deleted": deleted,
        "kept": {str(path): why for path, why in keeping.items()},
        "kept_for": kept_for,
    }


def _old_records(experiment: Experiment, policy: KeepConfig) -> dict[str, int]:
    """Summaries, and the part of the event log, that `retention.events` does not keep, with their bytes."""
    workdir, now_s = experiment.workdir, time.time()
    found = {str(path): path.stat().st_size for path in old_summaries(workdir.summaries, policy, now_s)}
    events = old_event_bytes(workdir.events, policy, now_s)
    return found | ({str(workdir.events): events} if events else {})


def _stale_outputs(experiment: Experiment, references: list[Reference]) -> Iterator[Stale]:
    """Manifests, students and evaluations."""
    workdir, retention = experiment.workdir, experiment.config.retention
    staying = {workdir.root / path for reference in references for path in reference.outputs}
    manifests = workdir.manifests.glob("*/*.parquet")
    yield from (Stale(path, retention.caches) for path in sorted(manifests) if path not in staying)
    found = list(workdir.students.glob("*/*/*"))
    if all(state.identity is not None for state in evaluation_states(experiment)):
        found += workdir.evaluations.glob("*/*")  # else which scores are stale is not known: a student is not trained
    yield from (stale_output(path, retention) for path in sorted(found) if path not in staying)


def _stale_in_caches(experiment: Experiment, references: list[Reference]) -> Iterator[Stale]:
    """Whole caches, and shards and snapshots of data that are gone or changed; a ledger record goes with its shard."""
    retention, folder = experiment.config.retention, experiment.caches_folder
    for root in sorted(path for path in folder.glob("*") if _FINGERPRINT.fullmatch(path.name)):
        concerned = [reference for reference in references if root.name in reference.shards]
        if not concerned:
            yield stale_cache(root, retention)
            continue
        shards = {name for reference in concerned for name in reference.shards[root.name]}
        snapshots = {name for reference in concerned for name in reference.snapshots[root.name].values()}
        cache = CacheFolder(root)
        parts = [path for path in _shards(experiment, cache) if path.stem not in shards]
        parts += [path for path in sorted(cache.snapshots_dir.glob("*")) if path.stem not in snapshots]
        yield from (Stale(path, retention.caches) for path in parts)


def _shards(experiment: Experiment, cache: CacheFolder) -> list[Path]:
    """Every shard that a cache has, on the disk or on the store."""
    if experiment.workdir.store is None:
        return sorted(cache.shards_dir.glob("*.zarr"))
    return [cache.shard_path(name) for name in sorted(experiment.workdir.store.shards(cache.fingerprint))]


def _orphans(store: Mirror, *, under_lease: bool) -> list[Path]:
    """What killed writers left on a store. Of a run at work the same is no orphan: then none."""
    return [store.root / name for name in store.orphans()] if under_lease or not is_held(store) else []


def _stale_calibrations(experiment: Experiment, references: list[Reference]) -> Iterator[Stale]:
    needed = {name for reference in references for name in reference.calibrations}
    found = sorted((experiment.caches_folder / CALIBRATIONS).glob("*"))
    yield from (Stale(path, experiment.config.retention.caches) for path in found if path.name not in needed)


def _stale_audits(experiment: Experiment, references: list[Reference]) -> Iterator[Stale]:
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
            yield Stale(path, experiment.config.retention.caches)


def clean_text(document: Mapping[str, Any]) -> str:
    """The same for a person."""
    kept_for = [
        f"kept for {other['config']}"
        + (f", which is gone: delete {other['reference']} if it will not return" if other["gone"] else "")
        for other in document["kept_for"]
    ]
    staying = [f"    kept  {path}: {why}" for path, why in document["kept"].items()]
    if not document["stale"]:
        return "\n".join(["Nothing is stale." if not staying else "Nothing is to go.", *staying, *kept_for])
    lines = [f"{human_bytes(size):>8}  {path}" for path, size in document["stale"].items()]
    end = "deleted" if document["deleted"] else "not deleted: add --yes"
    return "\n".join([*lines, *staying, *kept_for, f"{len(lines)} outputs, {human_bytes(document['bytes'])}, {end}"])
