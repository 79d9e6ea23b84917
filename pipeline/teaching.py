"""The teach stage: every shard that a cache lacks, computed once by a teacher actor while other cores decode ahead."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.caches import (
    CacheState,
    cache_state,
    current_snapshots,
    feature_channels,
    forget_caches,
    hand_model_source,
    resolved_precision,
    teacher_gpus,
)
from pipeline.calibrating import calibrate, calibration_views
from pipeline.calibrations import calibration_folder, fitted_codec
from pipeline.changes import by_change, cache_changes
from pipeline.config import Role
from pipeline.events import append_event, told
from pipeline.experiment import Experiment
from pipeline.plan import Reason, StagePlan, StageResult, count_reasons
from pipeline.progress import views_progress
from pipeline.referring import refer
from pipeline.sharing import ShardClaims, only_one, writing
from pipeline.teacher_actor import TeacherSettings
from pipeline.teachers import teach_all
from pipeline.workdir import claim_of
from pipeline.workers import ray_session
from stages.preparation import ShardJob
from storage.cache import HAND_MODEL, CacheFolder
from storage.codecs import CODEC_FILE
from storage.config import is_fitted, token_bytes
from storage.encodings import grid_shape
from storage.errors import DamageError
from storage.identity import CACHE_JSON, stored_identity
from storage.inputs import bring
from storage.manifest import ShardPlan
from storage.snapshots import publish_snapshot, read_head, snapshot_stands, write_head

ROLES: tuple[Role, ...] = ("train", "evaluate")
PASSES_PER_GPU_SECOND = 1600.0
"""ViT-H on one H200 in bf16 (FACTS: about what one can eat); other sizes are scaled by their matrix products."""
VIT_H = (1280, 32)
"""Width and depth that the rate above is for."""
PICTURE_BYTES = {"jpeg": 14_000, "png": 110_000}
"""A 256x256 crop at quality 95, and lossless; measured on the real hands."""
SOURCES_NAMED = 3
"""Files that a line of `plan` names; `--json` names the file of every shard."""
OUTPUT_BYTES = 2_400
"""Outputs, moved labels and view parameters of one view."""


def plan_teach(experiment: Experiment) -> StagePlan:
    """Which shards the caches lack, and why."""
    states = [cache_state(experiment, role) for role in ROLES]
    train = states[0]
    plan = _plan_of(states, 0 if train.calibrated else calibration_views(experiment, train))
    return replace(plan, on_gpu=teacher_gpus(experiment) > 0)


def _plan_of(states: list[CacheState], calibration: int) -> StagePlan:
    """calibration: how many views are looked at first, where the encoding has still to be fitted."""
    jobs = [(state, name, plan) for state in states for name in state.datasets for plan in state.todo(name)]
    known = {(state.role, name) for state in states for name in state.datasets if _cached_before(state, name)}
    reasons = [_reason(state, plan, known=(state.role, name) in known) for state, name, plan in jobs]
    unscanned = sum(shards.unscanned for state in states for shards in state.datasets.values())
    removed = sum(_removed(state, name) for state in states for name in state.datasets)
    passes = sum(plan.n_samples * state.settings.views for state, _, plan in jobs) + calibration
    unseen: list[Reason] = ["new"] * unscanned
    counts = count_reasons([*reasons, *unseen])
    work = [_named(state, plan, reason) for (state, _, plan), reason in zip(jobs, reasons, strict=True)]
    changes = [
        change
        for state in states
        if any(_all_todo(state)) and not state.head.keys() & state.datasets.keys()
        for change in cache_changes(state.root, state.role, state.identity)
    ]
    return StagePlan(
        # A source that was never scanned counts as one shard: how many it holds is not known before.
        total=sum(len(shards.plans) for state in states for shards in state.datasets.values()) + unscanned,
        todo=len(jobs) + unscanned,
        unit="shards",
        reasons=counts | ({"removed": removed} if removed else {}),
        bytes=sum(plan.n_samples * state.settings.views * _bytes_a_view(state) for state, _, plan in jobs),
        teacher_passes=passes,
        gpu_hours=passes / _passes_per_second(states[0]) / 3600,
        why=(
            *([_calibration_line(states[0], calibration)] * (not states[0].calibrated)),
            *by_change(changes),
            *_why(work),
            *([f"new: {unscanned} source files not scanned yet"] * bool(unscanned)),
        ),
        work=tuple(work),
        changes=tuple(changes),
        units=tuple(states),
        estimated=unscanned > 0,
    )


def _named(state: CacheState, plan: ShardPlan, reason: Reason) -> dict[str, Any]:
    """Which shard it is, for a script: its entry of `work`."""
    return {
        "unit": plan.input_hash,
        "reason": reason,
        "dataset": plan.dataset,
        "role": state.role,
        "source": str(state.datasets[plan.dataset].table["source"][int(plan.rows[0])]),
        "samples": plan.n_samples,
    }


def _why(work: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each reason and data set: how many shards, and which files they come from."""
    sources: dict[str, Counter[str]] = {}
    for shard in work:
        line = f"{shard['reason']}: {shard['dataset']} ({shard['role']})"
        sources.setdefault(line, Counter())[shard["source"]] += 1
    for line, found in sources.items():
        some = ", ".join(list(found)[:SOURCES_NAMED])
        more = f" and {len(found) - SOURCES_NAMED} more files" if len(found) > SOURCES_NAMED else ""
        yield f"{line}, {found.total()} shard{'s' * (found.total() != 1)}: {some}{more}"


