"""One run at a time in a workdir, and no worker of another one."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import pytest

from pipeline.workdir import Workdir, claim_of, lease, sweep_leftovers
from storage.durable import partial_path
from storage.errors import InputError, WorkError

SOON_S = 0.3


@pytest.fixture
def workdir(tmp_path: Path) -> Workdir:
    return Workdir(tmp_path / "work")


def test_a_second_run_is_told_who_holds_the_workdir(workdir: Workdir) -> None:
    with lease(workdir), pytest.raises(WorkError, match=f"process {os.getpid()} on "), lease(workdir):
        pass
    with lease(workdir):
        pass


def test_a_run_waits_for_a_worker_of_the_run_before(workdir: Workdir) -> None:
    with lease(workdir):
        claim = pickle.loads(pickle.dumps(claim_of(workdir)))  # noqa: S301 - as Ray sends it
    worker = claim.held()
    worker.__enter__()
    ends = threading.Timer(SOON_S, worker.__exit__, (None, None, None))
    started = time.monotonic()
    ends.start()
    with lease(workdir):
        assert time.monotonic() - started >= SOON_S
    ends.join()


def test_a_run_does_not_wait_for_ever(workdir: Workdir) -> None:
    with lease(workdir):
        claim = claim_of(workdir)
    with claim.held(), pytest.raises(WorkError, match=r"workers\.lock after 0 s\. Stop it"), lease(workdir, 0):
        pass


def test_a_worker_that_dies_lets_the_next_run_in(workdir: Workdir) -> None:
    with lease(workdir):
        claim = claim_of(workdir)
    said, says = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        with claim.held():
            says.send("holding")
            time.sleep(60)
        os._exit(0)
    assert said.recv() == "holding"
    with pytest.raises(WorkError), lease(workdir, 0):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with lease(workdir, 0):
        pass


def test_a_worker_of_a_run_that_is_over_is_refused(workdir: Workdir) -> None:
    """It was sent to a worker before its run was killed, and begins only now."""
    with lease(workdir):
        late = claim_of(workdir)
    with lease(workdir):
        with claim_of(workdir).held():
            pass
        with pytest.raises(WorkError, match="this worker's run is over"), late.held():
            pass


def test_the_workers_of_one_run_work_side_by_side(workdir: Workdir) -> None:
    with lease(workdir), claim_of(workdir).held(), claim_of(workdir).held():
        pass


def test_a_workdir_that_cannot_be_written_to_is_the_users_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with (
        pytest.raises(InputError, match=r"cannot write to .*file/work: Not a directory"),
        lease(Workdir(tmp_path / "file" / "work")),
    ):
        pass


def test_what_killed_runs_were_writing_is_removed_and_nothing_else(workdir: Workdir) -> None:
    finals = [
        workdir.tracking_database,
        workdir.state / "sources.json",
        workdir.report / "report.html",
        workdir.manifests / "alpha" / "ab.parquet",
        workdir.students / "plain" / "seed-0" / "cd" / "result.json",
        workdir.evaluations / "teacher" / "ef" / "val" / "samples.parquet",
    ]
    for final in finals:
        final.parent.mkdir(parents=True, exist_ok=True)
        final.write_text("whole")
        partial_path(final).write_text("half")
        nested = partial_path(final)
        nested.mkdir()
        partial_path(nested / "inside").write_text("half")
    sweep_leftovers(workdir)
    assert sorted(path for path in workdir.root.rglob("*") if path.is_file()) == sorted(finals)
