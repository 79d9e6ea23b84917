"""Leave without the destructors of native libraries, once Python's own exit handlers have run.

Ray 2.60 leaves a thread that exports metrics for every cluster the process was connected to. At the end it logs that
nobody listens, with a logger that is destroyed by then: SIGSEGV after pytest's summary, once in a few runs.
"""

from __future__ import annotations

import atexit
import os
import sys

import pytest

_status = [1]


def pytest_sessionfinish(exitstatus: int | pytest.ExitCode) -> None:
    _status[0] = int(exitstatus)


@atexit.register  # before all others that the tests register, so it is called after them
def _leave() -> None:
    raised = hasattr(sys, "last_value")  # while pytest was cleaning up
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if raised else _status[0])
