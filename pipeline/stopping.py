"""SIGTERM is a notice: what can be finished in time is, and the process is gone within it, whatever hangs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

WITHIN_S = 25.0
"""Until a configuration says otherwise (cluster.stop_within_s)."""
ENDING_S = 10.0
"""Of that time for the end itself: Ray's processes, MLflow's spool, our own clearing up. Measured: 2 to 6 s on two busy
cores."""


class Notice:
    """Whether SIGTERM came, and how much of its time is left."""

    def __init__(self) -> None:
        self.within_s = WITHIN_S
        self._given_at: float | None = None
        self._awaited = 0
        self._timer: threading.Timer | None = None

    @property
    def given(self) -> bool:
        return self._given_at is not None

    def give(self) -> bool:
        """SIGTERM came. Returns whether the work at hand ends itself; if not, interrupt it.

        The same signal a second time interrupts it in any case.
        """
        if self._given_at is not None:
            return False
        self._given_at = time.monotonic()
        self._timer = threading.Timer(self.within_s, _leave)
        self._timer.daemon = True
        self._timer.start()
        return self._awaited > 0

    def left_s(self) -> float:
        """Seconds that work may still take."""
        assert self._given_at is not None
        return self._given_at + max(self.within_s - ENDING_S, self.within_s / 2) - time.monotonic()

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Around work that looks at `given` every second and ends itself."""
        self._awaited += 1
        try:
            yield
        finally:
            self._awaited -= 1

    def forget(self) -> None:
        """The command is over."""
        if self._timer is not None:
            self._timer.cancel()
        self._given_at = self._timer = None


NOTICE = Notice()
"""Of this process: signals are a process's, so there is one."""


def _leave() -> NoReturn:
    """The time is over. What is published stays, what is not is swept by the next run, as after SIGKILL."""
    print(  # noqa: T201 - the last words on stderr
        "handstill: stopped by SIGTERM; not everything ended in time (cluster.stop_within_s), what is finished is "
        "kept, the same command goes on from there",
        file=sys.stderr,
        flush=True,
    )
    os._exit(128 + signal.SIGTERM)
