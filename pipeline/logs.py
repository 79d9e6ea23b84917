"""The log on stderr: lines for a person, or JSON lines for whoever collects logs (`--log-format json`).

A JSON line has time, level, message and, as far as they are known, run, stage, node, and the shard or other unit that
it is about. Besides what the run's own process says it has what the workers note in the event log, as it comes.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.events import EventTail, told
from pipeline.repeating import repeated

LogFormat = Literal["text", "json"]
FORWARD_EVERY_S = 1.0
NOT_FORWARDED = ("teach_batch", "train_step", "train_progress", "usage", "progress")
"""Events that come by the thousand; `progress` is written by whoever counts it."""
_UNITS = {"shard_started": "shard", "shard_committed": "shard", "shard_adopted": "shard", "teacher_died": "shard"}
"""What the unit of an event is called in a JSON line."""


def set_up_logging(*, verbose: bool, log_format: LogFormat) -> None:
    """Our logger on stderr, and nowhere else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _JsonLines()
        if log_format == "json"
        else logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    )
    logger = logging.getLogger("handstill")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


def in_json() -> bool:
    """Whether stderr is to have JSON lines only."""
    return any(isinstance(handler.formatter, _JsonLines) for handler in logging.getLogger("handstill").handlers)


def write_line(text: str, **fields: Any) -> None:
    """A line on stderr that is no log record: as it is, or as JSON with these fields."""
    line = json.dumps(_stamped("INFO", text) | fields) if in_json() else text
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - stderr is for people and collectors


@contextmanager
def forwarding(events: Path) -> Iterator[None]:
    """Where JSON lines are wanted: pass on what comes into an event log meanwhile."""
    if not in_json():
        yield
        return
    tail = EventTail(events)

    def forward() -> None:
        for event in tail.new():
            if event["event"] not in NOT_FORWARDED:
                print(json.dumps(_of_event(event)), file=sys.stderr, flush=True)  # noqa: T201

    try:
        with repeated(forward, FORWARD_EVERY_S, "log"):
            yield
    finally:
        forward()


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = _stamped(record.levelname, record.getMessage(), record.created)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _stamped(level: str, message: str, time_s: float | None = None) -> dict[str, Any]:
    now = datetime.now(UTC) if time_s is None else datetime.fromtimestamp(time_s, UTC)
    return {"time": now.isoformat(timespec="milliseconds"), "level": level, "message": message, **told()}


def _of_event(event: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in event.items() if key not in ("time", "unit")}
    level = "ERROR" if event["event"] == "run_failed" else "INFO"
    line = _stamped(level, str(event["event"]), float(event["time"])) | rest
    return line | ({_UNITS.get(event["event"], "unit"): event["unit"]} if "unit" in event else {})
