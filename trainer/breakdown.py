"""Where the errors are: by joint of the hand, and by how hard a sample is.

Difficulty is a quantity that any data set has: the teacher's own error, how far the sample is from the mean pose, how
small the hand is in its picture, and how many of its joints the labels call seen, where that varies. Each cuts the
samples into quarters of (nearly) equal count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.cases import Columns, paired_metric
from trainer.pairing import on_the_same_samples
from trainer.runs import Runs, StudentRun

Document = dict[str, Any]
Floats = NDArray[np.float64]

JOINTS = ("wrist", *(f"{finger} {part}" for finger in ("thumb", "index", "middle", "ring", "little") for part in
          ("base", "2", "3", "tip")))  # fmt: skip
"""OpenPose's order."""
PARTS = 4
MIN_SAMPLES = 12
"""Fewer are not cut into quarters: three in each say nothing."""
_Z = 1.96
"""Of a 95% interval of a mean over many samples."""
DIFFICULTIES = {
    "teacher_error": "the teacher's own error",
    "mean_pose": "distance from the mean pose",
    "small_hand": "size of the hand in its picture (small is hard)",
    "hidden": "share of joints that the labels call seen (few is hard)",
}


def by_joint(runs: Runs, members: Mapping[str, Sequence[StudentRun]], dataset: str) -> Document | None:
    """Mean error of each joint (21), mm, after alignment; None where nobody's table tells."""
    found = {}
    for name, group in members.items():
        tables = [t for run in group if (t := runs.samples(run, dataset)) is not None and "joint_errors_mm" in t]
        means = [_nanmean(table["joint_errors_mm"]) for table in tables]
        if means and np.isfinite(means[0]).any():
            found[name] = [_finite(value) for value in np.mean(means, axis=0).tolist()]
    return {"dataset": dataset, "joints": list(JOINTS), "error_mm": found} if found else None


def by_difficulty(
    runs: Runs, members: Mapping[str, Sequence[StudentRun]], teacher: StudentRun | None, dataset: str
) -> list[Document]:
    """For each kind of difficulty the mean error in each part of the samples, the easy ones first."""
    tables = {name: [runs.samples(run, dataset) for run in group] for name, group in members.items()}
    known = {name: [t for t in each if t is not None] for name, each in tables.items()}
    known = {name: each for name, each in known.items() if each}
    everyone = [table for each in known.values() for table in each]
    metric = paired_metric(everyone[0]) if everyone else None
    theirs = None if teacher is None else runs.samples(teacher, dataset)
    if metric is None or not all(metric in table for table in everyone):
        return []
    ids, errors = on_the_same_samples(everyone, metric)
    owner = [name for name, each in known.items() for _ in each]
    means = {name: errors[[at for at, who in enumerate(owner) if who == name]].mean(0) for name in known}
    found = []
    for kind, values in _difficulties(everyone[0], theirs, metric).items():
        easy_to_hard = np.array([values.get(name, math.nan) for name in ids])
        parts = _parts(easy_to_hard)
        if parts:
            found.append(_document(kind, dataset, metric, easy_to_hard, parts, means))
    return found


def _difficulties(ours: Columns, teacher: Columns | None, metric: str) -> dict[str, dict[str, float]]:
    """Kind -> sample -> how hard."""
    sources = [
        ("teacher_error", teacher, metric, 1.0),
        ("mean_pose", teacher, "mean_pose_pa_mpjpe_mm", 1.0),
        ("small_hand", ours, "hand_px", -1.0),
        ("hidden", ours, "visible_share", -1.0),
    ]
    return {
        kind: dict(zip(table["sample_id"].tolist(), (sign * table[column]).tolist(), strict=True))
        for kind, table, column, sign in sources
        if table is not None and column in table
    }


def _parts(hardness: Floats) -> list[NDArray[np.intp]]:
    """Rows of each part, the easy ones first; none where the samples do not differ or are too few. Samples that are as
    hard as each other stay together, so parts may be unequal, or fewer."""
    known = np.flatnonzero(np.isfinite(hardness))
    if len(known) < MIN_SAMPLES:
        return []
    edges = np.unique(np.quantile(hardness[known], np.linspace(0, 1, PARTS + 1)[1:-1]))
    part = np.searchsorted(edges, hardness[known], side="left")
    parts = [known[part == number] for number in range(len(edges) + 1)]
    filled = [rows for rows in parts if len(rows)]
    return filled if len(filled) > 1 else []


def _document(
    kind: str,
    dataset: str,
    metric: str,
    hardness: Floats,
    parts: Sequence[NDArray[np.intp]],
    means: Mapping[str, Floats],
) -> Document:
    of = np.abs(hardness)
    return {
        "kind": kind,
        "what": DIFFICULTIES[kind],
        "dataset": dataset,
        "metric": metric,
        "from": [float(of[rows].min()) for rows in parts],
        "to": [float(of[rows].max()) for rows in parts],
        "samples": [len(rows) for rows in parts],
        "error": {name: [_finite(v) for v in _each(values, parts, np.nanmean)] for name, values in means.items()},
        "reach": {name: [_finite(v) for v in _each(values, parts, _reach)] for name, values in means.items()},
    }


def _each(values: Floats, parts: Sequence[NDArray[np.intp]], of: Any) -> list[float]:
    return [float(of(values[rows])) if np.isfinite(values[rows]).any() else math.nan for rows in parts]


def _reach(values: Floats) -> float:
    """Half a 95% interval of the mean."""
    known = values[np.isfinite(values)]
    return _Z * float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else math.nan


def _nanmean(values: Floats) -> Floats:
    known = np.isfinite(values)
    count = known.sum(0)
    total = np.where(known, values, 0).sum(0)
    return np.asarray(np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
