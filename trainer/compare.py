"""The students side by side: what each scores, how sure the differences are, and whether the gate is passed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from storage.errors import InputError
from trainer.breakdown import by_difficulty, by_joint
from trainer.config import METRIC_TITLES, METRICS, CompareConfig, MetricName
from trainer.gate import Judge, best_value, better, find_baseline, gate_document
from trainer.origins import cost, machines, origin
from trainer.pairing import Group, all_pairs, budget_differences, recipe_differences, same_truth
from trainer.runs import Runs, Scores, Selection, StudentRun, by_name, datasets_of, whole
from trainer.showcase import Case, find_cases

CURVE = "validation/pa_mpjpe_mm"
TEACHER = "teacher"

Document = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """`document` is what `handstill compare --json` prints; the rest is for the report."""

    document: Document
    curves: dict[str, dict[int | None, list[tuple[int, float]]]]
    """Student -> seed -> validation error by step."""
    pictures: dict[str, bytes]
    """Student and seed -> PNG of its answers while it learned."""
    cases: dict[str, list[Case]] = field(default_factory=dict)
    """Data set -> the samples that the students answered worst and best."""

    @property
    def passed(self) -> bool:
        return bool(self.document["gate"]["passed"])


def compare(
    tracking_uri: str, selection: Selection, config: CompareConfig | None = None, *, first_of: str | None = None
) -> Comparison:
    """Read the selected finished runs from MLflow and compare them.

    first_of: `models:/<name>@<alias>` of the winners, which as the gate's baseline may not be there yet.

    Raises:
        InputError: no student is there, or the gate names what is not there.
        WorkError: the store cannot be read.
    """
    config, runs = config or CompareConfig(), Runs(tracking_uri, selection)
    students, teachers = runs.students(), runs.teachers()
    title = ", ".join(selection.experiments)
    if not students:
        if selection.filter:
            raise InputError(
                f"experiment {title!r} has no finished student that {selection.filter!r} fits; ask for less"
            )
        raise InputError(f"experiment {title!r} has no finished student to compare; run `handstill run` first")
    groups, teacher = by_name(students), next(iter(teachers.values()), None)
    everyone: dict[str, Group] = {**groups, **({TEACHER: [teacher]} if teacher is not None else {})}
    datasets = datasets_of(students)
    where = machines([runs.evaluation(run) for run in (*students, *teachers.values())])
    summary = _by_student(groups, one_machine=len(where) <= 1)
    document: Document = {
        "experiment": title,
        "filter": selection.filter,
        "tracking_uri": tracking_uri,
        "teacher": _teacher(teacher),
        "students": [_student(runs, name, run) for name, group in groups.items() for run in group],
        "by_student": summary,
        "paired": all_pairs(runs, groups, teachers, config.bootstrap),
        "by_joint": [each for d in datasets if (each := by_joint(runs, everyone, d)) is not None],
        "by_difficulty": [each for d in datasets for each in by_difficulty(runs, everyone, teacher, d)],
        "notes": _notes(groups, teachers, datasets),
    }
    document["machines"] = where
    document["pareto"] = pareto(summary, document["teacher"])
    document["gate"] = _gate(config, runs, groups, teacher, first_of)
    return Comparison(
        document,
        curves={name: {run.seed: runs.curve(run, CURVE) for run in group} for name, group in groups.items()},
        pictures={
            label(name, run): png
            for name, group in groups.items()
            for run in group
            if (png := runs.picture(run)) is not None
        },
        cases={dataset: find_cases(runs, everyone, dataset, config.cases) for dataset in datasets},
    )


def headline(dataset: str, groups: Sequence[Document]) -> MetricName | None:
    """The first metric that some student has on a data set."""
    return next((m for m in METRICS if any(m in g["metrics"].get(dataset, {}) for g in groups)), None)


def best_of(document: Document) -> str | None:
    """Who is best in the headline metric on the first data set, and with what score; None where nobody has one."""
    for dataset in document["pareto"]:
        metric = headline(dataset, document["by_student"])
        scores = {g["name"]: g["metrics"].get(dataset, {}).get(metric) for g in document["by_student"]}
        scored = {name: value for name, value in scores.items() if value is not None}
        if metric is not None and scored:
            value = best_value(metric, list(scored.values()))
            name = next(name for name, score in scored.items() if score == value)
            title, _, unit = METRIC_TITLES[metric].partition(", ")
            return " ".join(filter(None, (name, f"{value:.4g}", unit, title)))
    return None


def pareto(groups: Sequence[Document], teacher: Document) -> dict[str, list[str]]:
    """By data set: those, the teacher among them, that nobody beats in speed and in the headline metric at once.

    `speed`: what students of one network share, as what its measurements differ by is noise (`_by_student`).
    """
    everyone = [{**teacher, "name": TEACHER}, *groups]
    found: dict[str, list[str]] = {}
    for dataset in sorted({dataset for each in groups for dataset in each["metrics"]}):
        metric = headline(dataset, groups)
        scores = [(each["name"], each["speed"], each["metrics"].get(dataset, {}).get(metric)) for each in everyone]
        points = [(name, speed, value) for name, speed, value in scores if speed and value is not None]
        found[dataset] = [
            name
            for name, speed, value in sorted(points, key=lambda point: -point[1])
            if not any(
                (faster >= speed and better(str(metric), other, value)) or (faster > speed and other == value)
                for _, faster, other in points
            )
        ]
    return found


def label(name: str, run: StudentRun) -> str:
    """A student and its seed, for a person."""
    return f"{name} (seed {run.seed})"


def _teacher(run: StudentRun | None) -> Document:
    if run is None:
        nothing: Document = {"metrics": {}, "mean_pose": {}, "latency_ms": {}}
        return nothing | dict.fromkeys(("params_m", "fps", "speed", "run_id"))
    return {
        "metrics": run.metrics,
        "mean_pose": run.mean_pose,
        "params_m": run.params_m,
        "latency_ms": run.latency_ms,
        "fps": run.fps,
        "speed": run.fps,
        "run_id": run.run_id,
        "gflop": run.numbers.get("gflop"),
        "peak_memory_mb": run.numbers.get("peak_memory_mb"),
    }


def _student(runs: Runs, name: str, run: StudentRun) -> Document:
    return {
        "name": name,
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
        "gflop": run.numbers.get("gflop"),
        "peak_memory_mb": run.numbers.get("peak_memory_mb"),
        "whole_path_ms": run.numbers.get("latency_whole_path_ms"),
        "steps": whole(run.params.get("steps")),
        "batch_size": whole(run.params.get("batch_size")),
        "cost": cost(runs, run),
        "origin": origin(run, runs.tracking_uri),
    }


def _by_student(groups: Mapping[str, Group], *, one_machine: bool) -> list[Document]:
    """Means and standard deviations over seeds; `speed`, hands a second, is the mean over all runs of the same network,
    whatever it was taught, where all were timed on one machine, else over the student's own."""
    networks: dict[tuple[object, ...], list[float]] = {}
    for run in (run for group in groups.values() for run in group):
        networks.setdefault(_network(run), []).extend([] if run.fps is None else [run.fps])
    return [
        {
            "name": name,
            "backbone": runs[0].backbone,
            "head": runs[0].params.get("head"),
            "strategy": runs[0].strategy,
            "seeds": len(runs),
            "params_m": runs[0].params_m,
            "fps": (fps := _mean([run.fps for run in runs if run.fps is not None])),
            "speed": _mean(networks.get(_network(runs[0]), [])) if one_machine else fps,
            "metrics": _over_seeds([run.metrics for run in runs], _mean),
            "std": _over_seeds([run.metrics for run in runs], _std),
        }
        for name, runs in groups.items()
    ]


