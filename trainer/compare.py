"""The students side by side: what each scores, how sure the differences are, and whether the gate is passed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import InputError
from trainer.config import METRICS, CompareConfig, GateConfig, MetricName
from trainer.runs import Runs, Scores, StudentRun

CURVE = "validation/pa_mpjpe_mm"
PAIRED_METRICS = ("pa_mpjpe_mm", "pa_mpvpe_mm", "error_2d_share")
"""What is compared sample by sample: the first of these that the samples tables of a data set hold."""

Document = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """`document` is what `handstill compare --json` prints; the rest is for the report."""

    document: Document
    curves: dict[str, list[tuple[int, float]]]
    """Student and seed -> validation error by step."""
    pictures: dict[str, bytes]
    """Student and seed -> PNG."""

    @property
    def passed(self) -> bool:
        return bool(self.document["gate"]["passed"])


def compare(
    tracking_uri: str,
    experiment: str,
    config: CompareConfig | None = None,
    identities: Collection[str] | None = None,
) -> Comparison:
    """Read the experiment's finished runs from MLflow and compare them.

    identities: count only students of these identities (those of the configuration as it is now); None: the last run
    of each name and seed. InputError when there is none, or when the gate names what is not there.
    """
    config, runs = config or CompareConfig(), Runs(tracking_uri, experiment)
    students, teacher = runs.students(identities), runs.teacher()
    if not students:
        raise InputError(f"experiment {experiment!r} has no finished student to compare; run `handstill run` first")
    document: Document = {
        "experiment": experiment,
        "teacher": _teacher(teacher),
        "students": [_student(run) for run in students],
        "by_student": (groups := _by_student(students)),
        "paired": _paired(runs, students, teacher, config.bootstrap),
    }
    document["pareto"] = _pareto(groups, document["teacher"])
    document["gate"] = _gate(config.gate, groups, document["teacher"])
    return Comparison(
        document,
        curves={_label(run): runs.curve(run, CURVE) for run in students},
        pictures={_label(run): png for run in students if (png := runs.picture(run)) is not None},
    )


def better(metric: str, a: float, b: float) -> bool:
    """Whether a is better than b: errors in mm are small, scores large."""
    return a < b if metric.endswith("_mm") else a > b


def headline(dataset: str, groups: Sequence[Document]) -> MetricName | None:
    """The first metric that some student has on a data set."""
    return next((m for m in METRICS if any(m in g["metrics"].get(dataset, {}) for g in groups)), None)


def _pareto(groups: Sequence[Document], teacher: Document) -> dict[str, list[str]]:
    """By data set: those, the teacher among them, that nobody beats in speed and in the headline metric at once."""
    everyone = [{**teacher, "name": "teacher"}, *groups]
    found: dict[str, list[str]] = {}
    for dataset in sorted({dataset for each in groups for dataset in each["metrics"]}):
        metric = headline(dataset, groups)
        scores = [(each["name"], each["fps"], each["metrics"].get(dataset, {}).get(metric)) for each in everyone]
        points = [(name, fps, value) for name, fps, value in scores if fps and value is not None]
        found[dataset] = [
            name
            for name, fps, value in sorted(points, key=lambda point: -point[1])
            if not any(
                (other_fps >= fps and better(str(metric), other, value)) or (other_fps > fps and other == value)
                for _, other_fps, other in points
            )
        ]
    return found


def paired_difference(a: NDArray[Any], b: NDArray[Any], resamplings: int) -> tuple[float, float, float]:
    """Mean of a - b over the samples where both are known, and the bounds of its 95% bootstrap interval."""
    known = np.isfinite(a) & np.isfinite(b)
    difference = (a - b)[known]
    if not len(difference):
        return math.nan, math.nan, math.nan
    rng = np.random.default_rng(0)
    means = [difference[rng.integers(len(difference), size=len(difference))].mean() for _ in range(resamplings)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def _label(run: StudentRun) -> str:
    return f"{run.name} (seed {run.seed})"


def _teacher(run: StudentRun | None) -> Document:
    if run is None:
        return {"metrics": {}, "mean_pose": {}, "params_m": None, "latency_ms": {}, "fps": None, "run_id": None}
    return {
        "metrics": run.metrics,
        "mean_pose": run.mean_pose,
        "params_m": run.params_m,
        "latency_ms": run.latency_ms,
        "fps": run.fps,
        "run_id": run.run_id,
    }


def _student(run: StudentRun) -> Document:
    return {
        "name": run.name,
        "seed": run.seed,
        "run_id": run.run_id,
        "backbone": run.backbone,
        "head": run.params.get("head"),
        "strategy": run.strategy,
        "identity": run.identity,
        "params_m": run.params_m,
        "metrics": run.metrics,
        "latency_ms": run.latency_ms,
        "fps": run.fps,
    }


def _by_student(students: Sequence[StudentRun]) -> list[Document]:
    """Means and standard deviations over seeds."""
    groups: dict[str, list[StudentRun]] = {}
    for run in students:
        groups.setdefault(run.name, []).append(run)
    return [
        {
            "name": name,
            "backbone": runs[0].backbone,
            "strategy": runs[0].strategy,
            "seeds": len(runs),
            "params_m": runs[0].params_m,
            "fps": _mean([run.fps for run in runs if run.fps is not None]),
            "metrics": _over_seeds([run.metrics for run in runs], _mean),
            "std": _over_seeds([run.metrics for run in runs], _std),
        }
        for name, runs in groups.items()
    ]


def _over_seeds(
    scores: Sequence[Scores], reduce: Callable[[Sequence[float]], float | None]
) -> dict[str, dict[str, float | None]]:
    return {
        dataset: {m: reduce([s[dataset][m] for s in scores if m in s.get(dataset, {})]) for m in scores[0][dataset]}
        for dataset in scores[0]
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _paired(runs: Runs, students: Sequence[StudentRun], teacher: StudentRun | None, resamplings: int) -> list[Document]:
    """Each student against the plain one of its backbone, and against the teacher, on the same samples."""
    found = []
    for dataset in sorted({dataset for run in students for dataset in run.metrics}):
        tables = {run.run_id: runs.sample_errors(run, dataset) for run in [*students, *([teacher] if teacher else [])]}
        errors = {run_id: columns for run_id, table in tables.items() if (columns := _errors(table)) is not None}
        by_name = {run.name: [r for r in students if r.name == run.name and r.run_id in errors] for run in students}
        for name, group in by_name.items():
            for baseline in _baselines(group, by_name, teacher):
                if all(run.run_id in errors for run in baseline):
                    sides = [[errors[run.run_id] for run in side] for side in (group, baseline)]
                    found.append(_difference(name, baseline[0], dataset, sides, resamplings))
    return found


def _baselines(
    group: Sequence[StudentRun], by_name: Mapping[str, Sequence[StudentRun]], teacher: StudentRun | None
) -> list[Sequence[StudentRun]]:
    if not group:
        return []
    run = group[0]
    plain = [
        other
        for other in by_name.values()
        if other
        and (other[0].strategy, other[0].backbone, other[0].params.get("head"))
        == ("none", run.backbone, run.params.get("head"))
    ]
    against: list[Sequence[StudentRun]] = plain if run.strategy != "none" else []
    return against + ([[teacher]] if teacher is not None else [])


@dataclass(frozen=True)
class _Errors:
    metric: str
    by_id: dict[str, float]


def _errors(table: Mapping[str, NDArray[Any]] | None) -> _Errors | None:
    for metric in PAIRED_METRICS:
        if table is not None and metric in table and np.isfinite(table[metric]).any():
            return _Errors(metric, dict(zip(table["sample_id"].tolist(), table[metric].tolist(), strict=True)))
    return None


def _difference(
    name: str, baseline: StudentRun, dataset: str, sides: list[list[_Errors]], resamplings: int
) -> Document:
    """Joined by sample id; each side is the mean over its seeds."""
    ids = sorted(set.intersection(*(set(each.by_id) for side in sides for each in side)))
    means = [np.mean([[each.by_id[i] for i in ids] for each in side], axis=0) for side in sides]
    difference, low, high = paired_difference(means[0], means[1], resamplings)
    return {
        "student": name,
        "baseline": baseline.name,
        "dataset": dataset,
        "metric": sides[0][0].metric,
        "difference": _finite(difference),
        "low": _finite(low),
        "high": _finite(high),
        "samples": len(ids),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _gate(gate: GateConfig | None, groups: Sequence[Document], teacher: Document) -> Document:
    if gate is None:
        return {"passed": True, "checks": []}
    scores = {g["name"]: g["metrics"].get(gate.dataset, {}).get(gate.metric) for g in groups}
    known = {name: value for name, value in scores.items() if value is not None}
    missing = sorted(set(gate.students or []) - known.keys())
    if missing or not known:
        raise InputError(
            f"compare.gate: {', '.join(missing) or 'no student'} has no {gate.metric} on {gate.dataset}; "
            f"students that have: {', '.join(sorted(known)) or 'none'}"
        )
    best = min(known, key=lambda name: known[name] if gate.metric.endswith("_mm") else -known[name])
    checks = [
        {"student": name, "what": what, "value": known[name], "limit": limit, "passed": holds}
        for name in gate.students or [best]
        for what, limit, or_equal in _limits(gate, teacher)
        for holds in [better(gate.metric, known[name], limit) or (or_equal and known[name] == limit)]
    ]
    passed = all(check["passed"] for check in checks)
    return {"passed": passed, "metric": gate.metric, "dataset": gate.dataset, "checks": checks}


def _limits(gate: GateConfig, teacher: Document) -> list[tuple[str, float, bool]]:
    """Name, value, and whether being equal to it is good enough, of each limit that the gate sets."""

    def of_teacher(what: str, scores: Scores) -> float:
        value = scores.get(gate.dataset, {}).get(gate.metric)
        if value is None:
            raise InputError(f"compare.gate.{what}: the teacher's run has no {gate.metric} on {gate.dataset}")
        return value

    limits = [] if gate.limit is None else [("limit", gate.limit, True)]
    if gate.teacher_ratio is not None:
        limits.append(("teacher_ratio", gate.teacher_ratio * of_teacher("teacher_ratio", teacher["metrics"]), True))
    if gate.better_than_mean_pose:
        limits.append(("better_than_mean_pose", of_teacher("better_than_mean_pose", teacher["mean_pose"]), False))
    return limits
