"""SIGKILL at every single change that teaching makes to the disk; the run after it ends with the very same bytes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from tests.stages.teaching import contents, run, write_data

CHANGES = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that the kernel has: only time is spared by not waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def in_child(work: Callable[[], object], folder: Path, kill_at: int) -> int:
    """Fork, do the work, and die by SIGKILL right before change number `kill_at` below `folder`.

    Returns how many changes were made in all, or -1 when the child was killed.
    """
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (writes or event in CHANGES) and str(arguments[0]).startswith(str(folder)):
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(watch)
        try:
            work()
            os.write(writable, str(count).encode())
        finally:
            os._exit(0)
    os.close(writable)
    _, status = os.waitpid(child, 0)
    with os.fdopen(readable) as answer:
        text = answer.read()
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return -1
    assert text, "the child failed"
    return int(text)


def resumed_equals_undisturbed(tmp_path: Path, table: pa.Table, stride: int) -> None:
    undisturbed = contents(run(tmp_path, tmp_path / "calm", table).root)
    changes = in_child(lambda: run(tmp_path, tmp_path / "count", table), tmp_path / "count", -1)
    assert changes > 150
    for kill_at in range(0, changes, stride):
        parent = tmp_path / f"killed-{kill_at}"
        assert in_child(lambda: run(tmp_path, parent, table), parent, kill_at) == -1  # noqa: B023  called at once
        assert contents(run(tmp_path, parent, table).root) == undisturbed, kill_at


def test_killed_and_resumed_is_undisturbed(tmp_path: Path) -> None:
    resumed_equals_undisturbed(tmp_path, write_data(tmp_path), stride=23)


@pytest.mark.slow
def test_killed_at_every_change(tmp_path: Path) -> None:
    resumed_equals_undisturbed(tmp_path, write_data(tmp_path), stride=1)


def test_killed_again_and_again(tmp_path: Path) -> None:
    """Each attempt lives a little longer than the last; what they leave adds up to the undisturbed cache."""
    table = write_data(tmp_path)
    undisturbed = contents(run(tmp_path, tmp_path / "calm", table).root)
    parent = tmp_path / "killed"
    kill_at = 5
    while in_child(lambda: run(tmp_path, parent, table), parent, kill_at) == -1:
        kill_at += 37
    (root,) = parent.iterdir()
    assert contents(root) == undisturbed
