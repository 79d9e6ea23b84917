"""A run as a Ray job on a cluster of its own that wants a token: a head on loopback, started here."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import job_code
from pipeline.workdir import Workdir, claim_of
from storage.errors import WorkError
from tests.pipeline.commands import handstill
from tests.tiny_experiment import configure, events_of, make_experiment

ROOT = Path(__file__).parents[2]
TOKEN = "t0ken-for-tests-" + "x" * 32
PATIENCE_S = 180.0


@dataclass(frozen=True)
class Head:
    """A running head and the environment of those who may use it."""

    jobs: str
    environment: dict[str, str]

    def submit(self, config: Path, *arguments: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in self.environment.items() if key != "RAY_AUTH_TOKEN"}
        if token is not None:
            environment["RAY_AUTH_TOKEN"] = token
        line = [sys.executable, "-m", "pipeline.cli", "submit", *arguments, "-c", str(config)]
        return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)

    def follow(self, config: Path, job: str) -> subprocess.Popen[str]:
        """Somebody who follows a job and wants JSON lines."""
        line = [sys.executable, "-m", "pipeline.cli", "submit", "--follow", job, "--log-format", "json"]
        return subprocess.Popen(
            [*line, "-c", str(config)], cwd=ROOT, env=self.environment, stderr=subprocess.PIPE, text=True
        )


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="hs-ray-"))  # Ray's sockets want a short path
    port, jobs = free_port(), free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"HOME": str(folder), "OMP_NUM_THREADS": "1"}
    where = ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={port}", f"--dashboard-port={jobs}"]
    where += [f"--temp-dir={folder}", f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats"]
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2", *where],
        cwd=folder,
        # the job's working directory must win over what the nodes have
        env={key: value for key, value in environment.items() if key != "PYTHONPATH"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not listens(jobs):
            assert process.poll() is None, "the head did not start"
            assert time.monotonic() < deadline, "the head took too long"
            time.sleep(0.1)
        yield Head(f"http://127.0.0.1:{jobs}", environment)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def config(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"cluster.jobs": head.jobs, "cluster.job_python": sys.executable}
    return make_experiment(tmp_path_factory.mktemp("submit"), changes)


@pytest.fixture(scope="module")
def taught(head: Head, config: Path) -> subprocess.CompletedProcess[str]:
    return head.submit(config, "teach", "--json")


def test_a_run_works_as_a_job_and_its_log_is_followed(taught: subprocess.CompletedProcess[str], config: Path) -> None:
    assert taught.returncode == 0, taught.stderr
    document = json.loads(taught.stdout)
    assert (document["ok"], document["status"], document["exit_code"]) == (True, "SUCCEEDED", 0)
    assert "teach: 32/32 views" in taught.stderr
    assert taught.stderr.count("teach: 32/32 views") == 1, "the log is passed on once"
    assert len(list((config.parent / "work/cache").glob("*/ledger/*"))) == 8, "relative paths start where they did"


def test_a_second_job_finds_nothing_to_do(taught: subprocess.CompletedProcess[str], head: Head, config: Path) -> None:
    assert taught.returncode == 0
    shards = [event["unit"] for event in events_of(config) if event["event"] == "shard_committed"]
    again = head.submit(config, "teach")
    assert again.returncode == 0, again.stderr
    assert re.search(r"^handstill-\S+: succeeded, exit code 0$", again.stdout, re.MULTILINE)
    assert [event["unit"] for event in events_of(config) if event["event"] == "shard_committed"] == shards


def test_a_mistake_found_on_the_cluster_gives_the_runs_own_exit_code(head: Head, config: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text())
    configure(other, {"teacher.checkpoint": "no/such.ckpt"})
    answer = head.submit(other, "teach")
    assert answer.returncode == 2, answer.stderr
    assert str(tmp_path / "no/such.ckpt") in answer.stderr


def test_a_job_is_left_alone_followed_and_stopped(head: Head, config: Path) -> None:
    told = config.parent / "told.json"
    slow = "import pathlib, sys, time; t = sys.stdin.read(); time.sleep(6); pathlib.Path(sys.argv[1]).write_text(t)"
    notify = {"command": [sys.executable, "-c", slow, str(told)], "timeout_s": 30}
    configure(config, {"workdir": "slow", "train.steps": 100000, "notify": notify})
    try:
        answer = head.submit(config, "train", "--no-wait", "--json", "--log-format", "json")
    finally:
        configure(config, {"workdir": "work", "train.steps": 4, "notify!": None})
    job = json.loads(answer.stdout)["job"]
    deadline = time.monotonic() + PATIENCE_S
    log = config.parent / "slow" / "logs" / "events.jsonl"
    while not log.exists() or "train_step" not in log.read_text():
        assert time.monotonic() < deadline, "no training step in time"
        time.sleep(0.2)
    assert json.loads((config.parent / "slow" / "lease.json").read_text())["job"] == job
    with head.follow(config, job) as follower:
        assert follower.stderr is not None
        for line in follower.stderr:
            assert json.loads(line)["message"], "JSON lines and nothing else"
            if "train" in line:
                break
        follower.send_signal(signal.SIGTERM)
        assert follower.wait(60) == 143, "as SIGTERM ends every verb; the job goes on"
        assert f"submit --follow {job}" in follower.stderr.read()

    stopped = head.submit(config, "--stop", job)
    assert (stopped.returncode, stopped.stdout) == (0, f"{job}: stopping\n")
    followed = head.submit(config, "--follow", job, "--json")
    assert followed.returncode == json.loads(followed.stdout)["exit_code"] == 143
    assert "stopped by SIGTERM; what is finished is kept" in followed.stderr
    summary = json.loads(told.read_text())  # Ray's own patience is three seconds, then it kills
    assert (summary["failure"]["kind"], summary["config"]) == ("stopped", str(config))
    assert head.submit(config, "--stop", job).stdout == f"{job}: had ended already\n"


def test_without_the_token_nothing_is_submitted(head: Head, config: Path) -> None:
    for token in (None, "another-token-" + "y" * 32):
        answer = head.submit(config, "teach", token=token)
        assert answer.returncode == 1
        assert "cluster.jobs: cannot use the Ray job server" in answer.stderr
        assert "Traceback" not in answer.stderr
        assert TOKEN not in answer.stderr


def test_a_job_that_is_not_known(head: Head, config: Path) -> None:
    answer = head.submit(config, "--follow", "no-such-job")
    assert answer.returncode == 2
    assert "knows no job 'no-such-job'; its jobs: " in answer.stderr


@pytest.mark.parametrize("more", [["train"], ["--limit", "2"], ["--no-wait"]])
@pytest.mark.parametrize("option", ["--follow", "--stop"])
def test_what_makes_a_job_is_not_for_one_that_is_there(config: Path, option: str, more: list[str]) -> None:
    answer = handstill("submit", option, "some-job", *more, "-c", config)
    assert answer.code == 2
    assert f"{option} is for a job that was submitted already: leave out STAGE" in answer.err


def test_no_job_server(head: Head, config: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text())
    configure(other, {"cluster.jobs": f"http://127.0.0.1:{free_port()}"})
    answer = head.submit(other, "teach")
    assert answer.returncode == 1
    assert "cannot use the Ray job server" in answer.stderr


def test_a_worker_with_other_code_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(job_code.JOB_CODE, job_code.code_digest())
    job_code.check_job_code()
    monkeypatch.setenv(job_code.JOB_CODE, "0" * 64)
    with pytest.raises(WorkError, match=r"imports models, pipeline, .* not the code that was submitted"):
        job_code.check_job_code()
    workdir = Workdir(tmp_path)
    with pytest.raises(WorkError, match="not the code that was submitted"), claim_of(workdir).held():
        pass


def test_the_digest_is_of_names_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in job_code.PACKAGES:
        (tmp_path / package).mkdir()
    monkeypatch.setattr(job_code, "ROOT", tmp_path)
    seen = set()
    for name, content in [("a.py", "1"), ("a.py", "2"), ("b.py", "2")]:
        (tmp_path / "models" / name).write_text(content)
        job_code.code_digest.cache_clear()
        seen.add(job_code.code_digest())
    job_code.code_digest.cache_clear()
    assert len(seen) == 3
