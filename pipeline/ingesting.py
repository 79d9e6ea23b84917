"""The ingest stage: every source file that is new or changed is scanned once into its manifest."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.caches import forget_caches
from pipeline.digests import Stamp, stamp
from pipeline.events import append_event
from pipeline.experiment import Experiment
from pipeline.manifests import ManifestIndex, Source, manifests_of, sources_of, tables_of
from pipeline.plan import Reason, StagePlan, StageResult, count_reasons
from pipeline.progress import StageProgress
from pipeline.references import others
from pipeline.workdir import claim_of
from pipeline.workers import Resources, ray_session, run_units
from stages.config import DatasetConfig
from stages.ingest import scan_source, shared_pictures
from storage.inputs import bring
from storage.manifest import manifest_name, write_manifest

log = logging.getLogger("handstill")

BYTES_A_ROW = 1200
"""Measured on the manifest of the 24 real hands: labels are most of it."""


@dataclass(frozen=True)
class IngestUnit:
    """One source to scan; picklable."""

    source: Source
    manifests: Path
    events: Path


@dataclass(frozen=True)
class Ingested:
    """What a worker says of a source it scanned."""

    manifest: Path
    stamps: list[Stamp]
    rows: int


def used_datasets(experiment: Experiment) -> dict[str, DatasetConfig]:
    """The data sets that some stage reads, by name."""
    return {name: config for _, name, config in experiment.datasets_by_role()}


def plan_ingest(experiment: Experiment) -> StagePlan:
    """Which source files have no manifest for what they hold now."""
    index = ManifestIndex(experiment)
    todo: list[Source] = []
    named: list[Source] = []
    for name, config in used_datasets(experiment).items():
        for source, manifest in manifests_of(experiment, name, config, index):
            named.append(source)
            if manifest is None:
                todo.append(source)
    reasons: list[Reason] = ["changed" if index.knew(source) else "new" for source in todo]
    gone = _forgotten(experiment, index)
    why = [f"{reason}: {source.path}" for reason, source in zip(reasons, todo, strict=True)]
    return StagePlan(
        total=len(named),
        todo=len(todo),
        unit="source files",
        reasons=count_reasons(reasons) | ({"removed": len(gone)} if gone else {}),
        bytes=BYTES_A_ROW * len(todo),
        work=tuple({"unit": str(source.path), "reason": reason} for reason, source in zip(reasons, todo, strict=True)),
        why=(*why, *(f"removed: {place.split('|', 1)[1]}" for place in gone)),
        units=tuple(todo),
    )


def _forgotten(experiment: Experiment, index: ManifestIndex) -> list[str]:
    """Places of source files that neither this nor another pipeline file of the workdir names any more."""
    if experiment.limit is not None:
        return []
    named = [
        source for name, config in used_datasets(experiment).items() for source in sources_of(experiment, name, config)
    ]
    elsewhere = others(experiment, experiment.workdir.references).values()
    return index.forgotten(named, {place for reference in elsewhere for place in reference.sources})


def ingest_unit(unit: IngestUnit) -> Ingested:
    """Scan one source and write its manifest under the name of its content (runs in a worker)."""
    source = unit.source
    append_event(unit.events, "ingest_started", unit=str(source.path))
    for path in source.inputs():
        bring(path, fresh=True)
    stamps = [stamp(path) for path in source.inputs()]  # before reading: a file that changes meanwhile is scanned again
    table = scan_source(source.dataset, source.config, source.path, source.base)
    path = unit.manifests / source.dataset / manifest_name(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(path, table)
    append_event(unit.events, "ingest_done", unit=str(source.path), rows=len(table), bytes=path.stat().st_size)
    return Ingested(path, stamps, len(table))


def run_ingest(experiment: Experiment, plan: StagePlan) -> StageResult:
    """Scan what the plan names, then count what the manifests hold."""
    started = time.monotonic()
    done = 0
    while plan.todo:  # a smoke run learns only from one source's manifest whether it needs the next
        done += plan.todo
        _scan(experiment, plan)
        forget_caches(experiment)
        plan = plan_ingest(experiment)
    index = ManifestIndex(experiment)
    tables = ingested(experiment, index)
    if forgotten := _forgotten(experiment, index):
        index.forget(forgotten)
        index.save()
    _warn_of_shared_pictures(experiment, tables)
    samples = sum(len(table) for group in tables.values() for table in group)
    bad = sum(quarantined(table) for group in tables.values() for table in group)
    return StageResult(done, plan.total - done, samples, samples - bad, bad, time.monotonic() - started)


def ingested(experiment: Experiment, index: ManifestIndex) -> dict[str, list[pa.Table]]:
    """What every data set's manifests say (PLAN_COLUMNS), a hand whose id came before marked as left out."""
    return {
        name: tables_of(
            tuple(manifest for _, manifest in manifests_of(experiment, name, config, index) if manifest is not None)
        )
        for name, config in used_datasets(experiment).items()
    }


def _scan(experiment: Experiment, plan: StagePlan) -> None:
    workdir = experiment.workdir
    units = [IngestUnit(source, workdir.manifests, workdir.events) for source in plan.units]
    index = ManifestIndex(experiment)
    with (
        ray_session(experiment.config.cluster),
        StageProgress("ingest", len(units), "files", events=experiment.workdir.events) as progress,
    ):
        results = run_units(
            ingest_unit,
            units,
            cluster=experiment.config.cluster,
            claim=claim_of(experiment.workdir),
            resources=Resources(),
            while_waiting=lambda: progress.advance(0),
        )
        for unit, result in results:
            index.remember(unit.source, result.stamps, result.manifest)
            index.save()
            progress.advance()


def quarantined(table: pa.Table) -> int:
    """How many rows of a manifest carry a reason why they cannot be used."""
    return int(pc.sum(pc.is_valid(table.column("reason"))).as_py() or 0)


def reasons_to_leave_out(tables: Iterable[pa.Table]) -> dict[str, int]:
    """Kinds of reasons, the most frequent first, each with its number of rows: `filtered: min_keypoints` 2."""
    kinds: Counter[str] = Counter()
    for table in tables:
        for reason in table.column("reason").drop_null().to_pylist():
            first, _, rest = reason.partition(": ")
            kinds[f"{first}: {rest.partition(':')[0]}" if first == "filtered" else first] += 1
    return dict(kinds.most_common())


def _warn_of_shared_pictures(experiment: Experiment, tables: Mapping[str, Iterable[pa.Table]]) -> None:
    train, evaluate = (
        [table for name in experiment.config.datasets_of(role) for table in tables[name]]
        for role in ("train", "evaluate")
    )
    pairs = shared_pictures(train, evaluate)
    if pairs:
        append_event(experiment.workdir.events, "warning", what="shared pictures", count=len(pairs))
        log.warning(
            "%d pictures stand in a training set and in an evaluation set, for example %s and %s: "
            "scores on them say little about new pictures.",
            len(pairs),
            *pairs[0],
        )
