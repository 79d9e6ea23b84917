"""What a stage has to do, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.changes import Change
from pipeline.experiment import Experiment

Reason = Literal["new", "changed", "removed", "damaged"]


@dataclass(frozen=True)
class StagePlan:
    """The state of one stage: how much there is, how much of it is to be done, and why."""

    total: int
    """Units there should be: sources, shards, students, evaluations."""
    todo: int
    """Units to compute."""
    unit: str
    """What a unit is called."""
    reasons: dict[Reason, int] = field(default_factory=dict)
    """How many units are to be done (or, if removed, forgotten) for each reason."""
    bytes: int = 0
    """Bytes that the work will write, estimated."""
    teacher_passes: int = 0
    gpu_hours: float = 0.0
    """Estimated accelerator time, from the network's size; see `teaching.PASSES_PER_GPU_SECOND`."""
    why: tuple[str, ...] = ()
    """One line a cause, for a person."""
    work: tuple[dict[str, Any], ...] = ()
    """`unit` and `reason` of each unit that is to be done, and whatever else tells which it is."""
    changes: tuple[Change, ...] = ()
    """Keys that differ from the nearest output that is there."""
    units: tuple[Any, ...] = ()
    """What `run` works on; private to the stage."""
    estimated: bool = False
    """Something upstream is not done, so the numbers may change when it is."""
    on_gpu: bool = True
    """Whether what gpu_hours are estimated for is there; if not, CPUs do the work and take much longer."""

    def as_json(self) -> dict[str, Any]:
        """The `plan --json` entry of this stage (DESIGN section 7)."""
        reasons: tuple[Reason, ...] = ("new", "changed", "removed", "damaged")
        return {
            "total": self.total,
            "todo": self.todo,
            "unit": self.unit,
            "reasons": {reason: self.reasons.get(reason, 0) for reason in reasons},
            "bytes": self.bytes,
            "teacher_passes": self.teacher_passes,
            "gpu_hours": float(f"{self.gpu_hours:.3g}"),
            "why": list(self.why),
            "work": list(self.work),
            "changes": [change.as_json() for change in self.changes],
            "estimated": self.estimated,
            "on_gpu": self.on_gpu,
        }


@dataclass(frozen=True)
class StageResult:
    """What one stage did in one run."""

    done: int
    skipped: int
    samples_in: int = 0
    samples_done: int = 0
    quarantined: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The `run --json` entry of this stage (DESIGN section 7)."""
        return {
            "done": self.done,
            "skipped": self.skipped,
            "samples_in": self.samples_in,
            "samples_done": self.samples_done,
            "quarantined": self.quarantined,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Stage:
    """A stage is data that names two plain functions."""

    name: str
    plan: Callable[[Experiment], StagePlan]
    """Reads only; cheap enough for a run that finds nothing to do."""
    run: Callable[[Experiment, StagePlan], StageResult]
    """Does what the plan says; called also when nothing is to do, to count what is there."""


def count_reasons(reasons: list[Reason]) -> dict[Reason, int]:
    """How often each reason occurs."""
    return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