def _calibration_line(train: CacheState, views: int) -> str:
    encoding = train.settings.features.encoding
    return f"calibration first: the teacher looks at {views} views to fit {encoding}; until then no shard is there"


def _reason(state: CacheState, plan: ShardPlan, *, known: bool) -> Reason:
    if plan.input_hash in state.damaged | state.stored or state.folder.shard_path(plan.input_hash).exists():
        return "damaged"
    return "changed" if known else "new"


def _cached_before(state: CacheState, name: str) -> bool:
    """Whether the data set was cached, in this cache or in another."""
    return name in state.head or _other_cache_has(state, name)


def _other_cache_has(state: CacheState, name: str) -> bool:
    """Whether the data set was cached under another identity: then teacher or settings changed."""
    for path in state.root.parent.glob(f"*/{CACHE_JSON}"):
        identity = stored_identity(path.parent)
        try:
            if identity is not None and identity.get("role") == state.role and name in read_head(path.parent):
                return True
        except DamageError:
            continue
    return False


def _removed(state: CacheState, name: str) -> int:
    """1 where all that is left to do for a data set is to forget samples that are gone."""
    digest = state.digests[name]
    return int(digest is not None and current_snapshots(state).get(name) not in (None, digest))


def _bytes_a_view(state: CacheState) -> int:
    rows, columns = grid_shape(state.settings.features.grid, (16, 12))
    features = rows * columns * token_bytes(state.settings.features.encoding, feature_channels(state.identity))
    return features + PICTURE_BYTES[state.settings.pictures.codec] + OUTPUT_BYTES


def _passes_per_second(state: CacheState) -> float:
    backbone = state.identity["teacher"]["model_config"]["MODEL"]["BACKBONE"]
    width, depth = feature_channels(state.identity), int(backbone.get("DEPTH", VIT_H[1]))
    return PASSES_PER_GPU_SECOND * (VIT_H[0] ** 2 * VIT_H[1]) / (width**2 * depth)


def run_teach(experiment: Experiment, plan: StagePlan) -> StageResult:
    """Compute what the plan names, publish the snapshots, and count what every data set has."""
    started = time.monotonic()
    states: list[CacheState] = list(plan.units)
    assert not plan.estimated, "teach runs after ingest"
    if not states[0].calibrated:
        with only_one(experiment.cache_references / "calibration.lock"):
            states = _states_now(experiment)  # another run may have done it while this one waited
            if not states[0].calibrated:
                calibrate(experiment, states[0], _settings(experiment))
        states = _states_now(experiment)
    with writing(experiment.cache_references, lambda: _sweep(states)):
        for state in states:
            _make_ready(experiment, state)
        if plan.todo:
            states = _states_now(experiment)  # adopted shards are not to be done again
            refer(experiment)  # before the work: from now on another pipeline's clean keeps its shards
            _teach(experiment, states)
            states = _states_now(experiment)
        for state in states:
            with only_one(experiment.cache_references / f"{state.fingerprint}.head.lock"):
                _publish(state)
    counts = [state.counts(name) for state in states for name in state.datasets]
    samples, quarantined = sum(samples for samples, _ in counts), sum(left_out for _, left_out in counts)
    seconds = time.monotonic() - started
    return StageResult(plan.todo, plan.total - plan.todo, samples, samples - quarantined, quarantined, seconds)


