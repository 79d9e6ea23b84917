"""One run at a time in a workdir; a run that is gone holds nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.commands import as_json, handstill
from tests.pipeline.lab import NO_WORK, Lab

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.workdir import Workdir, lease
with lease(Workdir(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def holder(lab: Lab) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the workdir."""
    command = [sys.executable, "-c", HOLDER, str(lab.workdir)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("command", [["run"], ["verify"]], ids=" ".join)
def test_a_held_workdir_refuses_others_and_names_the_holder(
    lab: Lab, holder: subprocess.Popen[str], command: list[str]
) -> None:
    answer = handstill(*command, "-c", lab.config, "--json")
    assert answer.code == 1
    assert answer.document["ok"] is False
    assert f"process {holder.pid} on {socket.gethostname()}, since 20" in answer.err
    assert str(lab.workdir) in answer.err
    assert "Traceback" not in answer.err


def test_what_only_reads_works_beside_a_run(lab: Lab, holder: subprocess.Popen[str]) -> None:
    assert as_json(lab.config, "plan")["stages"]["train"]["todo"] == 0
    assert as_json(lab.config, "status")["stages"]["train"]["done"] == 2
    assert as_json(lab.config, "show", "teach")["outputs"]


def test_a_killed_holder_does_not_block(lab: Lab, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((lab.workdir / "lease.json").read_text())["pid"] == holder.pid
    assert lab.run() == NO_WORK
    assert json.loads((lab.workdir / "lease.json").read_text())["pid"] == os.getpid()
