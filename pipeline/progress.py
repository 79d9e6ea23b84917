"""Progress of long work: a bar on a terminal, plain periodic lines in a log file; both on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.events import EventTail

LINE_EVERY_S = 10.0


class StageProgress:
    """How far one stage is, in a unit a person can count (pictures, steps, sets), with rate and time left."""

    def __init__(self, stage: str, total: int, unit: str, *, quiet: bool = False) -> None:
        self._stage, self._total, self._unit = stage, total, unit
        self._done = 0.0
        self._started = self._last_line = time.monotonic()
        self._moving_since: float | None = None
        """When the first of the work was done: what came before was starting up, and says nothing about the rate."""
        self._first = 0.0
        self._bar: Progress | None = None
        self._quiet = quiet
        if sys.stderr.isatty() and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(stage, total=total, rate="")

    def __enter__(self) -> StageProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._say()

    def advance(self, count: float = 1) -> None:
        """Count some more as done."""
        self._done += count
        if self._done and self._moving_since is None:
            self._moving_since, self._first = time.monotonic(), self._done
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate())
        elif time.monotonic() - self._last_line > LINE_EVERY_S:
            self._say()

    def _per_second(self) -> float:
        """Since the first of the work was done; before there was a second piece, since the start."""
        if self._moving_since is not None and self._done > self._first:
            return (self._done - self._first) / max(time.monotonic() - self._moving_since, 1e-3)
        return self._done / max(time.monotonic() - self._started, 1e-3)

    def _rate(self) -> str:
        return f"{self._per_second():.1f} {self._unit}/s"

    def _say(self) -> None:
        self._last_line = time.monotonic()
        if self._quiet or self._total == 0:
            return
        seconds = self._last_line - self._started
        left = (self._total - self._done) / self._per_second() if self._done else float("inf")
        eta = f"{left:.0f} s left" if left != float("inf") else "time left unknown"
        done = min(round(self._done), self._total)
        print(  # noqa: T201 - a log line for a person, on stderr
            f"{self._stage}: {done}/{self._total} {self._unit}, {self._rate()}, {seconds:.0f} s, {eta}",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def views_progress(stage: str, views: int, events: Path) -> Iterator[Callable[[], None]]:
    """Progress of teachers, who note each batch in the event log; call what it gives now and then."""
    events.parent.mkdir(parents=True, exist_ok=True)
    tail = EventTail(events)
    with StageProgress(stage, views, "views") as progress:

        def follow() -> None:
            for event in tail.new():
                progress.advance(event.get("views", 0) if event["event"] == "teach_batch" else 0)
            progress.advance(0)

        yield follow
        follow()
