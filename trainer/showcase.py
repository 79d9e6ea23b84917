"""The samples that a person is shown: those that the students answer worst and best, with what everybody said of them.

Pictures are those that some run kept (trainer.cases); whoever has a prediction of the sample in its samples table is
drawn on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.encodings import decode_picture
from trainer.cases import Columns, paired_metric
from trainer.pairing import Group
from trainer.runs import Runs


@dataclass(frozen=True)
class Answer:
    """What one network said of a sample."""

    name: str
    error: float
    points: NDArray[np.float64] | None
    """(21,2) crop units of the students' view; None: not kept."""


@dataclass(frozen=True)
class Case:
    """One sample, to be looked at."""

    sample_id: str
    worst: bool
    """Among the worst answered, else among the best."""
    metric: str
    picture: NDArray[np.uint8]
    """(256,256,3) RGB, the students' view."""
    label: NDArray[np.float64]
    """(21,3) crop units and confidence."""
    answers: list[Answer]
    """The teacher first, then the students: the first seed of each."""


def find_cases(runs: Runs, members: Mapping[str, Group], dataset: str, worst: int) -> list[Case]:
    """The worst samples by the students' mean error, and half as many of the best. One seed a student is shown, and
    counts."""
    shown = {name: table for name, group in members.items() if (table := runs.samples(group[0], dataset)) is not None}
    students = {name: table for name, table in shown.items() if members[name][0].kind != "teacher"}
    metric = next((m for table in students.values() if (m := paired_metric(table)) is not None), None)
    if not worst or metric is None:
        return []
    errors = {name: _by_id(table, metric) for name, table in shown.items() if metric in table}
    kept = _kept(runs, members, dataset)
    means = {
        sample: float(np.mean([errors[name][sample] for name in students if name in errors]))
        for sample in kept
        if all(np.isfinite(errors[name].get(sample, np.nan)) for name in students if name in errors)
    }
    ranked = sorted(means, key=lambda sample: (-means[sample], sample))
    n_worst = min(worst, -(-2 * len(ranked) // 3))
    bad, good = ranked[:n_worst], ranked[n_worst:][-max(1, worst // 2) :][::-1]
    places = {name: _places(table) for name, table in shown.items()}
    order = sorted(errors, key=lambda name: members[name][0].kind != "teacher")  # the teacher first
    return [
        Case(
            sample_id=sample,
            worst=sample in bad,
            metric=metric,
            picture=decode_picture(kept[sample][0]),
            label=kept[sample][1],
            answers=[_answer(name, shown[name], places[name].get(sample), errors[name]) for name in order],
        )
        for sample in (*bad, *good)
    ]


def _kept(runs: Runs, members: Mapping[str, Group], dataset: str) -> dict[str, tuple[bytes, NDArray[np.float64]]]:
    """Sample -> its encoded picture and label, of all that any run kept."""
    found: dict[str, tuple[bytes, NDArray[np.float64]]] = {}
    for group in members.values():
        for run in group:
            table = runs.cases(run, dataset)
            if table is not None:
                for name, picture, points in zip(
                    table["sample_id"].tolist(), table["picture"], table["label_2d"], strict=True
                ):
                    found.setdefault(name, (picture, points.reshape(21, 3)))
    return found


def _answer(name: str, table: Columns, row: int | None, errors: Mapping[str, float]) -> Answer:
    if row is None:
        return Answer(name, float("nan"), None)
    points = table["keypoints_2d"][row].reshape(21, 2) if "keypoints_2d" in table else None
    return Answer(name, errors[str(table["sample_id"][row])], points)


def _by_id(table: Columns, metric: str) -> dict[str, float]:
    return dict(zip(table["sample_id"].tolist(), table[metric].tolist(), strict=True))


def _places(table: Columns) -> dict[str, int]:
    ids: Sequence[str] = table["sample_id"].tolist()
    return {name: row for row, name in enumerate(ids)}
