"""The teacher live in every training step: what training from a cache is held to.

No part of the trainer, whose processes never load a teacher. An online run is the trainer's own loop on the same
pictures and labels in the same order; of every batch the teacher's cached answers are replaced by what it says of the
batch's pictures now, all of its map in float32.

Shapes: S steps, B pictures, D the teacher's channels, H x W its tokens, h x w the stored ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.hand_model import hand_model_bytes
from models.preprocessing import normalise
from models.teacher import Teacher
from stages.calibrate import fit, job_tokens, tokens_a_view
from stages.preparation import ShardJob, TeachSettings, prepared_batches
from stages.teach import numerics, teach_identity, teach_shard, teacher_forward
from storage.cache import HAND_MODEL, CacheFolder, open_cache
from storage.codecs import CODEC_FILE, Codec, as_stored, codec_bytes
from storage.config import CacheConfig, FeatureGrid, is_fitted
from storage.durable import sha256_bytes
from storage.encodings import grid_shape, to_grid
from storage.manifest import ShardPlan, shards_of
from storage.reading import Batch, CacheReader, Indices
from storage.snapshots import build_snapshot, publish_snapshot, read_head, write_head
from trainer.config import StudentRecipe
from trainer.data import FEATURES, FEATURES_SCALE, PICTURES, Source, TrainMix
from trainer.job import Silent, TrainJob
from trainer.learner import StudentUnderTraining, Tensors
from trainer.loop import train
from trainer.losses import FeatureLoss

Floats = NDArray[np.float32]
Series = NDArray[np.float64]
"""(S,)"""
Answers = Callable[[Tensor], Mapping[str, Tensor]]
"""A teacher: normalised pictures (B,3,256,256) to what `models.hamer.Hamer` answers."""
FEATURE_PART = "teacher/features"
"""The name of the feature loss among a step's parts."""


def write_cache(
    base: Path, parent: Path, tables: Mapping[str, pa.Table], config: CacheConfig, teacher: Teacher, batch_size: int
) -> Path:
    """Teach every hand of some manifests, by data set, as the teach stage does; the folder of the cache.

    base: where the manifests' relative sources start. A fitted encoding is fitted to these same hands first.
    """
    forward, provenance = teacher_forward(teacher), numerics("cpu")
    settings = TeachSettings.of("train", config, batch_size, 0)
    plans = {name: shards_of(table, "train", config.samples_per_shard) for name, table in tables.items()}

    def job(name: str, plan: ShardPlan, root: Path) -> ShardJob:
        return ShardJob(name, plan.input_hash, tables[name].take(pa.array(plan.rows)), settings, root, base)

    hand_model = hand_model_bytes(teacher.hand_model)
    identity = teach_identity(
        settings,
        checkpoint_sha256="0" * 64,
        model_config={},
        hand_model_sha256=sha256_bytes(hand_model),
        precision=teacher.precision,
    )
    attachments = {HAND_MODEL: hand_model}
    if is_fitted(config.features.encoding):
        views = config.views * sum(plan.n_samples for each in plans.values() for plan in each)
        kept = tokens_a_view(views, int(np.prod(grid_shape(config.features.grid, (16, 12)))))
        jobs = [job(name, plan, parent) for name, each in plans.items() for plan in each]
        seen = [job_tokens(one, prepared_batches(one), forward, provenance, kept=kept).tokens for one in jobs]
        attachments[CODEC_FILE] = codec_bytes(fit(np.concatenate(seen), config.features.encoding, 0))
        identity["features"] |= {"codec_sha256": sha256_bytes(attachments[CODEC_FILE])}
    folder, digests = CacheFolder.create(parent, identity, attachments), {}
    for name, each in plans.items():
        for plan in each:
            one = job(name, plan, folder.root)
            teach_shard(one, prepared_batches(one), forward, provenance)
        snapshot = build_snapshot(tables[name], each, folder.finished())
        digests[name] = publish_snapshot(folder.root, folder.fingerprint, name, snapshot)
    write_head(folder.root, digests)
    return folder.root


@dataclass(frozen=True)
class Run:
    """What a training said of each of its steps, and what its cache had to teach there."""

    parts: dict[str, Series]
    """The loss and its parts by name, as the trainer reports them."""
    cached: list[Floats]
    """Features of the teacher as they came out of the cache, (B,h,w,D) of each step."""
    grid: FeatureGrid
    codec: Codec
    step_s: float
    """Seconds of the median step."""


class _Log(Silent):
    def __init__(self) -> None:
        self.reports: list[Mapping[str, float]] = []

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        assert step == len(self.reports) + 1
        self.reports.append(dict(metrics))


