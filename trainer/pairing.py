"""Differences between students, between strategies and to the teacher, on the same samples, with how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.cases import Columns, paired_metric
from trainer.intervals import Interval, over_samples, over_seeds, picture_of
from trainer.runs import Runs, StudentRun

Document = dict[str, Any]
Group = Sequence[StudentRun]
"""The seeds of one student, or the teacher alone."""

_BUDGET = ("steps", "batch_size", "on", "workers.count")
_NO_DIFFERENCE = ("strategy", "seed", "log_every", "checkpoint_every", "loader_workers", "disk_cache_gb", "name")
"""Parameters that two students of one budget and recipe may differ in, beside `distill.*`."""
_ARCHITECTURE = ("backbone", "head", "decoder", "vit")


@dataclass(frozen=True)
class Paired:
    """Ours minus theirs, sample by sample; each side is the mean over its seeds."""

    metric: str
    interval: Interval
    means: NDArray[np.float64]
    """Of the resamplings."""
    seeds: Interval | None


def all_pairs(runs: Runs, groups: Mapping[str, Group], teachers: Mapping[str, StudentRun], how: int) -> list[Document]:
    """Every student against the others of its architecture (a plain one is who others are held against), and against
    its teacher. how: resamplings."""
    datasets = sorted({dataset for group in groups.values() for run in group for dataset in run.metrics})
    pairs = [_ordered(groups, a, b) for a, b in combinations(groups, 2) if _alike(groups[a][0], groups[b][0])]
    found = []
    for dataset in datasets:
        for name, other in pairs:
            found += _document(runs, (name, groups[name]), (other, groups[other]), dataset, how)
        for name, group in groups.items():
            if (teacher := teachers.get(group[0].experiment)) is not None:
                found += _document(runs, (name, group), (teacher.name, [teacher]), dataset, how)
    return found


def paired(
    runs: Runs, ours: Group, theirs: Group, dataset: str, how: int, metric: str | None = None, confidence: float = 0.95
) -> Paired | None:
    """The difference in one metric, or in the first that both have; None where their samples tell nothing."""
    sides = [[runs.samples(run, dataset) for run in side] for side in (ours, theirs)]
    tables = [[table for table in side if table is not None] for side in sides]
    if any(len(known) < len(side) or not side for known, side in zip(tables, sides, strict=True)):
        return None
    metric = metric or paired_metric(tables[0][0])
    if metric is None or any(metric not in table for side in tables for table in side):
        return None
    ids, columns = on_the_same_samples([*tables[0], *tables[1]], metric)
    if not len(ids):
        return None
    a, b = columns[: len(ours)], columns[len(ours) :]
    interval, means = over_samples(a.mean(0) - b.mean(0), [picture_of(name) for name in ids], how, confidence)
    # only with a mean over the same samples on both sides is a seed's mean one of the same thing
    known = np.isfinite(columns).all(0)
    by_seed = [
        {run.seed: float(values[known].mean()) for run, values in zip(side, part, strict=True)} if known.any() else {}
        for side, part in ((ours, a), (theirs, b))
    ]
    return Paired(metric, interval, means, over_seeds(by_seed[0], by_seed[1], confidence))


def on_the_same_samples(tables: Sequence[Columns], column: str) -> tuple[list[str], NDArray[np.float64]]:
    """The ids (N,) that all tables have, sorted, and the column of each table (tables, N, ...) in that order."""
    ids = sorted(set.intersection(*(set(table["sample_id"].tolist()) for table in tables)))
    values = []
    for table in tables:
        place = {name: row for row, name in enumerate(table["sample_id"].tolist())}
        values.append(np.asarray(table[column], np.float64)[[place[name] for name in ids]])
    return ids, np.stack(values)


def budget_differences(ours: Group, theirs: Group) -> list[str]:
    """What makes it no comparison at equal budget: steps, batch, data, seeds; empty: it is one."""
    found = [
        f"{key} {_told(a)} against {_told(b)}"
        for key in _BUDGET
        if (a := _values(ours, key)) != (b := _values(theirs, key))
    ]
    data = [{tuple(sorted(run.training.items())) for run in side} for side in (ours, theirs)]
    if data[0] != data[1] and not any(text.startswith("on ") for text in found):
        found.append("other snapshots of the training data")
    if len(ours) != len(theirs):
        found.append(f"{len(ours)} against {len(theirs)} seeds")
    return found


def recipe_differences(ours: Group, theirs: Group) -> list[str]:
    """Which other keys of the recipe differ, but for what makes the strategy."""
    keys = sorted({key for run in (*ours, *theirs) for key in run.params})
    return [
        f"{key} {_told(a)} against {_told(b)}"
        for key in keys
        if key not in (*_BUDGET, *_NO_DIFFERENCE) and not _is_architecture(key) and not key.startswith("distill.")
        if (a := _values(ours, key)) != (b := _values(theirs, key))
    ]


def same_truth(runs: Sequence[StudentRun], dataset: str) -> bool:
    """Whether they were scored on one snapshot of the data set; runs that do not say are believed."""
    return len({run.evaluated[dataset] for run in runs if dataset in run.evaluated}) < 2


def _values(group: Group, key: str) -> set[str]:
    return {run.params.get(key, "") for run in group}


def _told(values: set[str]) -> str:
    return " and ".join(sorted(value or "none" for value in values))


def _alike(a: StudentRun, b: StudentRun) -> bool:
    sizes = ({k: v for k, v in run.params.items() if _is_architecture(k)} for run in (a, b))
    return a.backbone == b.backbone and next(sizes) == next(sizes)


def _is_architecture(key: str) -> bool:
    return key.partition(".")[0] in _ARCHITECTURE


def _ordered(groups: Mapping[str, Group], a: str, b: str) -> tuple[str, str]:
    """The one that is held against the other first: what distils more against what distils less."""
    ranks = {"none": 0, "outputs": 1, "features": 2, "hybrid": 3}
    first, second = (ranks.get(groups[name][0].strategy, 1) for name in (a, b))
    return (a, b) if first >= second else (b, a)


def _document(runs: Runs, ours: tuple[str, Group], theirs: tuple[str, Group], dataset: str, how: int) -> list[Document]:
    found = paired(runs, ours[1], theirs[1], dataset, how)
    if found is None:
        return []
    teacher = theirs[1][0].kind == "teacher"
    budget = [] if teacher else budget_differences(ours[1], theirs[1])
    return [
        {
            "student": ours[0],
            "baseline": theirs[0],
            "dataset": dataset,
            "metric": found.metric,
            "difference": _finite(found.interval.mean),
            "low": _finite(found.interval.low),
            "high": _finite(found.interval.high),
            "samples": found.interval.count,
            "over_seeds": None if found.seeds is None else interval_document(found.seeds),
            "equal_budget": not budget,
            "differs": [] if teacher else [*budget, *recipe_differences(ours[1], theirs[1])],
            "same_truth": same_truth([*ours[1], *theirs[1]], dataset),
        }
    ]


def interval_document(interval: Interval) -> Document:
    """As JSON; what is not known as null."""
    return {
        "difference": _finite(interval.mean),
        "low": _finite(interval.low),
        "high": _finite(interval.high),
        "seeds": interval.count,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
