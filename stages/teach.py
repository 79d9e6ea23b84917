"""Teach: run the teacher once over a shard's views and store what it saw and said.

A plain function over one shard: `teach_shard(job, prepared_batches(job), forward, provenance)`. The forward pass is
handed in, so that this module neither loads a teacher nor knows where it runs. Shapes: B the fixed batch size, m <= B
views in a batch, C channels.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.crops import PREPROCESSING_VERSION
from stages.answers import OUTPUTS, Forward, fill_shard, run_padded
from stages.preparation import PreparedBatch, ShardJob, TeachSettings, prepared_batches
from stages.replay import LIBRARIES, picture_libraries
from storage import layout
from storage.cache import CacheFolder
from storage.codecs import as_stored
from storage.config import FeatureGrid
from storage.durable import partial_path, publish_directory, remove_tree
from storage.encodings import JPEG_SUBSAMPLING, PAPER_SIZE, bilinear_taps
from storage.errors import DamageError
from storage.ledger import Quarantined, ShardRecord
from storage.mirror import Mirror
from storage.reading import PICTURES, CacheReader
from storage.shards import ShardHeader, ShardWriter
from storage.verification import quick_check

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "Forward",
    "PreparedBatch",
    "Recheck",
    "ShardJob",
    "TeachSettings",
    "WrittenShard",
    "numerics",
    "prepared_batches",
    "publish_shard",
    "recheck_rows",
    "rehearse_shard",
    "teach_identity",
    "teach_shard",
    "teacher_forward",
    "write_shard",
]

TEACH_VERSION = 1
"""Of this algorithm; raised when the stored answers change for reasons that the rest of the identity does not show."""


def teach_identity(
    settings: TeachSettings,
    *,
    checkpoint_sha256: str,
    model_config: Mapping[str, Any],
    hand_model_sha256: str,
    precision: str,
    strict_numerics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that decides a cache's answers, but the codec of a fitted encoding (pipeline/calibrations.py adds it).

    Its fingerprint names the cache (storage/identity.py).

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
    written = write_shard(job, batches, forward, provenance)
    return written if isinstance(written, ShardRecord) else publish_shard(job, written)


def rehearse_shard(
    job: ShardJob, batches: Iterable[PreparedBatch], forward: Forward, provenance: Mapping[str, Any]
) -> None:
    """All of `teach_shard` but the publishing: what kills a worker that teaches this job kills one here."""
    written = write_shard(job, batches, forward, provenance)
    if isinstance(written, WrittenShard):
        remove_tree(written.partial)


@dataclass(frozen=True)
class WrittenShard:
    """A shard that is written but neither durable nor published."""

    partial: Path
    record: ShardRecord


def write_shard(
    job: ShardJob, batches: Iterable[PreparedBatch], forward: Forward, provenance: Mapping[str, Any]
) -> WrittenShard | ShardRecord:
    """The part of `teach_shard` that needs the teacher; the record where the shard is finished already."""
    folder = CacheFolder(job.cache_root)
    done = (
        _already_there(folder, job.input_hash) if job.store is None else job.store.record(folder.root, job.input_hash)
    )
    if done is not None:
        return done
    _note(job, "shard_started")
    folder.shards_dir.mkdir(parents=True, exist_ok=True)
    partial = partial_path(folder.shard_path(job.input_hash))
    try:
        codec = folder.codec()
        with ShardWriter(partial, codec.dimension) as writer:
            left_out = fill_shard(job, writer, batches, forward, codec)
            return WrittenShard(partial, writer.finish(_header(job, left_out, provenance)))
    except BaseException:
        if partial.exists():
            remove_tree(partial)
        raise


def publish_shard(job: ShardJob, written: WrittenShard) -> ShardRecord:
    """The part of `teach_shard` that waits for the disk: durable, published, recorded, in this order."""
    folder = CacheFolder(job.cache_root)
    if job.store is not None:
        return _commit_to_store(job, job.store, written)
    try:
        published = publish_directory(written.partial, folder.shard_path(job.input_hash))
    finally:
        if written.partial.exists():
            remove_tree(written.partial)
    if published:
        record = written.record
        folder.record(record)
    else:  # another attempt was faster: record what it published, whose last bits may be another machine's
        record = folder.adopt_shard(job.input_hash)
    _note(job, "shard_committed", bytes=record.bytes)
    return record


def _commit_to_store(job: ShardJob, store: Mirror, written: WrittenShard) -> ShardRecord:
    """Objects first, record last; nothing of the shard stays on this machine's disk."""
    try:
        record = store.commit_shard(job.cache_root, written.partial, written.record)
    finally:
        remove_tree(written.partial)
    _note(job, "shard_committed", bytes=record.bytes)
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


