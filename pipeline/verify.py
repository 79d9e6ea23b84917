"""`handstill verify`: every byte of the caches against its record, and the teacher again on a sample of rows."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

from pipeline.caches import CacheState, cache_state, hand_model_source, resolved_precision, teacher_gpus
from pipeline.experiment import Experiment
from pipeline.progress import StageProgress
from pipeline.workdir import lease
from storage.errors import InputError
from storage.ledger import ShardRecord
from storage.reading import open_cache
from storage.verification import Damage, verify_folder, verify_shard

TOLERANCE = {"float16": 2e-3, "int8": 2e-2}
"""Largest relative error (norms) of a row that another device or torch version may explain: a few units in the last
place of the encoding, which a row's worst token can reach. A swapped row or another teacher is off by 0.1 or more."""
TOLERANCE_BF16 = 5e-2
"""The same where the teacher computed in bf16."""
MIN_ROWS, SHARE = 32, 0.001


def verify(experiment: Experiment, *, with_teacher: bool = True) -> dict[str, Any]:
    """Read everything again (DESIGN section 7). Damaged shards lose their record, so that the next run repairs them.

    Raises:
        InputError: there is no cache yet.
    """
    states = [state for role in ("train", "evaluate") if (state := cache_state(experiment, role)).root.is_dir()]
    if not states:
        raise InputError("verify: there is no cache yet for this configuration; run `handstill run teach`")
    damaged: list[str] = []
    shards = rows = 0
    worst = 0.0
    with lease(experiment.workdir):
        for state in states:
            damages = [*verify_folder(state.folder), *_verify_shards(state)]
            damaged += [str(damage) for damage in damages]
            shards += len(state.records)
        if with_teacher and not damaged:
            rows, worst, wrong = _recheck(experiment, states)
            damaged += wrong
    return {
        "ok": not damaged,
        "shards": shards,
        "damaged": damaged,
        "rows_rechecked": rows,
        "max_rel_error": worst,
    }


def _verify_shards(state: CacheState) -> list[Damage]:
    found: list[Damage] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool, StageProgress("verify", len(state.records), "shards") as progress:

        def look(record: ShardRecord) -> tuple[ShardRecord, list[Damage]]:
            return record, verify_shard(state.folder, record)

        for record, damages in pool.map(look, state.records.values()):
            progress.advance()
            found += damages
            if damages:
                state.folder.withdraw(record.input_hash)
    return found


def _recheck(experiment: Experiment, states: list[CacheState]) -> tuple[int, float, list[str]]:
    """Run the teacher again on stored pictures: (rows, worst relative error, what is beyond tolerance)."""
    from models.teacher import load_teacher
    from stages.teach import recheck_rows, teacher_forward

    device = "cuda" if teacher_gpus(experiment) else "cpu"
    checkpoint = experiment.path(experiment.config.teacher.checkpoint)
    precision = resolved_precision(experiment)
    forward = teacher_forward(load_teacher(checkpoint, hand_model_source(experiment), device, precision), device)
    rows, worst, wrong = 0, 0.0, []
    for state in states:
        reader = open_cache(state.root)
        chosen = _choose(len(reader), state.fingerprint)
        tolerance = TOLERANCE_BF16 if precision == "bf16" else TOLERANCE[state.settings.features.encoding]
        with StageProgress("verify", len(chosen), "rows") if chosen else nullcontext():
            for check in recheck_rows(reader, chosen, forward):
                rows, worst = rows + 1, max(worst, check.max_rel_error)
                if check.max_rel_error > tolerance:
                    wrong.append(
                        f"{state.root}: {check.sample_id} view {check.view}: the teacher's {check.worst} of today is "
                        f"{check.max_rel_error:.3g} away from the stored one, {tolerance:g} is allowed"
                    )
    return rows, worst, wrong


def _choose(count: int, seed: str) -> list[int]:
    """Rows to run again: at least max(32, 0.1%), all if fewer; the same rows every time for the same cache."""
    wanted = min(count, max(MIN_ROWS, round(count * SHARE)))
    return sorted(random.Random(seed).sample(range(count), wanted))


def verify_text(document: Mapping[str, Any]) -> str:
    """The same for a person."""
    lines = [f"{document['shards']} shards read, {len(document['damaged'])} things damaged"]
    lines += [f"  {line}" for line in document["damaged"]]
    if document["rows_rechecked"]:
        lines.append(
            f"the teacher again on {document['rows_rechecked']} rows: largest relative error "
            f"{document['max_rel_error']:.2e}"
        )
    if document["damaged"]:
        lines.append("`handstill run` repairs what is damaged and only that.")
    return "\n".join(lines)
