"""Teach: run the teacher once over a shard's views and store what it saw and said.

A plain function over one shard: `teach_shard(job, prepared_batches(job), forward, provenance)`. The forward pass is
handed in, so that this module neither loads a teacher nor knows where it runs. Shapes: B the fixed batch size, m <= B
views in a batch, C channels.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.crops import PREPROCESSING_VERSION
from stages.preparation import PreparedBatch, PreparedView, ShardJob, TeachSettings, prepared_batches
from storage import layout
from storage.cache import CacheFolder
from storage.durable import partial_path, publish_directory, remove_tree
from storage.encodings import (
    JPEG_SUBSAMPLING,
    PICTURE_SIZE_PX,
    decode_features,
    encode_features,
    representable,
    to_grid,
)
from storage.errors import DamageError
from storage.ledger import Quarantined, ShardRecord, write_record
from storage.reading import PICTURES, CacheReader
from storage.shards import ShardHeader, ShardWriter
from storage.verification import quick_check

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Forward",
    "PreparedBatch",
    "Recheck",
    "ShardJob",
    "TeachSettings",
    "numerics",
    "prepared_batches",
    "recheck_rows",
    "teach_identity",
    "teach_shard",
    "teacher_forward",
]

TEACH_VERSION = 1
"""Of this algorithm; raised when the stored answers change for reasons that the rest of the identity does not show."""

OUTPUTS = ("global_orient", "hand_pose", "betas", "cam", "keypoints_2d", "keypoints_3d")
"""What is stored of the teacher's answers, besides its features."""

Forward = Callable[[NDArray[np.uint8]], Mapping[str, NDArray[Any]]]
"""Pictures (B,256,256,3) uint8 RGB -> `features` (B,C,16,12) and OUTPUTS, float32 arrays of B entries."""


