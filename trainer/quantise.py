"""int8 networks: static quantisation of the backbone by ONNX Runtime, calibrated on cached pictures, and what it costs.

Weights are int8 with a scale a channel, activations uint8 with a scale a tensor. The head stays float: its last
layers turn bytes into degrees.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.onnx_graph import HAND, INPUT
from models.preprocessing import normalise
from models.student import Student
from storage.cache import open_cache
from storage.durable import partial_path
from storage.errors import InputError
from trainer import metrics
from trainer.data import PICTURES, Batch
from trainer.evaluate import EvaluationSet
from trainer.scores import LABEL_KEYS, TRUTH_KEYS, Hands, Scoring

if TYPE_CHECKING:
    from trainer.export import Int8

BATCH = 8
"""Pictures a calibration step and a measured forward."""


def quantise(network: Path, quantised: Path, int8: Int8) -> None:
    """Write the int8 version of a float graph. Raises InputError where there is no picture to calibrate on."""
    pictures = [batch[PICTURES] for batch in _batches(int8.calibrate_on, int8.pictures, (PICTURES,))]
    if not pictures:
        raise InputError("int8: the caches hold no picture to calibrate on; run `handstill run teach` first")
    quantise_on(pictures, network, quantised)


def quantise_on(pictures: Sequence[NDArray[np.uint8]], network: Path, quantised: Path) -> None:
    """Write the int8 version of a float graph, calibrated on batches (B,256,256,3)."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = partial_path(quantised)
    try:
        with _quiet():
            quant_pre_process(network, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                quantised,
                _Calibration(pictures),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "MatMul", "Gemm", "Add", "Mul", "AveragePool", "MaxPool"],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=_of_the_head(prepared),
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={"CalibMovingAverage": True},
            )
    finally:
        prepared.unlink(missing_ok=True)


class _Calibration:
    """Batches as onnxruntime's calibration asks for them."""

    def __init__(self, pictures: Sequence[NDArray[np.uint8]]) -> None:
        self._left = iter(pictures)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self._left, None)
        return None if batch is None else {INPUT: normalise(torch.from_numpy(batch)).numpy()}

    def __iter__(self) -> Iterator[dict[str, NDArray[np.float32]]]:
        while (batch := self.get_next()) is not None:
            yield batch


def loss_mm(folder: Path, network: str, student: Student, int8: Int8) -> dict[str, float]:
    """What an int8 export in `folder` loses against its float student, on the sets to measure on.

    `joints_mean_mm`: mean distance of joints, wrists together; `joints_p95_mm`: of each hand's mean, the 95th
    percentile; `joints_aligned_mm`: after alignment; and where a set has labels, `<data set>/pa_mpjpe_mm` of both.
    """
    from models.handstill_numpy import Hands as Exported

    exported = Exported(folder, network=network)
    raw: list[NDArray[Any]] = []
    aligned: list[NDArray[Any]] = []
    scores: dict[str, float] = {}
    for each in int8.measure_on:
        ways = {"float": Scoring(each.protocol), "int8": Scoring(each.protocol)}
        for batch in _batches((each,), int8.pictures, (PICTURES, *LABEL_KEYS, *TRUTH_KEYS)):
            with torch.inference_mode():
                wanted = {k: v.numpy() for k, v in student(normalise(torch.from_numpy(batch[PICTURES]))).items()}
            said = {"float": wanted, "int8": exported(batch[PICTURES])}
            for way, found in said.items():
                ways[way].add(batch, Hands(found["keypoints_3d"], found["vertices"], found["keypoints_2d"]))
            joints = said["int8"]["keypoints_3d"]
            raw.append(metrics.mpjpe_mm(joints, wanted["keypoints_3d"], root=0))
            aligned.append(metrics.pa_mpjpe_mm(joints, wanted["keypoints_3d"]))
        found_by = {way: scoring.metrics() for way, scoring in ways.items()}
        scores |= {
            f"{each.dataset}: PA-MPJPE, {way}": found["pa_mpjpe_mm"]
            for way, found in found_by.items()
            if "pa_mpjpe_mm" in found
        }
    errors = np.concatenate(raw)
    return {
        "joints_mean_mm": float(errors.mean()),
        "joints_p95_mm": float(np.percentile(errors, 95)),
        "joints_aligned_mm": float(np.concatenate(aligned).mean()),
    } | scores


def _batches(sets: Sequence[EvaluationSet], pictures: int, keys: Sequence[str]) -> Iterator[Batch]:
    """At most `pictures` samples, as many of each set, evenly over it, of the arrays that the set has."""
    for each in sets:
        reader = open_cache(each.cache_root, {each.dataset: each.digest})
        rows = np.unique(np.linspace(0, len(reader) - 1, min(len(reader), -(-pictures // len(sets)))).astype(int))
        views = np.arange(len(rows)) % reader.n_views if tuple(keys) == (PICTURES,) else np.zeros(len(rows), int)
        for start in range(0, len(rows), BATCH):
            part, seen = rows[start : start + BATCH], views[start : start + BATCH]
            known = reader.read(part[:1], seen[:1]).keys()
            yield reader.read(part, seen, [key for key in keys if key in known])


def _of_the_head(network: Path) -> list[str]:
    """Names of the nodes that stay float: all behind the backbone, and those that the preparation made."""
    import onnx

    model = onnx.load(str(network), load_external_data=False)
    return [node.name for node in model.graph.node if node.name.startswith(HAND)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's quantiser advises on the root logger to do what was just done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
