"""The tables of a comparison as rows of text, and those as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from trainer.config import METRIC_TITLES, METRICS, TRAINED, MetricName
from trainer.gate import best_value
from trainer.origins import digests

Document = dict[str, Any]
OTHER_MACHINES = "Speeds were measured on different machines and do not compare"
_SCORES_FROM = 5
"""The column of `scores` with the first metric."""
Rows = list[list[str]]
"""The first is the header."""


def scores(document: Document) -> Rows:
    """A line for the teacher, the mean pose and each student; means ± deviation over seeds."""
    columns = _columns(document)
    header = ["student", "strategy", "M params", "fps", "seeds", *(f"{d}: {METRIC_TITLES[m]}" for d, m in columns)]
    teacher = document["teacher"]
    lines = [["teacher", "", number(teacher["params_m"]), number(teacher["fps"]), ""]]
    lines[0] += [number(teacher["metrics"].get(d, {}).get(m)) for d, m in columns]
    if teacher["mean_pose"]:
        lines.append(
            ["mean pose", "", "", "", "", *(number(teacher["mean_pose"].get(d, {}).get(m)) for d, m in columns)]
        )
    for group in document["by_student"]:
        line = [group["name"], group["strategy"], number(group["params_m"]), number(group["fps"]), str(group["seeds"])]
        lines.append(line + [_with_std(group, d, m) for d, m in columns])
    return [header, *lines]


def best_cells(document: Document) -> set[tuple[int, int]]:
    """(row, column) of `scores` where a student has the best mean of a metric; of several equal ones all."""
    columns, groups = _columns(document), document["by_student"]
    first = 2 + bool(document["teacher"]["mean_pose"])
    found = set()
    for column, (dataset, metric) in enumerate(columns, start=_SCORES_FROM):
        values = [group["metrics"].get(dataset, {}).get(metric) for group in groups]
        known = [value for value in values if value is not None]
        if len(known) > 1:
            best = best_value(metric, known)
            found |= {(first + at, column) for at, value in enumerate(values) if value == best}
    return found


def of_one_set(document: Document) -> Rows | None:
    """`scores` with the data set's name once, where there is one only: in a print every header would begin with it."""
    sets, rows = scored_sets(document), scores(document)
    if len(sets) != 1:
        return None
    header = [title.removeprefix(f"{sets[0]}: ") for title in rows[0]]
    return [[f"{header[0]}, on {sets[0]}", *header[1:]], *rows[1:]]


def differences(paired: Sequence[Document]) -> Rows:
    """Pairs on the same samples, with both intervals and whether the budgets are equal, which the teacher has none to
    be equal to."""
    header = ["student", "against", "data set", "metric", "difference", "95% over samples", "samples",
              "95% over seeds", "seeds", "equal budget"]  # fmt: skip
    rows = [header]
    for pair in paired:
        seeds = pair["over_seeds"]
        rows.append(
            [
                *(pair[key] for key in ("student", "baseline", "dataset")),
                str(METRIC_TITLES.get(pair["metric"], pair["metric"])),
                signed(pair["difference"]),
                _spread(pair),
                str(pair["samples"]),
                "" if seeds is None else _spread(seeds),
                "" if seeds is None else str(seeds["seeds"]),
                "" if pair["baseline"] == "teacher" else "; ".join(pair["differs"]) or "yes",
            ]
        )
    return rows


def costs(students: Sequence[Document]) -> Rows:
    """What training each run took, and what the network weighs."""
    header = ["student", "seed", "steps", "batch", "hours", "CPU-hours", "GPU-hours", "GFLOP", "peak MB",
              "ms, network", "ms, photo to mesh"]  # fmt: skip
    rows = [header]
    for run in students:
        cost, latency = run["cost"], run["latency_ms"]
        smallest = latency[min(latency, key=int)] if latency else None
        rows.append(
            [
                run["name"],
                str(run["seed"]),
                *("" if run[key] is None else str(run[key]) for key in ("steps", "batch_size")),
                *(number(cost[key]) for key in ("hours", "cpu_hours", "gpu_hours")),
                *(number(each) for each in (run["gflop"], run["peak_memory_mb"], smallest, run["whole_path_ms"])),
            ]
        )
    return rows


