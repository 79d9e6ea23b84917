"""`handstill verify`: every byte of the caches against its record, and the teacher again on a sample of rows."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.caches import CacheState, hand_model_source, resolved_precision, stored_state, teacher_gpus
from pipeline.calibrations import calibration_damage
from pipeline.digests import DigestMemory
from pipeline.experiment import Experiment
from pipeline.manifests import ManifestIndex, Source, changed_files, named_sources
from pipeline.progress import StageProgress
from pipeline.replaying import REMEDY, Replays, replay
from pipeline.sharing import alone
from pipeline.tables import human_bytes
from pipeline.teaching import ROLES
from pipeline.workdir import lease
from storage.config import encoding_parts
from storage.errors import DamageError, InputError
from storage.inputs import bring
from storage.ledger import ShardRecord
from storage.mirror import Mirror
from storage.reading import CacheReader, open_cache
from storage.snapshots import read_head
from storage.verification import Damage, verify_folder, verify_joins, verify_shard

TOLERANCE = 2e-2
"""Largest relative error (norms) of a row that another device or torch version may explain: a few units in the last
place of int8, which a row's worst token can reach. A swapped row or another teacher is off by 0.1 or more."""
TOLERANCE_FLOAT16 = 2e-3
"""The same of features in float16, which are stored ten times finer."""
TOLERANCE_BF16 = 5e-2
"""The same of everything where the teacher computed in bf16."""
MIN_ROWS, SHARE = 32, 0.001


def verify(experiment: Experiment, *, with_teacher: bool = True, with_sources: bool = True) -> dict[str, Any]:
    """Read everything again (DESIGN section 7). Damaged shards lose their record, so that the next run repairs them.

    Sources that are gone or have changed are told apart from damage: a cache needs none.

    Raises:
        InputError: there is no cache yet.
        WorkError: a run is at work on the workdir, or on the caches that it shares.
    """
    stored = [stored_state(experiment, role) for role in ROLES]
    states = [state for state in stored if state.root.is_dir()]
    uncalibrated = (damage for state in stored for damage in calibration_damage(experiment, state.identity))
    damaged = list(dict.fromkeys(str(damage) for damage in uncalibrated))  # the roles share it
    if not states and not damaged:
        raise InputError("verify: there is no cache yet for this configuration; run `handstill run teach`")
    store = experiment.workdir.store
    worst, rechecked, replays = 0.0, 0, Replays()
    started = time.monotonic()
    with lease(experiment.workdir), alone(experiment.cache_references, "verify"):
        for state in states:
            damaged += [str(damage) for damage in (*verify_folder(state.folder), *_verify_shards(state, store))]
        seconds = time.monotonic() - started
        if with_teacher and not damaged:
            rechecked, worst, wrong = _recheck(experiment, states)
            damaged += wrong
        if with_sources:
            _look_at_sources(experiment, replays)
            if not damaged or rechecked:  # not through shards that cannot be read
                _replay(experiment, states, replays)
                damaged += replays.wrong
    return {
        "ok": not damaged,
        "shards": sum(len(state.records) for state in states),
        "bytes": sum(record.bytes for state in states for record in state.records.values()),
        "seconds": round(seconds, 3),
        "damaged": damaged,
        "rows_rechecked": rechecked,
        "max_rel_error": worst,
        "rows_replayed": replays.rows,
        "pictures_replayed": replays.pictures,
        "pictures_identical": replays.identical,
        "max_pixel_difference": replays.max_pixel_difference,
        "max_label_difference": replays.max_label_difference,
        "sources_missing": len(replays.missing),
        "sources_changed": sorted(replays.changed),
    }


def _verify_shards(state: CacheState, store: Mirror | None) -> list[Damage]:
    found: list[Damage] = []
    bad: set[str] = set()
    with ThreadPoolExecutor(os.cpu_count()) as pool, StageProgress("verify", len(state.records), "shards") as progress:

        def look(record: ShardRecord) -> tuple[ShardRecord, list[Damage]]:
            if store is None:
                return record, verify_shard(state.folder, record)
            try:
                store.fetch_shard(state.root, record)
                return record, verify_shard(state.folder, record)
            finally:  # one shard a thread is here at a time
                shutil.rmtree(state.folder.shard_path(record.input_hash), ignore_errors=True)

        for record, damages in pool.map(look, state.records.values()):
            progress.advance()
            found += damages
            if damages:
                bad.add(record.input_hash)
    if store is None:  # whether ids are the snapshots' own: over a network that would be a second reading of all
        found += verify_joins(state.folder, bad)
    for input_hash in bad:
        here = [damage for damage in found if input_hash in str(damage.path)]
        why = [f"{damage.path.relative_to(state.root)}: {damage.what}" for damage in here]
        if store is None:
            state.folder.withdraw(input_hash, why)
        else:
            store.remove(state.folder.record_path(input_hash))
    return found


def _look_at_sources(experiment: Experiment, replays: Replays) -> None:
    """Read every source file and hold it against its last scan."""
    index = ManifestIndex(experiment)
    named = {
        source.key: source
        for _, name, config in experiment.datasets_by_role()
        for source in named_sources(experiment, name, config)
    }
    digests = DigestMemory(experiment.workdir.state / "digests.json", rehash=True)

    def look(source: Source) -> list[str]:
        manifest = index.remembered(source)
        if not source.path.is_file():
            return [str(source.path)]
        try:
            return [] if manifest is None else changed_files(source, manifest, digests)
        except DamageError:
            return []  # the manifest's: told where its rows are wanted

    with ThreadPoolExecutor(os.cpu_count()) as pool, StageProgress("verify", len(named), "source files") as progress:
        for files in pool.map(look, named.values()):
            progress.advance()
            gone = {name for name in files if not Path(name).is_file()}
            replays.missing |= gone
            replays.changed |= set(files) - gone