Opener = Callable[..., Any]


def run(job: TrainJob, opener: Opener = open_cache) -> Run:
    """Train to the end, by the trainer's own loop. The job must report every step and hold nothing out.

    opener: what opens its caches; `shuffled` makes a control of it.
    """
    recipe, log = job.recipe, _Log()
    assert recipe.log_every == 1
    assert recipe.validation_fraction == 0
    with _as_if_never_imported("models.teacher"), patch("trainer.lessons.open_cache", opener):
        train(job, log)
    names = log.reports[0].keys() - {"grad_norm", "lr", "pictures_per_s", "loader_wait_share"}
    parts = {name: np.array([report[name] for report in log.reports]) for name in sorted(names)}
    sources = [Source(name, opener(root, {name: digest}), weight) for name, root, digest, weight in job.snapshots]
    mix = TrainMix(sources, batch_size=recipe.batch_size, seed=job.seed, keys=(FEATURES,))
    first: CacheReader = sources[0].reader  # type: ignore[assignment]  # what openers give
    cached = [_decoded(mix.batch(step), first.codec) for step in range(recipe.steps)]
    rates = [report["pictures_per_s"] for report in log.reports]
    grid = cast(FeatureGrid, first.grid)
    return Run(parts, cached, grid, first.codec, recipe.batch_size / float(np.median(rates)))


def _decoded(batch: Batch, codec: Codec) -> Floats:
    stored, scale = batch[FEATURES], batch.get(FEATURES_SCALE)
    features = np.empty((*stored.shape[:3], codec.channels(stored.shape[3])), np.float32)
    codec.decode(stored, scale, features)
    return features


@contextmanager
def _as_if_never_imported(module: str) -> Iterator[None]:
    """The loop refuses a process that has seen the teacher, which is what an online run is."""
    hidden = sys.modules.pop(module, None)
    try:
        yield
    finally:
        if hidden is not None:
            sys.modules[module] = hidden


class LiveTeacher:
    """What the teacher in the loop said at each step, and the student's map that was compared with it."""

    def __init__(self) -> None:
        self.features: list[Floats] = []
        """(B,H,W,D)"""
        self.student: list[Tensor] = []
        """Where and in the channels that it is compared."""
        self.pictures: list[NDArray[np.uint8]] = []
        """(B,256,256,3), what both looked at."""
        self._loss: FeatureLoss | None = None
        self._map_BCHW = torch.empty(0)

    def note(self, pictures: Tensor, features_BHWD: Tensor, map_BCHW: Tensor, loss: FeatureLoss) -> None:
        """One step, its student before the optimizer's."""
        self._loss, self._map_BCHW = loss, map_BCHW.detach()
        self.pictures.append(pictures.numpy())
        self.features.append(features_BHWD.numpy())
        with torch.no_grad():
            self.student.append(loss.aligned(self._map_BCHW, features_BHWD.permute(0, 3, 1, 2))[0].double())

    @torch.no_grad()
    def target(self, features_BhwD: Floats) -> Tensor:
        """What a student's map is compared with when these are the teacher's features."""
        assert self._loss is not None
        features_BDhw = torch.from_numpy(np.ascontiguousarray(features_BhwD)).permute(0, 3, 1, 2)
        return self._loss.aligned(self._map_BCHW, features_BDhw)[1].double()


@contextmanager
def in_the_loop(teacher: Answers) -> Iterator[LiveTeacher]:
    """Trainings inside are online: the teacher answers in each step. Their cache must hold float16 features."""
    seen = LiveTeacher()

    class Online(StudentUnderTraining):
        def losses(self, batch: Tensors) -> tuple[Tensor, Tensors, Tensors]:
            assert batch[FEATURES].dtype == torch.float16, "the decoder must leave the live features as they are"
            said = dict(teacher(normalise(batch[PICTURES])))
            said["features"] = said["features"].permute(0, 2, 3, 1).contiguous()
            live = {key: said[key.removeprefix("teacher/")] for key in batch if key.startswith("teacher/")}
            total, parts, outputs = super().losses(batch | live)
            assert self.feature_loss is not None
            seen.note(batch[PICTURES], said["features"], outputs["features"], self.feature_loss)
            return total, parts, outputs

    with patch("trainer.lessons.StudentUnderTraining", Online):
        yield seen