def origins(students: Sequence[Document]) -> Rows:
    """Where each run comes from."""
    header = ["student", "seed", "commit", "configuration", "identity", "learned from", "scored on"]
    rows = [header]
    for run in students:
        origin = run["origin"]
        commit = (origin["commit"] or "")[:12] + (" and changes" if origin["dirty"] else "")
        rows.append(
            [
                run["name"],
                str(run["seed"]),
                commit or "unknown",
                (origin["configuration_sha256"] or "")[:12],
                (origin["identity"] or "")[:12],
                digests(origin["training"]),
                digests(origin["evaluation"]),
            ]
        )
    return rows


def scored_sets(document: Document) -> list[str]:
    """The data sets that somebody was scored on."""
    return sorted({d for each in (document["teacher"], *document["by_student"]) for d in each["metrics"]})


def warnings(document: Document) -> list[str]:
    """What a reader must know before believing the tables: students that an answer without looking would beat, and
    rows that are not about the same thing."""
    found = []
    for dataset, mean_pose in document["teacher"]["mean_pose"].items():
        limit = mean_pose.get("pa_mpjpe_mm")
        errors = {g["name"]: g["metrics"].get(dataset, {}).get("pa_mpjpe_mm") for g in document["by_student"]}
        worse = [name for name, error in errors.items() if limit is not None and error is not None and error >= limit]
        if worse:
            found.append(
                f"On {dataset} the mean pose ({limit:.2f} mm PA-MPJPE) is no worse than {', '.join(worse)}: they are "
                "undertrained, and differences between them say nothing about distillation."
            )
        gains = {n: 1 - e / limit for n, e in errors.items() if limit and e is not None and n not in worse}
        little = [f"{name} ({int(100 * gain)}%)" for name, gain in gains.items() if gain < TRAINED]
        if little:
            found.append(
                f"On {dataset} these are less than {TRAINED:.0%} better than the mean pose ({limit:.2f} mm PA-MPJPE): "
                f"{', '.join(little)}. They are undertrained, and differences between them say little about "
                "distillation."
            )
    unequal = sum(not pair["equal_budget"] for pair in document.get("paired", []))
    if unequal:
        found.append(f"{unequal} of the paired differences are not at equal budget; their last column says why.")
    machines = document.get("machines", [])
    if len(machines) > 1:
        found.append(f"{OTHER_MACHINES}: {'; '.join(machines)}.")
    return [*found, *document.get("notes", [])]


def number(value: float | None) -> str:
    """Three or four digits."""
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def signed(value: float | None) -> str:
    """Three digits after the point, with a sign."""
    return "" if value is None else f"{value:+.3f}"


def as_csv(rows: Rows) -> str:
    """Commas, quotes where they are needed."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def as_markdown(rows: Rows) -> str:
    """A pipe table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


_TEX = {"&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "$": r"\$", "{": r"\{", "}": r"\}", "±": r"$\pm$"}
_BASELINES = ("teacher", "mean pose")


def as_latex(rows: Rows) -> str:
    """A tabular for the booktabs package; the teacher and the mean pose apart from the students."""
    lines = [" & ".join("".join(_TEX.get(sign, sign) for sign in cell) for cell in row) + r" \\" for row in rows]
    students = next((at for at, row in enumerate(rows) if at and row[0] not in _BASELINES), len(rows))
    columns = "ll" + "r" * (len(rows[0]) - 2)
    apart = [*lines[1:students], r"\midrule"] if 1 < students < len(rows) else lines[1:students]
    body = [r"\toprule", lines[0], r"\midrule", *apart, *lines[students:], r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"]) + "\n"


def _spread(interval: Document) -> str:
    return "" if interval["low"] is None else f"{signed(interval['low'])} … {signed(interval['high'])}"


def _columns(document: Document) -> list[tuple[str, MetricName]]:
    """Data set and metric of each column of scores."""
    return [(d, m) for d in scored_sets(document) for m in METRICS if _anyone_has(document, d, m)]


def _anyone_has(document: Document, dataset: str, metric: str) -> bool:
    return any(metric in each["metrics"].get(dataset, {}) for each in (document["teacher"], *document["by_student"]))


def _with_std(group: Document, dataset: str, metric: str) -> str:
    mean, std = (group[which].get(dataset, {}).get(metric) for which in ("metrics", "std"))
    return number(mean) if std is None else f"{number(mean)} ± {number(std)}"
