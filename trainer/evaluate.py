"""Scores of a student, of its teacher and of a mean pose on cached evaluation sets. The teacher is never loaded.

View 0 of an evaluation set is the students' box, view 1 the teacher's own, wider one (HAMER_SPEC 2.1); what the
teacher said of it stands in the cache. An evaluation's folder holds, for each data set, `samples.parquet` (errors of
each sample, for paired comparisons), `cases.parquet` (the best and the worst of them with their pictures) and, where
the protocol has one, `pred.json` for the authors' scripts; and `evaluation.json`, written last.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models.hamer import Hamer, HamerConfig
from models.hand_model import load_hand_model
from models.mano import ManoLayer
from models.student import Student
from storage.cache import CacheReader, open_cache
from storage.durable import canonical_json, partial_path, sweep_partial, sync_directory, write_bytes_atomic
from storage.errors import DamageError, InputError
from storage.identity import sound_attachment
from trainer.cases import extreme_cases, write_table
from trainer.config import LatencyConfig
from trainer.data import PICTURES, Batch, in_order
from trainer.latency import Latency, gflop, measure, measure_whole_path, network_alone, peak_memory_mb
from trainer.predictors import Predict, cached_teacher, mean_pose, student_prediction
from trainer.scores import LABEL_KEYS, STUDENTS_AFFINE, TRUTH_KEYS, Protocol, Scoring

EVALUATION = "evaluation.json"
SAMPLES = "samples.parquet"
CASES = "cases.parquet"
MEAN_POSE = "mean_pose_pa_mpjpe_mm"
"""Column of the teacher's samples table: how far the sample is from what one guesses without looking."""
PREDICTIONS = "pred.json"
AUTHORS_SCRIPTS = ("freihand", "ho3d")
"""Protocols whose authors published a script that reads pred.json."""
STUDENT_VIEW, TEACHER_VIEW = 0, 1
_AFFINE = "views/affine"


@dataclass(frozen=True)
class EvaluationSet:
    """One data set at one snapshot, and the rules it is scored by."""

    dataset: str
    cache_root: Path | str
    digest: str
    protocol: Protocol | None = None


@dataclass(frozen=True)
class EvaluateJob:
    """One student's evaluation; by value, so that it can be sent to another process."""

    name: str
    seed: int
    student: Path
    sets: tuple[EvaluationSet, ...]
    out_dir: Path
    identity: str
    batch_size: int = 32
    latency: LatencyConfig | None = None
    """None: not measured."""
    device: str = "auto"


@dataclass(frozen=True)
class TeacherJob:
    """The teacher's evaluation, from what the cache says it said, and beside it the mean pose's."""

    sets: tuple[EvaluationSet, ...]
    hand_model: Path
    out_dir: Path
    identity: str
    batch_size: int = 256
    model_config: Path | None = None
    """model_config.yaml: with it the network's size and speed are given too, of its architecture with random weights
    (the checkpoint stays unread)."""
    latency: LatencyConfig | None = None
    device: str = "auto"


@dataclass(frozen=True)
class EvaluationResult:
    """What evaluation.json says."""

    name: str
    seed: int | None
    identity: str
    metrics: dict[str, dict[str, float]]
    """Data set -> metric -> value (trainer.scores); millimetres where the name says so."""
    samples: dict[str, int]
    """Scored; `unanswered` are not among them."""
    unanswered: dict[str, int] = field(default_factory=dict)
    """Samples of each set that were quarantined. pred.json answers them with the mean pose, since the authors' scripts
    want as many answers as there are pictures: their scores count them, ours do not."""
    mean_pose: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same metrics for the hand model's mean pose on every picture: what knowing nothing scores. Teacher only."""
    params_m: float | None = None
    latency: dict[str, Latency] = field(default_factory=dict)
    whole_path: Latency | None = None
    """From a decoded photograph and a box to joints and mesh, one hand."""
    gflop: float | None = None
    """Of one picture; two a multiply-add."""
    peak_memory_mb: float | None = None
    """Of a forward at the smallest batch size: `trainer.latency.peak_memory_mb`."""
    device: str | None = None
    """What the latency was measured on, threads included."""

    @property
    def latency_ms(self) -> dict[str, float]:
        """Median milliseconds of one forward, by batch size."""
        return {size: latency.p50_ms for size, latency in self.latency.items()}

    @property
    def fps(self) -> float | None:
        """Pictures a second one at a time; where batch size 1 was not measured, at the smallest that was."""
        smallest = min(self.latency.values(), key=lambda latency: latency.batch_size, default=None)
        return None if smallest is None else smallest.pictures_per_s