class _Shuffled:
    """A reader whose teacher answers of other samples than whose pictures and labels it reads."""

    def __init__(self, reader: CacheReader) -> None:
        self._reader = reader
        one_round = np.random.default_rng(0).permutation(len(reader))
        self._other = np.empty_like(one_round)
        self._other[one_round] = np.roll(one_round, 1)  # nobody keeps its own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read(self, rows: Indices, views: Indices, keys: Any = None, *, decoded: bool = True) -> Batch:
        right = self._reader.read(rows, views, keys, decoded=decoded)
        wrong = self._reader.read(self._other[np.asarray(rows)], views, keys, decoded=decoded)
        return right | {key: value for key, value in wrong.items() if key.startswith("teacher/")}


def shuffled(*given: Any, **named: Any) -> Any:
    """`open_cache`, with the teacher's rows of other samples of the same cache: the control that must fail."""
    return _Shuffled(open_cache(*given, **named))


@dataclass(frozen=True)
class Agreement:
    """A training from a cache beside the online one: the worst of all steps.

    With L the online feature loss, rms(s - t)^2 over all elements of a batch, s the student's map and t the teacher's;
    u what an encoding makes of t, today's answers and not what the cache holds; and e = rms(u - t): by the triangle
    inequality |rms(s - u) - rms(s - t)| <= e, so the encoding moves L by 2 sqrt(L) e + e^2 at most.
    """

    total: float
    """|difference| / online, of the whole loss."""
    features: float
    """Of the feature loss."""
    others: float
    """Of all the rest, as it is weighed in the whole."""
    bound: float
    """What of `features` the encoding explains at most, (2 sqrt(L) e + e^2) / L; the mean of the steps."""
    over_bound: float
    """|difference of the feature losses| / (2 sqrt(L) e + e^2): above 1 it is something else than the encoding."""
    total_over_bound: float
    """The same of the whole loss, in which the feature loss stands with its weight."""
    unexplained: float
    """|difference| / online of the feature loss, after what the encoding does to the online student's loss."""
    targets: float
    """rms(c - u) / rms(t), c the cache's targets: 0 if it holds what the teacher says today, through the encoding."""


def compare(offline: Run, online: Run, live: LiveTeacher, weight: float) -> Agreement:
    """weight: of the feature loss."""
    total, features = online.parts["loss"], online.parts[FEATURE_PART]
    bounds, explained, targets = np.array(
        [
            _step(live, step, offline.cached[step], as_stored(_gridded(said, offline.grid), offline.codec))
            for step, said in enumerate(live.features)
        ]
    ).T
    off = offline.parts[FEATURE_PART] - features
    off_total = offline.parts["loss"] - total
    return Agreement(
        total=_worst(off_total, total),
        features=_worst(off, features),
        others=_worst(off_total - weight * off, total - weight * features),
        bound=float((bounds / features).mean()),
        over_bound=_worst(off, bounds),
        total_over_bound=_worst(off_total, weight * bounds),
        unexplained=_worst(off - explained, features),
        targets=float(targets.max()),
    )


def _step(live: LiveTeacher, step: int, cached: Floats, encoded: Floats) -> tuple[float, float, float]:
    """Of one step: the bound, what the encoding does to the loss of the online student, and `Agreement.targets`."""
    s, t, u, c = live.student[step], *(live.target(each) for each in (live.features[step], encoded, cached))
    e = _rms(u - t)
    return 2 * _rms(s - t) * e + e**2, _rms(s - u) ** 2 - _rms(s - t) ** 2, _rms(c - u) / _rms(t)


def _gridded(features_BHWD: Floats, grid: FeatureGrid) -> Floats:
    return np.ascontiguousarray(to_grid(features_BHWD, grid))


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _worst(difference: Series, of: Series) -> float:
    return float((np.abs(difference) / of).max())


def same_inputs(one: Path, other: Path) -> bool:
    """Whether two caches hold the same samples in the same order, with the same bytes of pictures."""
    first, second = open_cache(one), open_cache(other)
    views = range(first.n_views)
    return first.ids == second.ids and all(
        first.picture_bytes(row, view) == second.picture_bytes(row, view) for row in range(len(first)) for view in views
    )


def job_of(
    cache: Path, out_dir: Path, recipe: Mapping[str, Any], shares: Mapping[str, float] | None = None
) -> TrainJob:
    """A job on all data sets of a cache, for `run`. shares: of the mix, by data set."""
    heads, given = read_head(cache), shares or {}
    fixed = {"on": sorted(heads), "validation_fraction": 0.0, "log_every": 1}
    return TrainJob(
        name=out_dir.name,
        seed=0,
        recipe=StudentRecipe.model_validate({**recipe, **fixed}),
        snapshots=tuple((name, cache, heads[name], given.get(name, 1.0)) for name in sorted(heads)),
        hand_model=None,
        out_dir=out_dir,
        identity=out_dir.name,
        device="cpu",
    )
