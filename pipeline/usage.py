"""What work costs: each worker notes in the event log what it used, now and then and at its end; a run adds it up.

Processor time is what the process really used. A GPU counts while it is held by work, used or not, because nobody else
has it meanwhile. What a killed process used since its last note is lost.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.events import append_event
from pipeline.repeating import repeated

NOTE_EVERY_S = 30.0
"""So much of a killed worker's cost may be missing; a line of 150 bytes."""
SECONDS_AN_HOUR = 3600.0


def processor_seconds() -> float:
    """What this process and those of its children that have ended used of the processors so far."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


@contextmanager
def metered(events: Path | None, what: str, *, gpus: float = 0.0) -> Iterator[None]:
    """Around work in a process of its own: notes what it costs. None: nobody wants to know.

    what: which kind of work. gpus: how many it holds.
    """
    if events is None:
        yield
        return
    meter = _Meter(events, what, gpus)
    try:
        with repeated(meter.note, NOTE_EVERY_S, "usage"):
            yield
    finally:
        meter.note()


class _Meter:
    def __init__(self, events: Path, what: str, gpus: float) -> None:
        self._events, self._what, self._gpus = events, what, gpus
        self._cpu_s, self._at = processor_seconds(), time.monotonic()

    def note(self) -> None:
        """What was used since the last note."""
        cpu_s, at = processor_seconds(), time.monotonic()
        used = {"cpu_s": cpu_s - self._cpu_s, "gpu_s": self._gpus * (at - self._at), "busy_s": at - self._at}
        self._cpu_s, self._at = cpu_s, at
        with suppress(OSError):  # a full disk fails the work where it matters, not here
            rounded = {key: round(value, 3) for key, value in used.items()}
            append_event(self._events, "usage", what=self._what, **rounded)


@dataclass
class Cost:
    """What some work took."""

    cpu_s: float = 0.0
    gpu_s: float = 0.0
    bytes_written: int = 0

    def as_json(self) -> dict[str, float | int]:
        """Hours, as bills have them."""
        return {
            "cpu_hours": _three_digits(self.cpu_s / SECONDS_AN_HOUR),
            "gpu_hours": _three_digits(self.gpu_s / SECONDS_AN_HOUR),
            "bytes_written": self.bytes_written,
        }


def costs_by_stage(events: Iterable[Mapping[str, Any]]) -> dict[str, Cost]:
    """What the events of one run say each stage took, and wrote."""
    found: dict[str, Cost] = {}
    for event in events:
        stage = event.get("stage")
        if not isinstance(stage, str):
            continue
        cost = found.setdefault(stage, Cost())
        if event["event"] == "usage":
            cost.cpu_s += event["cpu_s"]
            cost.gpu_s += event["gpu_s"]
        cost.bytes_written += event.get("bytes", 0)
    return found


def total_cost(costs: Iterable[Cost]) -> Cost:
    """All of it together."""
    listed = list(costs)
    return Cost(
        sum(cost.cpu_s for cost in listed),
        sum(cost.gpu_s for cost in listed),
        sum(cost.bytes_written for cost in listed),
    )


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")
