"""`handstill audit`: statistics over whole caches, by Dask in this process or on Ray, as tables and pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pipeline.caches import cache_state
from pipeline.experiment import Experiment
from pipeline.progress import StageProgress
from pipeline.tables import table
from pipeline.workers import cluster_size, errors_as_ours, ray_session
from stages.audit import (
    GROUP,
    AuditedCache,
    Compute,
    computed_by_threads,
    partition_bytes,
    partitions_at_once,
    resident_bytes,
    shard_jobs,
    tally_of,
)
from stages.audit_document import drifts, findings, statistics, with_overall
from stages.audit_pages import AGAINST, AUDIT_JSON, files_of, shown
from stages.tally import Tally
from storage.durable import canonical_json, partial_path, publish_directory, sha256_bytes
from storage.errors import InputError
from storage.identity import read_description
from storage.snapshots import read_head

AUDIT_VERSION = 1
"""Of the statistics and of the document; another gives every audit another folder."""

WORKER_BYTES = 400 << 20
"""What a worker of Ray takes before it reads anything: Python, numpy, pyarrow and Ray itself (measured 340 MB)."""

Place = Literal["local", "ray"]


def audit(experiment: Experiment, *, against: str | None = None, on: Place | None = None) -> dict[str, Any]:
    """The document of an audit (docs/format.md); computed unless it stands already.

    against: a cache folder, or the fingerprint of one beside the own ones. on: Dask's own threads or Ray; None: Ray
    where the configuration names a cluster.

    Raises:
        InputError: there is no cache yet, or none at `against`, or the memory allowed is too little.
        DamageError: bytes are not as they were written.
    """
    if experiment.workdir.store is not None:
        raise InputError(
            "audit: it reads whole caches from a folder, and the workdir is on an object store; copy the workdir to a "
            "disk (`aws s3 sync`) and name that folder in a copy of the configuration"
        )
    caches = _current_caches(experiment)
    other = None if against is None else _other_cache(experiment, against, caches)
    described = _described(experiment, caches, other)
    folder = experiment.workdir.audits / sha256_bytes(canonical_json(described))[:16]
    if not folder.is_dir():
        _make(experiment, folder, described, caches, other, on)
    document: dict[str, Any] = json.loads((folder / AUDIT_JSON).read_text(encoding="utf-8"))
    return {**document, "folder": str(folder)}


def _current_caches(experiment: Experiment) -> list[AuditedCache]:
    """The caches of the configuration, at their current snapshots of its data sets."""
    found = []
    for role in ("train", "evaluate"):
        state = cache_state(experiment, role)
        snapshots = {name: state.head[name] for name in state.datasets if name in state.head}
        if snapshots:
            found.append(AuditedCache(role, state.root, snapshots))
    if not found:
        raise InputError("audit: there is no cache yet for this configuration; run `handstill run teach`")
    return found


def _other_cache(experiment: Experiment, against: str, caches: Sequence[AuditedCache]) -> AuditedCache:
    """The cache that `--against` means."""
    places = [Path(against).expanduser(), experiment.caches_folder / against]
    root = next((place for place in places if place.is_dir()), None)
    if root is None:
        known = ", ".join(sorted(path.parent.name for path in experiment.caches_folder.glob("*/cache.json"))) or "none"
        raise InputError(f"--against: found {against!r}; want a cache folder, or one of the fingerprints: {known}")
    role = read_description(root.resolve())["identity"]["role"]
    snapshots = read_head(root.resolve())
    if not snapshots:
        raise InputError(f"--against: {root} has no finished snapshot")
    if role not in [cache.name for cache in caches]:
        raise InputError(f"--against: {root} is a cache to {role}, and the configuration has none of these to compare")
    return AuditedCache(AGAINST, root.resolve(), snapshots)


def _described(experiment: Experiment, caches: Sequence[AuditedCache], other: AuditedCache | None) -> dict[str, Any]:
    """What decides an audit's result."""
    everything = [*caches, *([other] if other else [])]
    return {
        "version": AUDIT_VERSION,
        "worst": experiment.config.audit.worst,
        "caches": {cache.name: {"path": str(cache.root), "snapshots": dict(cache.snapshots)} for cache in everything},
    }


def _make(
    experiment: Experiment,
    folder: Path,
    described: Mapping[str, Any],
    caches: Sequence[AuditedCache],
    other: AuditedCache | None,
    on: Place | None,
) -> None:
    """Compute an audit and publish its folder."""
    tallies: dict[str, tuple[Path, dict[str, Tally]]] = {}
    everything = [*caches, *([other] if other else [])]
    shards = sum(len(cache.shard_bytes) for cache in everything)
    with (
        _scheduler(experiment, everything, other, on) as (compute, at_once),
        StageProgress("audit", shards, "shards") as progress,
    ):
        for cache in everything:
            beside = other if _compared(cache, other) else None
            counted = _count(cache, beside, experiment.config.audit.worst, compute, at_once, progress.advance)
            tallies[cache.name] = (cache.root, with_overall(counted))
    document = _document(described, everything, {name: found for name, (_, found) in tallies.items()}, other)
    files = files_of(document, tallies)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(folder)
    partial.mkdir()
    for name, data in files.items():
        (partial / name).write_bytes(data)
    publish_directory(partial, folder)