def teach_identity(
    settings: TeachSettings,
    *,
    checkpoint_sha256: str,
    model_config: Mapping[str, Any],
    hand_model_sha256: str,
    precision: str,
    strict_numerics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that decides a cache's answers; its fingerprint names the cache (storage/identity.py).

    model_config: the keys of model_config.yaml that shape the network. precision: fp32 or bf16, never `auto`.
    strict_numerics: the provenance, when the user wants it to count.
    """
    assert precision in ("fp32", "bf16"), precision
    pictures: dict[str, Any] = {"codec": settings.pictures.codec}
    if settings.pictures.codec == "jpeg":
        pictures |= {"quality": settings.pictures.quality, "subsampling": JPEG_SUBSAMPLING}
    identity: dict[str, Any] = {
        "format_version": layout.FORMAT_VERSION,
        "algorithm_version": TEACH_VERSION,
        "preprocessing_version": PREPROCESSING_VERSION,
        "role": settings.role,
        "teacher": {
            "checkpoint_sha256": checkpoint_sha256,
            "model_config": dict(model_config),
            "precision": precision,
            "batch_size": settings.batch_size,
        },
        "hand_model_sha256": hand_model_sha256,
        "views": {"count": settings.views, "augmentation": settings.augmentation, "seed": settings.seed},
        "pictures": pictures,
        "features": {"grid": settings.features.grid, "encoding": settings.features.encoding},
    }
    return identity | ({"strict_numerics": dict(strict_numerics)} if strict_numerics is not None else {})


def teach_shard(
    job: ShardJob, batches: Iterable[PreparedBatch], forward: Forward, provenance: Mapping[str, Any]
) -> ShardRecord:
    """Teach one shard: write it, publish it, record it. A shard that is finished already is left as it is.

    batches: `prepared_batches(job)`, from wherever it ran; not touched when there is nothing to do.
    provenance: what only moves the last bits (`numerics`).
    """
    folder = CacheFolder(job.cache_root)
    done = _already_there(folder, job.input_hash)
    if done is not None:
        return done
    _note(job, "shard_started")
    final = folder.shard_path(job.input_hash)
    partial = partial_path(final)
    try:
        with ShardWriter(partial) as writer:
            left_out = [bad for answered in _answers(job, batches, forward) for bad in _store(writer, answered)]
            record = writer.finish(_header(job, left_out, provenance))
        published = publish_directory(partial, final)
    finally:
        if partial.exists():
            remove_tree(partial)
    if published:
        write_record(folder.record_path(job.input_hash), record)
    else:  # another attempt was faster: record what it published, whose last bits may be another machine's
        record = folder.adopt_shard(job.input_hash)
    _note(job, "shard_committed")
    return record


def _already_there(folder: CacheFolder, input_hash: str) -> ShardRecord | None:
    """The record of a shard that an earlier attempt finished, or published and did not live to record."""
    record = folder.finished_record(input_hash)
    if record is not None and not quick_check(folder, record):
        return record
    if folder.shard_path(input_hash).exists():
        try:
            return folder.adopt_shard(input_hash)
        except DamageError:
            folder.discard(input_hash)
    return None


def _header(job: ShardJob, left_out: Iterable[Quarantined], provenance: Mapping[str, Any]) -> ShardHeader:
    ids = job.sample_ids
    by_id = {sample.sample_id: sample for sample in left_out}
    ordered = tuple(by_id[sample_id] for sample_id in ids if sample_id in by_id)
    return ShardHeader(job.input_hash, job.dataset, job.settings.role, len(ids), ordered, provenance)


@dataclass(frozen=True, eq=False)
class _Answer:
    """One view with the teacher's answer to it, encoded; `bad`: why it cannot be stored."""

    prepared: PreparedView
    values: dict[str, NDArray[Any]]
    bad: str | None


def _answers(
    job: ShardJob, batches: Iterable[PreparedBatch], forward: Forward
) -> Iterator[Quarantined | list[_Answer]]:
    """The samples in order: all views of one, answered, or why the sample is left out."""
    views: list[_Answer] = []
    for batch in batches:
        yield from batch.quarantined
        if not batch.views:
            continue
        answers = _encode(job, run_padded(forward, batch.pictures, job.settings.batch_size))
        for prepared, (values, bad) in zip(batch.views, answers, strict=True):
            assert prepared.view == len(views)
            assert not views or prepared.sample_id == views[0].prepared.sample_id
            views.append(_Answer(prepared, values, bad))
            if len(views) == job.settings.views:
                yield views
                views = []
    assert not views, "the batches end within a sample"


def _store(writer: ShardWriter, sample: Quarantined | list[_Answer]) -> list[Quarantined]:
    """Append a sample to the shard; the reason instead when one of its views cannot be stored."""
    if isinstance(sample, Quarantined):
        return [sample]
    bad = next((answer.bad for answer in sample if answer.bad is not None), None)
    first = sample[0].prepared
    if bad is not None:
        return [Quarantined(first.sample_id, bad)]
    per_view = [answer.values | answer.prepared.per_view for answer in sample]
    stacked = {path: np.stack([values[path] for values in per_view]) for path in per_view[0]}
    writer.append(first.sample_id, stacked | first.per_sample, [answer.prepared.encoded for answer in sample])
    return []


def run_padded(forward: Forward, pictures: NDArray[np.uint8], batch_size: int) -> dict[str, NDArray[np.float32]]:
    """The forward pass at exactly `batch_size`, padded with black pictures; the answers to the m real ones.

    One fixed size, because another one picks other kernels and moves the last bits of every answer.
    """
    m = len(pictures)
    assert 0 < m <= batch_size
    if m < batch_size:
        padding = np.zeros((batch_size - m, PICTURE_SIZE_PX, PICTURE_SIZE_PX, 3), np.uint8)
        pictures = np.concatenate([pictures, padding])
    outputs = forward(pictures)
    return {name: np.asarray(outputs[name][:m], np.float32) for name in ("features", *OUTPUTS)}


def _encode(
    job: ShardJob, outputs: Mapping[str, NDArray[np.float32]]
) -> Iterator[tuple[dict[str, NDArray[Any]], str | None]]:
    """Each view's stored values, and why it must not be stored if it must not."""
    features = job.settings.features
    grid_BhwC = np.ascontiguousarray(to_grid(outputs["features"], features.grid).transpose(0, 2, 3, 1))
    sound = [representable(view, features.encoding) for view in grid_BhwC]
    with np.errstate(invalid="ignore"):  # of a view that is not sound, and not stored
        stored, scale = encode_features(grid_BhwC, features.encoding)
    for item in range(len(stored)):
        values = {layout.FEATURES: stored[item]} | ({} if scale is None else {layout.FEATURES_SCALE: scale[item]})
        values |= {f"teacher/{name}": outputs[name][item] for name in OUTPUTS}
        not_finite = [name for name in OUTPUTS if not np.isfinite(outputs[name][item]).all()]
        wrong = not_finite if sound[item] else ["features", *not_finite]
        yield values, f"not-finite: the teacher's {', '.join(wrong)}" if wrong else None


def _note(job: ShardJob, event: str) -> None:
    """One line in the events file, whole whoever else writes to it."""
    if job.events is None:
        return
    fields = {"event": event, "unit": job.input_hash, "dataset": job.dataset, "pid": os.getpid()}
    line = json.dumps({"time": round(time.time(), 3), **fields})
    descriptor = os.open(job.events, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (line + "\n").encode())
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Recheck:
    """How far the teacher's answer of today is from the stored one."""

    sample_id: str
    view: int
    max_rel_error: float
    """Largest over the arrays of |today - stored| / |stored|, Euclidean norms."""
    worst: str
    """The array it is the error of."""


def recheck_rows(
    reader: CacheReader, positions: Sequence[int], forward: Forward, view: int | None = None
) -> Iterator[Recheck]:
    """Run the teacher again on stored pictures, at the cache's own batch size, and compare.

    view: which view of each sample; None: they take turns.
    """
    batch_size = int(reader.identity["teacher"]["batch_size"])
    views = [position % reader.n_views if view is None else view for position in positions]
    for start in range(0, len(positions), batch_size):
        rows, at = positions[start : start + batch_size], views[start : start + batch_size]
        stored = reader.read(rows, at)
        today = run_padded(forward, stored[PICTURES], batch_size)
        today["features"] = _as_stored(today["features"], reader.identity["features"])
        for item, (sample_id, which) in enumerate(zip(stored[layout.SAMPLE_ID], at, strict=True)):
            errors = {
                name: _relative(today[name][item], stored[f"teacher/{name}"][item]) for name in ("features", *OUTPUTS)
            }
            worst = max(errors, key=lambda name: errors[name])
            yield Recheck(str(sample_id), which, errors[worst], worst)


def _as_stored(features_BCHW: NDArray[np.float32], features: Mapping[str, Any]) -> NDArray[np.float32]:
    """Features through the cache's grid and encoding, and back: (m,h,w,C)."""
    grid_BhwC = np.ascontiguousarray(to_grid(features_BCHW, features["grid"]).transpose(0, 2, 3, 1))
    stored, scale = encode_features(grid_BhwC, features["encoding"])
    decoded = np.empty_like(grid_BhwC)
    for item in range(len(stored)):
        decode_features(stored[item], None if scale is None else scale[item], decoded[item])
    return decoded


def _relative(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    error = float(np.linalg.norm(found.astype(np.float64) - wanted))
    return error / max(float(np.linalg.norm(wanted)), 1e-12) if np.isfinite(error) else float("inf")


def teacher_forward(teacher: nn.Module, device: str = "cpu") -> Forward:
    """The forward pass of a loaded teacher (`models.teacher.load_teacher`), numpy in and out."""
    import torch

    from models.preprocessing import normalise

    def forward(pictures: NDArray[np.uint8]) -> Mapping[str, NDArray[Any]]:
        with torch.inference_mode():
            outputs = teacher(normalise(torch.from_numpy(pictures).to(device)))
        return {name: outputs[name].float().cpu().numpy() for name in ("features", *OUTPUTS)}

    return forward


def numerics(device: str) -> dict[str, Any]:
    """What only moves the last bits of an answer on this machine: recorded with each shard."""
    import torch

    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    return {"device": "cpu", "torch": torch.__version__, "threads": torch.get_num_threads()}