def evaluate_student(job: EvaluateJob) -> EvaluationResult:
    """Score a saved student on every set and measure its latency, or return the result if that was done."""
    if (done := read_evaluation(job.out_dir, job.identity)) is not None:
        return done
    device = _device(job.device)
    student = Student.load(job.student).to(device).eval()
    predict = student_prediction(student, device)
    metrics, samples, unanswered = _score_sets(
        job.sets, job.out_dir, STUDENT_VIEW, predict, job.batch_size, mean_pose(student.hand_model)
    )
    result = EvaluationResult(
        name=job.name,
        seed=job.seed,
        identity=job.identity,
        metrics=metrics,
        samples=samples,
        unanswered=unanswered,
    )
    channels_last = student.channels_last_safe
    return _finish(job.out_dir, _with_size_and_speed(result, student, job.latency, device, channels_last=channels_last))


def evaluate_teacher(job: TeacherJob) -> EvaluationResult:
    """Score the teacher's cached answers, and the mean pose, on every set."""
    if (done := read_evaluation(job.out_dir, job.identity)) is not None:
        return done
    hand_model = load_hand_model(sound_attachment(job.hand_model))
    teacher, nothing = cached_teacher(hand_model), mean_pose(hand_model)
    baseline = {each.dataset: _score_nothing(each, nothing, job.batch_size) for each in job.sets}
    metrics, samples, unanswered = _score_sets(
        job.sets,
        job.out_dir,
        TEACHER_VIEW,
        teacher,
        job.batch_size,
        nothing,
        beside={name: {MEAN_POSE: each.samples()["pa_mpjpe_mm"]} for name, each in baseline.items()},
    )
    mean_pose_metrics = {name: each.metrics() for name, each in baseline.items()}
    result = EvaluationResult("teacher", None, job.identity, metrics, samples, unanswered, mean_pose=mean_pose_metrics)
    if job.model_config is not None:
        network = Hamer(HamerConfig.from_yaml(job.model_config), ManoLayer(hand_model))
        result = _with_size_and_speed(result, network, job.latency, _device(job.device), channels_last=False)
    return _finish(job.out_dir, result)


