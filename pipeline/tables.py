"""What the commands print for a person: plans, results and states as plain tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.experiment import Experiment
from pipeline.plan import StagePlan, StageResult

WHY_LINES = 12


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned: text to the left, numbers to the right."""
    cells = [[str(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    numeric = [all(isinstance(row[i], int | float) for row in rows) and bool(rows) for i in range(len(header))]

    def line(values: Sequence[str]) -> str:
        parts = [
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(list(header)), line(["-" * width for width in widths]), *(line(row) for row in cells)])


def plan_text(plans: Mapping[str, StagePlan]) -> str:
    """`handstill plan`: one line a stage, then why."""
    rows = [
        [
            name,
            plan.todo,
            plan.total,
            plan.unit,
            ", ".join(f"{count} {reason}" for reason, count in plan.reasons.items()),
            human_bytes(plan.bytes) if plan.bytes else "",
            f"{plan.teacher_passes:,}" if plan.teacher_passes else "",
            f"{plan.gpu_hours:.2g}" if plan.gpu_hours and plan.on_gpu else "",
        ]
        for name, plan in plans.items()
    ]
    header = ["stage", "to do", "of", "unit", "reasons", "writes about", "teacher passes", "GPU-hours"]
    lines = [table(header, rows)]
    if any(plan.estimated for plan in plans.values()):
        lines.append("Something upstream is not done yet: the later numbers are estimates.")
    if any(plan.gpu_hours and not plan.on_gpu for plan in plans.values()):
        hours = sum(plan.gpu_hours for plan in plans.values())
        lines.append(
            f"The teacher gets no GPU here: {hours:.2g} hours of an H200 take CPUs about a thousand times as long."
        )
    for name, plan in plans.items():
        lines += _why(name, plan)
    if not any(plan.todo or plan.reasons for plan in plans.values()):
        lines.append("Nothing to do.")
    return "\n".join(lines)


def _why(name: str, plan: StagePlan) -> list[str]:
    if not plan.why:
        return []
    more = [f"  ... and {len(plan.why) - WHY_LINES} more"] if len(plan.why) > WHY_LINES else []
    return [f"{name}:", *(f"  {line}" for line in plan.why[:WHY_LINES]), *more]


def run_text(experiment: Experiment, results: Mapping[str, StageResult]) -> str:
    """`handstill run`: what each stage did, the comparison table, and where things are."""
    rows = [
        [
            name,
            result.done,
            result.skipped,
            result.samples_in or "",
            result.samples_done or "",
            result.quarantined if result.samples_in else "",
            f"{result.seconds:.1f}",
        ]
        for name, result in results.items()
    ]
    lines = [table(["stage", "done", "skipped", "samples in", "samples done", "quarantined", "seconds"], rows)]
    comparison = experiment.workdir.report / "table.md"
    if "compare" in results and comparison.is_file():
        lines += ["", comparison.read_text(encoding="utf-8").rstrip(), ""]
        lines += where_things_are(experiment)
    return "\n".join(lines)


def where_things_are(experiment: Experiment) -> list[str]:
    """The paths that a person looks at next."""
    from pipeline.tracking import tracking_target

    uri = tracking_target(experiment.config.tracking, experiment.workdir).uri
    return [
        f"report:        {experiment.workdir.report / 'report.html'}",
        f"pictures:      {experiment.workdir.students}/*/seed-*/*/pictures.png",
        f"MLflow store:  {uri}   (mlflow ui --backend-store-uri {uri})",
    ]


def status_text(document: Mapping[str, Any]) -> str:
    """`handstill status`."""
    rows = [
        [name, state["done"], state["total"], state["stale"], state["quarantined"], state["last_error"] or ""]
        for name, state in document["stages"].items()
    ]
    now = "\n".join(_running_lines(document))
    why = [f"left out at ingest: {count} {reason}" for reason, count in document["left_out_at_ingest"].items()]
    if left := document["undelivered_records"]:
        why.append(f"{left} records are not in MLflow yet: the next run delivers them")
    head = ["stage", "done", "total", "stale", "quarantined", "last error"]
    return "\n".join([table(head, rows), *why, now])


def _running_lines(document: Mapping[str, Any]) -> Iterator[str]:
    """Who is at work, at what, and how far."""
    running, progress = document["running"], document["progress"]
    if running is None:
        yield "nothing is running"
        return
    if running["pid"] is not None:
        job = f" (job {running['job']})" if running["job"] else ""
        yield f"at work: process {running['pid']} on {running['host']}{job}, since {running['since']}"
    if progress is not None:
        rate, left = progress["per_second"], progress["eta_s"]
        speed = "" if rate is None else f", {rate:g} {progress['unit_name']}/s"
        ending = "" if left is None else f", {left:.0f} s left"
        used = "".join(f", {share:.0%} {name}" for name, share in progress["utilisation"].items())
        count = f"{progress['done']}/{progress['total']} {progress['unit_name']}"
        yield f"{progress['stage']}: {count}{speed}{ending}{used} ({progress['age_s']:.0f} s ago)"
    yield f"running now: {document['current_stage'] or 'between stages'}"


def human_bytes(count: float) -> str:
    """Bytes for a person: 81.9 kB, 2.7 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def bytes_below(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
    return sum(item.stat().st_size for item in files)
