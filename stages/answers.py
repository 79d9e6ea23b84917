"""The teacher's answers to a shard's views, encoded and put into the shard while the next forward pass runs.

Shapes: B the fixed batch size, m <= B views in a batch, C channels, h x w the stored grid.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.preparation import PreparedBatch, PreparedView, ShardJob
from storage import layout
from storage.codecs import Codec
from storage.config import FeatureGrid
from storage.encodings import PICTURE_SIZE_PX
from storage.ledger import Quarantined
from storage.shards import ShardWriter

OUTPUTS = ("global_orient", "hand_pose", "betas", "cam", "keypoints_2d", "keypoints_3d")
"""What is stored of the teacher's answers, besides its features."""

Forward = Callable[[NDArray[np.uint8], FeatureGrid], Mapping[str, NDArray[Any]]]
"""(pictures (B,256,256,3) uint8 RGB, grid) -> `features` (B,h,w,C) on that grid, and OUTPUTS: B entries each, float32,
new arrays at each call. The grid is the forward's business because it is cheap where the features are: on the device.
"""

VIEWS_ENCODED = 8
"""Views that a thread encodes at a time: 21 MB of the full grid at 1280 channels."""

BATCHES_BEHIND = 2
"""How many answered batches may wait to be stored: 63 MB each at 64 views of the full grid."""


def fill_shard(
    job: ShardJob, writer: ShardWriter, batches: Iterable[PreparedBatch], forward: Forward, codec: Codec
) -> list[Quarantined]:
    """Answer every view and append every sample whose views can all be stored; returns the others, with the reason.

    The forward pass stays in the calling thread (a CPU's thread settings are a thread's own); another one writes, in
    order, while a few more encode a batch's views among them: one core encodes fewer than a GPU answers.
    """
    grid = job.settings.features.grid
    waiting: deque[Future[None]] = deque()
    cores = len(os.sched_getaffinity(0))
    with (
        ThreadPoolExecutor(cores, thread_name_prefix="encode") as encoding,
        ThreadPoolExecutor(1, thread_name_prefix="store") as storing,
    ):
        filler = _Filler(job, writer, codec, encoding)
        for batch in batches:
            outputs = run_padded(forward, batch.pictures, grid, job.settings.batch_size) if batch.views else {}
            waiting.append(storing.submit(filler.take, batch, outputs))
            if len(waiting) > BATCHES_BEHIND:
                waiting.popleft().result()
        for future in waiting:
            future.result()
    assert not filler.views, "the batches end within a sample"
    return filler.left_out


def run_padded(
    forward: Forward, pictures: NDArray[np.uint8], grid: FeatureGrid, batch_size: int
) -> dict[str, NDArray[np.float32]]:
    """The forward pass at exactly `batch_size`, padded with black pictures; the answers to the m real ones.

    One fixed size, because another one picks other kernels and moves the last bits of every answer.
    """
    m = len(pictures)
    assert 0 < m <= batch_size
    if m < batch_size:
        padding = np.zeros((batch_size - m, PICTURE_SIZE_PX, PICTURE_SIZE_PX, 3), np.uint8)
        pictures = np.concatenate([pictures, padding])
    outputs = forward(pictures, grid)
    return {name: np.asarray(outputs[name][:m], np.float32) for name in ("features", *OUTPUTS)}


@dataclass(frozen=True, eq=False)
class _Answer:
    """One view with the teacher's answer to it, encoded; `bad`: why it cannot be stored."""

    prepared: PreparedView
    values: dict[str, NDArray[Any]]
    bad: str | None


class _Filler:
    """Gathers the views of a sample, which may come in two batches, and appends the sample when they are all there."""

    def __init__(self, job: ShardJob, writer: ShardWriter, codec: Codec, encoding: Executor) -> None:
        self._settings = job.settings
        self._codec = codec
        self._encoding = encoding
        self._writer = writer
        self.views: list[_Answer] = []
        self.left_out: list[Quarantined] = []

    def take(self, batch: PreparedBatch, outputs: Mapping[str, NDArray[np.float32]]) -> None:
        self.left_out.extend(batch.quarantined)
        if not batch.views:
            return
        for prepared, (values, bad) in zip(batch.views, self._encoded(outputs), strict=True):
            assert prepared.view == len(self.views)
            assert not self.views or prepared.sample_id == self.views[0].prepared.sample_id
            self.views.append(_Answer(prepared, values, bad))
            if len(self.views) == self._settings.views:
                self._store()
                self.views = []

    def _store(self) -> None:
        first = self.views[0].prepared
        bad = next((answer.bad for answer in self.views if answer.bad is not None), None)
        if bad is not None:
            self.left_out.append(Quarantined(first.sample_id, bad))
            return
        per_view = [answer.values | answer.prepared.per_view for answer in self.views]
        stacked = {path: np.stack([values[path] for values in per_view]) for path in per_view[0]}
        pictures = [answer.prepared.encoded for answer in self.views]
        self._writer.append(first.sample_id, stacked | first.per_sample, pictures)

    def _encoded(
        self, outputs: Mapping[str, NDArray[np.float32]]
    ) -> Iterator[tuple[dict[str, NDArray[Any]], str | None]]:
        """Each view's stored values, and why it must not be stored if it must not."""
        features_BhwC = outputs["features"]
        pieces = [features_BhwC[start : start + VIEWS_ENCODED] for start in range(0, len(features_BhwC), VIEWS_ENCODED)]
        encoded = [view for piece in self._encoding.map(self._encode, pieces) for view in piece]
        for item, (values, sound) in enumerate(encoded):
            values |= {f"teacher/{name}": outputs[name][item] for name in OUTPUTS}
            not_finite = [name for name in OUTPUTS if not np.isfinite(outputs[name][item]).all()]
            wrong = not_finite if sound else ["features", *not_finite]
            yield values, f"not-finite: the teacher's {', '.join(wrong)}" if wrong else None

    def _encode(self, features_mhwC: NDArray[np.float32]) -> list[tuple[dict[str, NDArray[Any]], bool]]:
        """The stored features of each of a few views, and whether they may be stored."""
        sound = [self._codec.representable(view) for view in features_mhwC]
        with np.errstate(invalid="ignore", over="ignore"):  # of a view that is not sound, and not stored
            stored, scale = self._codec.encode(features_mhwC)
        views = [{layout.FEATURES: values} for values in stored]
        if scale is not None:
            views = [values | {layout.FEATURES_SCALE: scale[item]} for item, values in enumerate(views)]
        return list(zip(views, sound, strict=True))