def _network(run: StudentRun) -> tuple[object, ...]:
    return run.backbone, run.params.get("head"), run.params_m


def _over_seeds(
    scores: Sequence[Scores], reduce: Callable[[Sequence[float]], float | None]
) -> dict[str, dict[str, float | None]]:
    names = {d: [m for m in METRICS if any(m in s.get(d, {}) for s in scores)] for d in sorted(set().union(*scores))}
    return {d: {m: reduce([s[d][m] for s in scores if m in s.get(d, {})]) for m in names[d]} for d in names}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _notes(groups: Mapping[str, Group], teachers: Mapping[str, StudentRun], datasets: Sequence[str]) -> list[str]:
    """What a reader must know before believing that two rows are about the same thing."""
    found = []
    for name, group in groups.items():
        first, others = [group[0]], [[run] for run in group[1:]]
        mixed = sorted(
            {d for other in others for d in (*budget_differences(first, other), *recipe_differences(first, other))}
        )
        if mixed:
            found.append(f"The seeds of {name} were not trained alike: {'; '.join(mixed)}.")
    everyone = [run for group in groups.values() for run in group] + list(teachers.values())
    found += [
        f"Not all were scored on the same snapshot of {dataset}; pairs count the samples that both have."
        for dataset in datasets
        if not same_truth(everyone, dataset)
    ]
    if len({run.identity for run in teachers.values()}) > 1:
        found.append("The experiments have different teachers' scores; each student is held against its own.")
    return found


def _gate(
    config: CompareConfig, runs: Runs, groups: Mapping[str, Group], teacher: StudentRun | None, first_of: str | None
) -> Document:
    gate = config.gate
    if gate is None:
        return {"passed": True, "checks": [], "caveats": [], "sentences": []}
    baseline = find_baseline(gate, runs, groups, first_of)
    metrics, mean_pose = ({}, {}) if teacher is None else (teacher.metrics, teacher.mean_pose)
    return gate_document(Judge(gate, runs, metrics, mean_pose, baseline, config.bootstrap), groups)