def _compared(cache: AuditedCache, other: AuditedCache | None) -> bool:
    """Whether the other cache is for the same: training sets have other views than evaluation sets."""
    return other is not None and cache is not other and _role(cache) == _role(other)


def audited_snapshots(folder: Path) -> list[tuple[str, dict[str, str]]]:
    """The caches that an audit is of, by path, with their snapshots; what they were compared with is left out."""
    document = json.loads((folder / AUDIT_JSON).read_text(encoding="utf-8"))
    return [(cache["path"], cache["snapshots"]) for name, cache in document["caches"].items() if name != AGAINST]


def _role(cache: AuditedCache) -> str:
    return str(cache.identity["role"])


def _count(
    cache: AuditedCache,
    beside: AuditedCache | None,
    worst: int,
    compute: Compute,
    at_once: int,
    done: Callable[[int], None],
) -> dict[str, Tally]:
    jobs = shard_jobs(cache, worst, beside)
    if not jobs:
        raise InputError(f"audit: every sample of {cache.root} was left out; `handstill status` says why")
    return {dataset: tally_of(found, compute, at_once, done) for dataset, found in jobs.items()}


def _document(
    described: Mapping[str, Any],
    caches: Sequence[AuditedCache],
    tallies: Mapping[str, Mapping[str, Tally]],
    other: AuditedCache | None,
) -> dict[str, Any]:
    found, said = [], {}
    for cache in caches:
        compared = _compared(cache, other)
        stats = {name: statistics(tally) for name, tally in tallies[cache.name].items()}
        drifted = drifts(tallies[cache.name], tallies[AGAINST]) if compared else {}
        said[cache.name] = {
            "path": str(cache.root),
            "fingerprint": cache.root.name,
            "role": _role(cache),
            "snapshots": dict(cache.snapshots),
            "feature_bytes": sum(sizes["features"] for sizes in cache.shard_bytes.values()),
            "against": other.root.name if other is not None and compared else None,
            "datasets": stats,
            "drift": drifted,
        }
        found += findings(cache.name, stats, drifted)
    return {
        "ok": not any(finding.severity == "unfit" and finding.cache != AGAINST for finding in found),
        "settings": dict(described),
        "findings": [asdict(finding) for finding in found],
        "caches": said,
    }


@contextmanager
def _scheduler(
    experiment: Experiment, caches: Sequence[AuditedCache], other: AuditedCache | None, on: Place | None
) -> Iterator[tuple[Compute, int]]:
    """What computes graphs, and how many of them at once."""
    memory = int(experiment.config.audit.memory_gib * 2**30)
    one = max(partition_bytes(cache, None if cache is other else other) for cache in caches)
    cluster = experiment.config.cluster
    if on == "local" or (on is None and cluster.address == "local"):
        workers = partitions_at_once(memory, resident_bytes(), one, os.cpu_count() or 1)
        yield computed_by_threads(workers), 1
        return
    with ray_session(cluster):
        resources, nodes = cluster_size()
        cores = max(1, int(resources.get("CPU", 1)) // nodes)
        workers = partitions_at_once(memory, 0, WORKER_BYTES + one, cores)
        yield computed_on_ray(cores / workers), 1 + workers * nodes * 4 // GROUP


def computed_on_ray(cpus: float) -> Compute:
    """Dask's graphs as tasks of the connected Ray, each of which takes `cpus` of a node's cores."""

    def compute(graphs: Sequence[Any]) -> Sequence[Tally]:
        from dask.base import compute as computed
        from ray.util.dask import ray_dask_get

        with errors_as_ours():
            found: Sequence[Tally] = computed(  # type: ignore[no-untyped-call]
                *graphs, scheduler=ray_dask_get, ray_remote_args={"num_cpus": cpus}
            )
        return found

    return compute


def audit_text(document: Mapping[str, Any]) -> str:
    """The same for a person: the findings, a line a data set, and where the rest is."""
    rows = [
        [
            f"{name}/{dataset}",
            stats["samples"],
            stats["features"]["channels"],
            len(stats["features"]["dead"]),
            len(stats["features"]["exploding"]),
            sum(stats["not_finite"].values()),
            sum(output["beyond"] for output in stats["outputs"].values()),
            *(_said(stats["disagreement"][measure]) for measure in ("px", "pa_mm")),
        ]
        for name, cache in document["caches"].items()
        for dataset, stats in shown(cache["datasets"]).items()
    ]
    header = ["data set", "samples", "channels", "dead", "exploding", "not finite", "views beyond limits"]
    lines = [table([*header, "teacher-labels px", "PA mm"], rows), ""]
    lines += [f"{f['severity']}: {f['cache']}/{f['dataset']}: {f['text']}" for f in document["findings"]]
    lines.append("fit to train on" if document["ok"] else "not fit to train on")
    lines.append(f"tables and pictures: {document['folder']}")
    return "\n".join(lines)


def _said(disagreement: Mapping[str, Any]) -> str:
    quantiles = disagreement["quantiles"]
    return f"{quantiles['0.5']:.3g} (99%: {quantiles['0.99']:.3g})" if disagreement["samples"] else ""
