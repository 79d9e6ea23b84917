"""The event log: one JSON line an event, appended by every process, read by `status`, progress bars and tests."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TOLD: dict[str, Any] = {}
"""What this process says of itself with every event: run, stage, node."""


@contextmanager
def telling(**fields: Any) -> Iterator[None]:
    """Inside, every event of this process has these fields too."""
    before = dict(_TOLD)
    _TOLD.update(fields)
    try:
        yield
    finally:
        _TOLD.clear()
        _TOLD.update(before)


def told() -> dict[str, Any]:
    """What every event of this process says; to be handed on to those that work for it."""
    return dict(_TOLD)


def append_event(path: Path, event: str, **fields: Any) -> None:
    """Append one line; a line this short is written whole or not at all (O_APPEND)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"time": round(time.time(), 3), "pid": os.getpid(), "event": event}
    line = json.dumps(about | _TOLD | fields) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


class EventTail:
    """Reads what was appended since it last looked."""

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self._path = path
        self._offset = 0 if from_start or not path.exists() else path.stat().st_size

    def new(self) -> Iterator[dict[str, Any]]:
        """The complete lines that came since the last call; a line that a crash tore is left out."""
        if not self._path.exists():
            return
        with self._path.open("rb") as handle:
            handle.seek(self._offset)
            data = handle.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue
