"""What each run cost, on what machine, and how to have it again: for a report that is looked at a year later."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from trainer.runs import Runs, StudentRun, whole

Document = dict[str, Any]

_CORES, _GPU = "system/process_cpu_cores", "system/gpu_0_memory_usage_megabytes"
_PAUSE = 5.0
"""A gap so many times the usual one between two looks at the machine is a pause: nothing was running."""
_LEAST_GAP_S = 30.0
COMMIT, DIRTY = "mlflow.source.git.commit", "handstill.dirty"
CONFIGURATION, COMMAND = "handstill.configuration_sha256", "handstill.command"
"""Tags of a run: the digest of its artifact configuration/pipeline.yaml, and what was typed."""


def cost(runs: Runs, run: StudentRun) -> Document:
    """Hours of training, from how often and with what result the machine was looked at; pauses and deaths between do
    not count. CPU-hours are those of the process that reported, times the workers of the student."""
    points = sorted((point.timestamp / 1000, point.value) for point in runs.history(run, _CORES))
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(points)]
    if not gaps:
        return {"hours": None, "cpu_hours": None, "gpu_hours": None}
    longest = max(_PAUSE * statistics.median(gaps), _LEAST_GAP_S)
    # a look says how many cores were busy since the one before it
    worked = [(gap, later[1]) for gap, later in zip(gaps, points[1:], strict=True) if gap <= longest]
    workers = whole(run.params.get("workers.count")) or 1
    hours = sum(gap for gap, _ in worked) / 3600
    return {
        "hours": hours,
        "cpu_hours": workers * sum(gap * cores for gap, cores in worked) / 3600,
        "gpu_hours": workers * hours if _GPU in run.numbers else 0.0,
    }


def origin(run: StudentRun, tracking_uri: str) -> Document:
    """What decided the run, and the line that makes it again. tracking_uri: where its configuration is."""
    commit = run.tags.get(COMMIT)
    return {
        "run_id": run.run_id,
        "experiment": run.experiment,
        "commit": commit,
        "dirty": run.tags.get(DIRTY) == "true",
        "version": run.tags.get("handstill.version"),
        "configuration_sha256": run.tags.get(CONFIGURATION),
        "command": run.tags.get(COMMAND),
        "identity": run.identity or None,
        "training": run.training,
        "evaluation": run.evaluated,
        "line": _line(run, commit, tracking_uri),
    }


def _line(run: StudentRun, commit: str | None, tracking_uri: str) -> str:
    """For a shell, in a clone; empty where the run does not say enough. The configuration gets a name of its own in the
    clone's root: its relative paths start there, and no file of the commit is in its way."""
    command = run.tags.get(COMMAND)
    if commit is None or command is None or CONFIGURATION not in run.tags:
        return ""
    program, option, _, *rest = shlex.split(command)
    file = f"again-{run.run_id[:8]}.yaml"
    where = f"MLFLOW_TRACKING_URI={shlex.quote(tracking_uri)}"
    fetch = f"{where} mlflow artifacts download -r {run.run_id} -a configuration -d ."
    again = shlex.join([program, option, file, *rest])
    return f"git checkout {commit} && {fetch} && mv configuration/pipeline.yaml {file} && {again}"


def digests(datasets: Mapping[str, str]) -> str:
    """`name:digest, ...` with the digests cut to what tells them apart."""
    return ", ".join(f"{name}:{digest[:12]}" for name, digest in sorted(datasets.items()))


def machines(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The devices that the speeds were measured on; more than one: speeds are not comparable."""
    return sorted({str(each["device"]) for each in evaluations if each.get("device")})
