"""SIGTERM as a notice: who is interrupted, who is waited for, and that the process is gone in time."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from pipeline.stopping import ENDING_S, Notice


def test_work_that_does_not_look_is_interrupted() -> None:
    notice = Notice()
    try:
        assert not notice.give()
        assert notice.given
    finally:
        notice.forget()
    assert not notice.given


def test_work_that_looks_is_waited_for_but_once() -> None:
    notice = Notice()
    try:
        with notice.awaited():
            assert notice.give()
            assert notice.left_s() == pytest.approx(notice.within_s - ENDING_S, abs=1)
            assert not notice.give(), "the second signal interrupts"
    finally:
        notice.forget()


def test_a_short_notice_is_shared_between_work_and_end() -> None:
    notice = Notice()
    notice.within_s = 4.0
    try:
        notice.give()
        assert notice.left_s() == pytest.approx(2.0, abs=0.5)
    finally:
        notice.forget()


def test_whatever_hangs_the_process_is_gone_in_time() -> None:
    """Half a second; most of it is the interpreter's start."""
    script = """
import time
from pipeline.stopping import NOTICE
NOTICE.within_s = 0.3
NOTICE.give()
try:
    time.sleep(100)
finally:
    time.sleep(100)
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 143
    assert "stopped by SIGTERM; not everything ended in time (cluster.stop_within_s)" in done.stderr
    assert time.monotonic() - started < 30