def _note(job: ShardJob, event: str, **facts: int) -> None:
    """One line in the events file, whole whoever else writes to it."""
    if job.events is None:
        return
    fields = {"event": event, "unit": job.input_hash, "dataset": job.dataset, "pid": os.getpid()}
    line = json.dumps({"time": round(time.time(), 3), **fields, **job.told, **facts})
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
    errors: Mapping[str, float]
    """Of each array: |today - stored| / |stored|, Euclidean norms; features both through the encoding."""

    @property
    def max_rel_error(self) -> float:
        """The largest of them."""
        return max(self.errors.values())

    @property
    def worst(self) -> str:
        """The array it is the error of."""
        return max(self.errors, key=lambda name: self.errors[name])


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
        today = run_padded(forward, stored[PICTURES], reader.identity["features"]["grid"], batch_size)
        today["features"] = as_stored(today["features"], reader.codec)
        for item, (sample_id, which) in enumerate(zip(stored[layout.SAMPLE_ID], at, strict=True)):
            errors = {
                name: _relative(today[name][item], stored[f"teacher/{name}"][item]) for name in ("features", *OUTPUTS)
            }
            yield Recheck(str(sample_id), which, errors)


def _relative(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    error = float(np.linalg.norm(found.astype(np.float64) - wanted))
    return error / max(float(np.linalg.norm(wanted)), 1e-12) if np.isfinite(error) else float("inf")


def teacher_forward(teacher: nn.Module, device: str = "cpu") -> Forward:
    """The forward pass of a loaded teacher (`models.teacher.load_teacher`), numpy in and out."""
    import torch

    from models.preprocessing import normalise

    def forward(pictures: NDArray[np.uint8], grid: FeatureGrid) -> Mapping[str, NDArray[Any]]:
        with torch.inference_mode():
            outputs = teacher(normalise(torch.from_numpy(pictures).to(device)))
            features_BHWC = outputs["features"].float().permute(0, 2, 3, 1).contiguous()
            outputs["features"] = _to_grid_on_device(features_BHWC, grid)
        return {name: outputs[name].float().cpu().numpy() for name in ("features", *OUTPUTS)}

    return forward


def _to_grid_on_device(features_BHWC: Tensor, grid: FeatureGrid) -> Tensor:
    """`storage.encodings.to_grid`, sum for sum, before the features leave the device: a third of the bytes to copy."""
    import torch

    if grid == "full":
        return features_BHWC
    if grid == "8x6-geometric":
        rows = features_BHWC[:, 0::2] + features_BHWC[:, 1::2]
        return (rows[:, :, 0::2] + rows[:, :, 1::2]) * 0.25
    for axis in (1, 2):
        low, high, share = bilinear_taps(features_BHWC.shape[axis], PAPER_SIZE)
        weight = torch.from_numpy(share).to(features_BHWC).reshape([-1 if at == axis else 1 for at in range(4)])
        below, above = (
            features_BHWC.index_select(axis, torch.from_numpy(taps).to(features_BHWC.device)) for taps in (low, high)
        )
        features_BHWC = below * (1 - weight) + above * weight
    return features_BHWC


def numerics(device: str, *, compiled: bool = False) -> dict[str, Any]:
    """What only moves the last bits of an answer on this machine: recorded with each shard."""
    import torch

    how = {"torch": torch.__version__, LIBRARIES: picture_libraries()} | ({"compiled": True} if compiled else {})
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(device)} | how
    return {"device": "cpu"} | how | {"threads": torch.get_num_threads()}
