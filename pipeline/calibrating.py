"""The calibration pass: the teacher looks at some training samples, and a codec is fitted to what it saw.

It runs before the first shard of a fitted encoding, with the same actors and the same decoding. What the teacher saw
stays in memory; only the codec is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.caches import CacheState, DatasetShards
from pipeline.calibrations import calibration_folder, calibration_key, codec_of_a_cache, publish_calibration
from pipeline.events import append_event, told
from pipeline.experiment import Experiment
from pipeline.progress import views_progress
from pipeline.teacher_actor import TeacherSettings
from pipeline.teachers import teach_all
from pipeline.workers import ray_session
from stages.calibrate import JobTokens, fit, job_tokens, tokens_a_view
from stages.preparation import ShardJob
from storage.codecs import codec_bytes
from storage.encodings import grid_shape
from storage.errors import InputError
from storage.manifest import ShardPlan

JOB_SAMPLES = 64
"""Samples a job: some 30 MB of tokens come back from each at three views of 32 tokens of 1280 channels."""


def calibration_views(experiment: Experiment, train: CacheState) -> int:
    """How many views the calibration pass looks at: all those of each chosen sample."""
    samples = sum(plan.n_samples for shards in train.datasets.values() for plan in shards.plans)
    wanted = -(-experiment.config.cache.calibration.views // train.settings.views)
    return min(wanted, samples) * train.settings.views


def calibrate(experiment: Experiment, train: CacheState, settings: TeacherSettings) -> None:
    """Fit the codec of the training cache's encoding and publish it. Killed at any time, nothing is there.

    Raises:
        InputError: there is no training sample to look at, or the teacher has too few channels.
    """
    folder = calibration_folder(experiment, train.identity)
    about: dict[str, Any] = {"key": calibration_key(train.identity)}
    data = codec_of_a_cache(experiment, train.identity)
    if data is None:
        data, seen = _fitted(experiment, train, settings)
        about |= seen
    publish_calibration(folder, data, about)
    append_event(experiment.workdir.events, "calibrated", unit=folder.name, bytes=len(data))


def _fitted(experiment: Experiment, train: CacheState, settings: TeacherSettings) -> tuple[bytes, Mapping[str, Any]]:
    """The codec's content, and what it was fitted on."""
    views = calibration_views(experiment, train)
    if not views:
        raise InputError(
            f"cache.features.encoding: {train.settings.features.encoding} is fitted to training samples, and none of "
            f"{', '.join(train.datasets) or 'train.on'} can be used; `handstill status` counts what was left out"
        )
    rows, columns = grid_shape(train.settings.features.grid, (16, 12))
    look = partial(job_tokens, kept=tokens_a_view(views, rows * columns))
    found: dict[str, JobTokens] = {}

    def keep(job: ShardJob, seen: JobTokens) -> None:
        found[job.input_hash] = seen

    jobs = list(_jobs(experiment, train, views // train.settings.views))
    config = experiment.config
    with ray_session(config.cluster), views_progress("calibrate", views, experiment.workdir.events) as follow:
        teach_all(jobs, settings, config.teacher.workers, config.cluster, follow, look, keep)
    seen = [found.pop(job.input_hash) for job in jobs]
    tokens_mtC = np.concatenate([part.tokens for part in seen if len(part.tokens)] or [seen[0].tokens])
    codec = fit(tokens_mtC, train.settings.features.encoding, config.cache.calibration.seed)
    facts = {"views": len(tokens_mtC), "tokens": tokens_mtC.shape[0] * tokens_mtC.shape[1], "error": codec.error}
    return codec_bytes(codec), {**facts, "datasets": list(train.datasets), "provenance": dict(seen[0].provenance)}


def _jobs(experiment: Experiment, train: CacheState, samples: int) -> Iterator[ShardJob]:
    """The chosen samples of each data set, whatever sources they are in, in jobs of JOB_SAMPLES."""
    for (name, shards), rows in zip(train.datasets.items(), _chosen(experiment, train, samples), strict=True):
        parts = [table for _, table in shards.whole_rows(_by_manifest(shards, name, rows))]
        whole = pa.concat_tables(parts) if parts else pa.table({})
        for start in range(0, len(whole), JOB_SAMPLES):
            table = whole.slice(start, JOB_SAMPLES).combine_chunks()
            ids = "\n".join(table["sample_id"].to_pylist())
            yield ShardJob(
                dataset=name,
                input_hash=hashlib.sha256(ids.encode()).hexdigest(),
                rows=table,
                settings=train.settings,
                cache_root=train.root,
                base=experiment.base,
                events=experiment.workdir.events,
                told=told(),
            )


def _chosen(experiment: Experiment, train: CacheState, samples: int) -> list[NDArray[np.int64]]:
    """Rows of each data set's table, ascending: the samples with the smallest hashes of seed and id among all."""
    salt = f"{experiment.config.cache.calibration.seed}\n".encode()
    usable = [
        np.concatenate([plan.rows for plan in shards.plans] or [np.zeros(0, np.int64)])
        for shards in train.datasets.values()
    ]
    hashes = [
        np.array([_hash64(salt, name) for name in shards.table["sample_id"].take(rows).to_pylist()], np.uint64)
        if len(rows)
        else np.zeros(0, np.uint64)
        for shards, rows in zip(train.datasets.values(), usable, strict=True)
    ]
    limit = np.sort(np.concatenate(hashes))[samples - 1]
    return [np.sort(rows[found <= limit]) for rows, found in zip(usable, hashes, strict=True)]


def _hash64(salt: bytes, sample_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(salt + sample_id.encode(), digest_size=8).digest(), "little")


def _by_manifest(shards: DatasetShards, name: str, rows: NDArray[np.int64]) -> Iterator[ShardPlan]:
    """The rows as plans that lie within one manifest each."""
    places = np.searchsorted(shards.first_rows, rows, side="right")
    for place in np.unique(places):
        yield ShardPlan(name, "train", "", rows[places == place])