def _replay(experiment: Experiment, states: list[CacheState], replays: Replays) -> None:
    for state, reader in _readers(states):
        chosen = _choose(reader, state.fingerprint)
        with StageProgress("made again", len(chosen), "rows") as progress:
            for outcome in replay(experiment, state, reader, chosen, progress.advance):
                replays.add(outcome)


def _recheck(experiment: Experiment, states: list[CacheState]) -> tuple[int, float, list[str]]:
    """Run the teacher again on stored pictures: (rows, worst relative error, what is beyond tolerance)."""
    from models.teacher import load_teacher
    from stages.teach import recheck_rows, teacher_forward

    device = "cuda" if teacher_gpus(experiment) else "cpu"
    checkpoint = experiment.path(experiment.config.teacher.checkpoint)
    bring(checkpoint)
    precision = resolved_precision(experiment)
    forward = teacher_forward(load_teacher(checkpoint, hand_model_source(experiment), device, precision), device)
    rows, worst, wrong = 0, 0.0, []
    for state, reader in _readers(states):
        chosen = _choose(reader, state.fingerprint)
        usual = TOLERANCE_BF16 if precision == "bf16" else TOLERANCE
        allowed = {"features": features_tolerance(state.settings.features.encoding, precision, reader.codec.error)}
        with StageProgress("teacher again", len(chosen), "rows") as progress:
            for check in recheck_rows(reader, chosen, forward):
                progress.advance()
                rows, worst = rows + 1, max(worst, check.max_rel_error)
                beyond = {name: error for name, error in check.errors.items() if error > allowed.get(name, usual)}
                if beyond:
                    name = max(beyond, key=lambda name: beyond[name])
                    shard = reader.shard_path(reader.position(check.sample_id))
                    wrong.append(
                        f"{shard}: {check.sample_id} view {check.view}: the teacher's {name} of today is "
                        f"{beyond[name]:.3g} away from the stored one, {allowed.get(name, usual):.2g} is allowed. "
                        + REMEDY
                    )
    return rows, worst, wrong


def _readers(states: list[CacheState]) -> Iterator[tuple[CacheState, CacheReader]]:
    """The caches that some run has finished; of the others only the shards can be looked at."""
    return ((state, open_cache(state.address)) for state in states if read_head(state.root))


def features_tolerance(encoding: str, precision: str, codec_error: float) -> float:
    """How far features that are stored today may be from those that were stored, as `TOLERANCE` says it.

    Codes are all or nothing: where two are equally near, the last bit decides, and what follows is another sum that is
    as near to the token. A row of them moves by less than the codec's error if the answer moves as little as the
    tolerance of int8 allows (measured: docs/decisions/007), a swapped row by 0.4 and more.
    """
    kind, _ = encoding_parts(encoding)
    exact = TOLERANCE_FLOAT16 if kind == "float16" else TOLERANCE
    return (TOLERANCE_BF16 if precision == "bf16" else exact) + (codec_error if kind == "codes" else 0.0)


def _choose(reader: CacheReader, seed: str) -> list[int]:
    """Rows to run again: one of every shard, and at least max(32, 0.1%) in all, or all if there are fewer.

    The same rows every time for the same cache.
    """
    order = np.random.default_rng(int(seed, 16)).permutation(len(reader))
    first = np.unique(reader.shards[order], return_index=True)[1]
    wanted = max(MIN_ROWS, round(len(reader) * SHARE)) - len(first)
    others = np.delete(order, first)[: max(wanted, 0)]
    return sorted(int(row) for row in (*order[first], *others))


def verify_text(document: Mapping[str, Any]) -> str:
    """The same for a person."""
    gigabytes, seconds = document["bytes"] / 1e9, document["seconds"]
    lines = [
        f"{document['shards']} shard{'s' * (document['shards'] != 1)}, {human_bytes(document['bytes'])} read in "
        f"{seconds:.1f} s "
        f"({seconds / max(gigabytes, 1e-9):.1f} s a GB), {len(document['damaged'])} things damaged"
    ]
    lines += [f"  {line}" for line in document["damaged"]]
    if document["rows_rechecked"]:
        lines.append(
            f"the teacher again on {document['rows_rechecked']} rows: largest relative error "
            f"{document['max_rel_error']:.2e}"
        )
    lines += _about_sources(document)
    if document["damaged"]:
        lines.append("`handstill run` repairs what is damaged and only that.")
    return "\n".join(lines)


def _about_sources(document: Mapping[str, Any]) -> list[str]:
    lines = []
    if document["rows_replayed"]:
        lines.append(
            f"{document['pictures_replayed']} pictures of {document['rows_replayed']} rows made again from their "
            f"sources: {document['pictures_identical']} the same to the bit, pixels within "
            f"{document['max_pixel_difference']} levels of 255, labels within {document['max_label_difference']:.2g}"
        )
    if document["sources_missing"]:
        lines.append(f"{document['sources_missing']} source files are not there, which the cache does not need")
    if document["sources_changed"]:
        lines.append("source files that changed since they were ingested (`handstill run` ingests them again):")
        lines += [f"  {name}" for name in document["sources_changed"]]
    return lines