def _sweep(states: list[CacheState]) -> None:
    for state in states:
        state.folder.sweep_temporary()


def _states_now(experiment: Experiment) -> list[CacheState]:
    experiment.workdir.settle()
    forget_caches(experiment)
    return [cache_state(experiment, role) for role in ROLES]


def _make_ready(experiment: Experiment, state: CacheState) -> None:
    """The cache's folder with its small files; damaged shards gone, whole ones of killed runs adopted."""
    fitted = is_fitted(state.settings.features.encoding)
    if not state.folder.intact({HAND_MODEL, CODEC_FILE} if fitted else {HAND_MODEL}):
        attachments = {HAND_MODEL: _hand_model_bytes(experiment)}
        if fitted:
            codec = fitted_codec(calibration_folder(experiment, state.identity))
            assert codec is not None, "the cache's name says that it is there"
            attachments[CODEC_FILE] = codec
        CacheFolder.create(experiment.caches_folder, state.identity, attachments)
    for input_hash in state.damaged:
        experiment.workdir.remove(state.folder.shard_path(input_hash))
    for record in state.folder.adopt(state.records.keys() - state.damaged).adopted:
        append_event(experiment.workdir.events, "shard_adopted", unit=record.input_hash, dataset=record.dataset)


def _hand_model_bytes(experiment: Experiment) -> bytes:
    """The hand model that decodes the cached poses, as the cache stores it."""
    from models.hand_model import hand_model_bytes
    from models.teacher import teacher_hand_model

    checkpoint = experiment.path(experiment.config.teacher.checkpoint)
    bring(checkpoint)
    return hand_model_bytes(teacher_hand_model(checkpoint, hand_model_source(experiment)))


def _teach(experiment: Experiment, states: list[CacheState]) -> None:
    views = sum(plan.n_samples * state.settings.views for state in states for plan in _all_todo(state))
    if not views:
        return
    config = experiment.config
    with (
        ShardClaims(experiment.cache_references) as claims,
        ray_session(config.cluster),
        views_progress("teach", views, experiment.workdir.events) as follow,
    ):
        jobs = claims.take_turns((job for state in states for job in _jobs(experiment, state)), _record_of)
        teach_all(jobs, _settings(experiment), config.teacher.workers, config.cluster, follow)


def _record_of(job: ShardJob) -> Path:
    return CacheFolder(job.cache_root).record_path(job.input_hash)


def _all_todo(state: CacheState) -> Iterator[ShardPlan]:
    return (plan for name in state.datasets for plan in state.todo(name))


def _jobs(experiment: Experiment, state: CacheState) -> Iterator[ShardJob]:
    """What is to be taught, made one at a time: all rows of a large experiment are gigabytes."""
    for name, shards in state.datasets.items():
        for plan, rows in shards.whole_rows(state.todo(name)):
            yield ShardJob(
                dataset=name,
                input_hash=plan.input_hash,
                rows=rows,
                settings=state.settings,
                cache_root=state.root,
                base=experiment.base,
                events=experiment.workdir.events,
                told=told(),
                store=experiment.workdir.store,
            )


def _settings(experiment: Experiment) -> TeacherSettings:
    teacher = experiment.config.teacher
    hand = hand_model_source(experiment)
    return TeacherSettings(
        checkpoint=experiment.path(teacher.checkpoint),
        mano_model=None if hand is None else str(hand),
        precision=resolved_precision(experiment),
        gpus=teacher_gpus(experiment),
        events=experiment.workdir.events,
        claim=claim_of(experiment.workdir),
        decode_retries=experiment.config.cluster.max_retries,
        compiled=teacher.compile,
    )


def _publish(state: CacheState) -> None:
    """Write the snapshots and point at them; what stands already stays as it is."""
    root = state.root
    head = {}
    for name, digest in state.digests.items():
        assert digest is not None, f"{name} has a shard without a record after the teacher ran"
        head[name] = digest
        if not snapshot_stands(root, digest):
            publish_snapshot(root, state.fingerprint, name, state.snapshot(name))
    before = state.head
    # Another pipeline file may have another state of a data set: HEAD.json is changed by the one that changed.
    ours_stands = state.published == head and all(name in before for name in head)
    if not ours_stands and {name: before.get(name) for name in head} != head:
        write_head(root, before | head)