def _with_size_and_speed(
    result: EvaluationResult,
    network: nn.Module,
    latency: LatencyConfig | None,
    device: torch.device,
    *,
    channels_last: bool,
) -> EvaluationResult:
    result = dataclasses.replace(
        result, params_m=sum(p.numel() for p in network.parameters()) / 1e6, device=describe(device)
    )
    if latency is None:
        return result
    if latency.fused and isinstance(network, Student):
        network = network.fused()
    by_size = measure(network, latency, device, channels_last=channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    smallest = network_alone(network, min(latency.batch_sizes), device, memory_format)
    return dataclasses.replace(
        result,
        latency=by_size,
        whole_path=measure_whole_path(network, latency, device, channels_last=channels_last),
        gflop=gflop(network, device),
        peak_memory_mb=peak_memory_mb(smallest, device),
    )


def _device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def read_evaluation(out_dir: Path, identity: str) -> EvaluationResult | None:
    """The evaluation of that identity if it is done; DamageError if its file is not what we write."""
    path = out_dir / EVALUATION
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
        latency = {size: Latency(**each) for size, each in values.pop("latency").items()}
        whole_path = None if values.get("whole_path") is None else Latency(**values["whole_path"])
        result = EvaluationResult(**values | {"latency": latency, "whole_path": whole_path})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamageError(f"{path} is damaged ({error!r}); delete it and run `handstill run evaluate`") from error
    return result if result.identity == identity else None


def describe(device: torch.device) -> str:
    """The device in words, for the numbers measured on it."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, fp32"
    return f"cpu, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32"


def _score_sets(
    sets: tuple[EvaluationSet, ...],
    out_dir: Path,
    view: int,
    predict: Predict,
    batch_size: int,
    stand_in: Predict,
    beside: Mapping[str, Mapping[str, NDArray[Any]]] | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, int], dict[str, int]]:
    """Metrics of each set, and how many samples were scored and left unanswered.

    beside: more columns for the samples table of a data set.
    """
    metrics: dict[str, dict[str, float]] = {}
    samples: dict[str, int] = {}
    unanswered: dict[str, int] = {}
    for each in sets:
        reader = open_cache(each.cache_root, {each.dataset: each.digest})
        folder = out_dir / each.dataset
        scoring = score(reader, view, predict, each.protocol, batch_size, folder, stand_in)
        columns = scoring.samples() | dict((beside or {}).get(each.dataset, {}))
        write_table(folder / SAMPLES, columns)
        write_table(folder / CASES, extreme_cases(reader, columns, STUDENT_VIEW))
        metrics[each.dataset], samples[each.dataset] = scoring.metrics(), len(reader)
        unanswered[each.dataset] = reader.samples_in - len(reader)
    return metrics, samples, unanswered


def _score_nothing(each: EvaluationSet, nothing: Predict, batch_size: int) -> Scoring:
    reader = open_cache(each.cache_root, {each.dataset: each.digest})
    return score(reader, STUDENT_VIEW, nothing, each.protocol, batch_size, None, nothing)


def score(
    reader: CacheReader,
    view: int,
    predict: Predict,
    protocol: Protocol | None,
    batch_size: int,
    folder: Path | None,
    stand_in: Predict,
) -> Scoring:
    """Score `predict` on every sample; with a folder, write `pred.json` there.

    stand_in: answers, in pred.json alone, for the samples that the cache left out.
    """
    if not len(reader):
        raise InputError(f"data set {', '.join(reader.digests)} has no sample to evaluate on")
    scoring, file = Scoring(protocol), None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        sweep_partial(folder)
        if protocol in AUTHORS_SCRIPTS:
            nobody = stand_in({"sample_id": np.array(["left out"])}).for_authors(np.ones(1), protocol)
            file = _PredictionFile(folder / PREDICTIONS, nobody)
    places = iter(reader.snapshot_rows)
    for batch in _batches(reader, view, batch_size):
        hands = predict(batch)
        scoring.add(batch, hands)
        if file is not None:
            for joints, vertices in zip(*hands.for_authors(batch["labels/right"], protocol), strict=True):
                file.add(int(next(places)), joints, vertices)
    if file is not None:
        file.write(reader.samples_in)
    return scoring


def _batches(reader: CacheReader, view: int, batch_size: int) -> Iterator[Batch]:
    known = reader.read([0], [view])
    teacher = ("teacher/keypoints_3d", "teacher/keypoints_2d", "teacher/betas", _AFFINE)
    wanted = (*LABEL_KEYS, *TRUTH_KEYS, *((PICTURES,) if view == STUDENT_VIEW else teacher))
    wanted += ("teacher/global_orient", "teacher/hand_pose") if view == TEACHER_VIEW else ()
    keys = [key for key in wanted if key in known]

    def make(start: int) -> Batch:
        rows = range(start, min(start + batch_size, len(reader)))
        batch = reader.read(rows, [view] * len(rows), keys)
        if view != STUDENT_VIEW:
            students = reader.read(rows, [STUDENT_VIEW] * len(rows), [_AFFINE])
            batch[STUDENTS_AFFINE] = students[_AFFINE]
        return batch

    return in_order(make, range(0, len(reader), batch_size), workers=1)


class _PredictionFile:
    """[joints, vertices] of every sample in the set's order, as the FreiHAND and HO-3D scripts read them.

    Metres from the wrist, to the micrometre. Meshes wait in a temporary file for the joints that come before them:
    those of HO-3D v3 are half a gigabyte of text.
    """

    def __init__(self, path: Path, stand_in: tuple[NDArray[Any], NDArray[Any]]) -> None:
        self._path = path
        self._stand_in = stand_in
        self._joints: list[str] = []
        self._vertices = tempfile.TemporaryFile("w+", dir=path.parent)  # noqa: SIM115 - closed by `write`

    def add(self, place: int, joints: NDArray[Any], vertices: NDArray[Any]) -> None:
        """The answer (21,3), (V,3) to the sample at `place`; those skipped get the stand-in's."""
        self._skip_to(place)
        self._append(joints, vertices)

    def write(self, samples: int) -> None:
        """The whole file, of so many answers."""
        self._skip_to(samples)
        partial = partial_path(self._path)
        with partial.open("x") as file, self._vertices as vertices:
            file.write(f"[[{', '.join(self._joints)}], [")
            vertices.seek(0)
            shutil.copyfileobj(vertices, file)
            file.write("]]")
        partial.replace(self._path)
        sync_directory(self._path.parent)

    def _skip_to(self, place: int) -> None:
        for _ in range(place - len(self._joints)):
            self._append(self._stand_in[0][0], self._stand_in[1][0])

    def _append(self, joints: NDArray[Any], vertices: NDArray[Any]) -> None:
        self._vertices.write((", " if self._joints else "") + json.dumps(vertices.round(6).tolist()))
        self._joints.append(json.dumps(joints.round(6).tolist()))


def _finish(out_dir: Path, result: EvaluationResult) -> EvaluationResult:
    out_dir.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(out_dir / EVALUATION, canonical_json(dataclasses.asdict(result)))
    return result
