"""Progress of long work: a bar on a terminal, periodic lines in a log, and numbers for whoever looks from outside.

From outside look `handstill status` (the event log), Prometheus (metrics of Ray) and MLflow (the pipeline's run).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline.events import EventTail, append_event
from pipeline.logs import in_json, write_line
from pipeline.ray_metrics import capacity, show_progress

LINE_EVERY_S = 10.0
_BEGINNINGS = ("teacher_ready", "shard_started", "train_started", "evaluate_started")
"""Events that say that starting up is over: the first of them starts the clock of the rate."""


class StageProgress:
    """How far one stage is, in a unit a person can count (pictures, steps, sets), with rate and time left."""

    def __init__(self, stage: str, total: int, unit: str, *, quiet: bool = False, events: Path | None = None) -> None:
        """events: the event log of a run, for those who look from outside."""
        self._stage, self._total, self._unit, self._events = stage, total, unit, events
        self._done = 0.0
        self._started = self._last_line = time.monotonic()
        self._moving_since: float | None = None
        """When the work itself began, or the first of it was done: what came before was starting up."""
        self._first = 0.0
        self._used = {"CPU": 0.0, "GPU": 0.0}
        """Seconds that workers used or held, by their own notes."""
        self._bar: Progress | None = None
        self._quiet = quiet
        if sys.stderr.isatty() and not quiet and not in_json():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(stage, total=total, rate="", left="")

    def __enter__(self) -> StageProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            self._say(ended=True)

    def begin(self) -> None:
        """Starting up is over; the first call counts."""
        if self._moving_since is None:
            self._moving_since = time.monotonic()

    def note(self, event: Mapping[str, Any]) -> None:
        """An event of the stage's workers: that they began, or what they used."""
        if event["event"] in _BEGINNINGS:
            self.begin()
        elif event["event"] == "usage":
            self._used["CPU"] += event["cpu_s"]
            self._used["GPU"] += event["gpu_s"]

    def advance(self, count: float = 1) -> None:
        """Count some more as done."""
        self._done += count
        if self._done and self._moving_since is None:
            self._moving_since, self._first = time.monotonic(), self._done
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate_text(), left=self._left_text())
        if time.monotonic() - self._last_line > LINE_EVERY_S:
            self._say()

    def _per_second(self, *, ended: bool = False) -> float | None:
        """Since the work began; None before anything can be said. ended: then at least over all the time there was."""
        if self._moving_since is not None and self._done > self._first:
            return (self._done - self._first) / max(time.monotonic() - self._moving_since, 1e-3)
        return self._done / max(time.monotonic() - self._started, 1e-3) if ended else None

    def _rate_text(self, *, ended: bool = False) -> str:
        rate = self._per_second(ended=ended)
        if rate is None:
            return "starting"
        return f"{rate:.1f} {self._unit}/s" if rate >= 0.1 else f"{rate * 60:.1f} {self._unit}/min"

    def _left_s(self, *, ended: bool = False) -> float | None:
        rate = self._per_second(ended=ended)
        return max(0.0, self._total - self._done) / rate if rate else None

    def _left_text(self, *, ended: bool = False) -> str:
        left = self._left_s(ended=ended)
        return "time left unknown" if left is None else f"{left:.0f} s left"

    def _utilisation(self) -> dict[str, float]:
        """Share of the cluster's core and GPU seconds so far that workers used or held; what they have noted."""
        seconds = max(time.monotonic() - self._started, 1e-3)
        there = capacity() if any(self._used.values()) else {}
        return {
            name.lower(): round(min(1.0, self._used[name] / (count * seconds)), 3)
            for name, count in there.items()
            if count
        }

    def _say(self, *, ended: bool = False) -> None:
        self._last_line = time.monotonic()
        if self._quiet or self._total == 0:
            return
        done, seconds = min(round(self._done), self._total), self._last_line - self._started
        rate, left, utilisation = self._per_second(ended=ended), self._left_s(ended=ended), self._utilisation()
        facts: dict[str, Any] = {
            "done": done,
            "total": self._total,
            "unit_name": self._unit,
            "per_second": None if rate is None else round(rate, 3),
            "eta_s": None if left is None else round(left, 1),
            "utilisation": utilisation,
        }
        if self._bar is None:
            shares = "".join(f", {share:.0%} {name}" for name, share in utilisation.items())
            write_line(
                f"{self._stage}: {done}/{self._total} {self._unit}, {self._rate_text(ended=ended)}, {seconds:.0f} s, "
                f"{self._left_text(ended=ended)}{shares}",
                **facts,
                stage=self._stage,
            )
        if self._events is not None:
            append_event(self._events, "progress", what=self._stage, **facts)
            show_progress(self._stage, done, self._total, rate, utilisation)
            _tell_mlflow(self._stage, facts)


def _tell_mlflow(stage: str, facts: Mapping[str, Any]) -> None:
    run_log = sys.modules.get("pipeline.run_log")  # whoever began a run of MLflow has imported it, and mlflow
    run = None if run_log is None else run_log.current_run()
    if run is not None:
        values = {"done": facts["done"], "per_second": facts["per_second"], "eta_s": facts["eta_s"]}
        values |= {f"utilisation_{name}": share for name, share in facts["utilisation"].items()}
        named = {f"live/{stage}/{key}": value for key, value in values.items() if value is not None}
        run.metrics(named, run.age_s)


@contextmanager
def views_progress(stage: str, views: int, events: Path) -> Iterator[Callable[[], None]]:
    """Progress of teachers, who note each batch in the event log; call what it gives now and then."""
    events.parent.mkdir(parents=True, exist_ok=True)
    tail = EventTail(events)
    with StageProgress(stage, views, "views", events=events) as progress:

        def follow() -> None:
            views = 0
            for event in tail.new():
                progress.note(event)
                views += event.get("views", 0) if event["event"] == "teach_batch" else 0
            progress.advance(views)

        yield follow
        follow()
