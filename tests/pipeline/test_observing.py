"""What can be seen of a run from outside: JSON lines, `status` from another shell, metrics of Ray and MLflow."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.events import append_event, telling
from pipeline.ray_metrics import show_progress
from pipeline.workdir import Workdir, lease, run_of
from tests.pipeline.commands import as_json, handstill
from tests.pipeline.lab import Lab
from tests.tiny_experiment import events_of

ROOT = Path(__file__).parents[2]


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_lines_have_run_stage_shard_and_node(lab: Lab) -> None:
    lab.rewrite("beta", edits={0: 1})
    answer = handstill("run", "-c", lab.config, "--json", "--log-format", "json")
    assert answer.code == 0, answer.err
    lines = json_lines(answer.err)
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    run = answer.document["run"]
    (committed,) = [line for line in lines if line["message"] == "shard_committed"]
    assert committed["shard"] in {path.stem for path in lab.shards("beta")}
    assert (committed["run"], committed["stage"], committed["pipeline"]) == (run, "teach", "tiny")
    assert committed["node"].startswith(socket.gethostname())
    (last,) = [line for line in lines if line["message"].startswith("teach: ")]
    assert (last["done"], last["total"], last["run"]) == (4, 4, run)
    assert {"tiny: done in"} <= {line["message"][:13] for line in lines}
    assert "teach_batch" not in {line["message"] for line in lines}, "one a batch is too many"


def test_an_error_is_a_json_line_too(lab: Lab) -> None:
    answer = handstill("plan", "-c", lab.folder / "nowhere.yaml", "--log-format", "json")
    (line,) = json_lines(answer.err)
    assert (line["level"], line["exit_code"]) == ("ERROR", 2)
    assert "nowhere.yaml" in line["message"]


LIVE = """
import sys, time
from pathlib import Path
from pipeline.events import append_event, telling
from pipeline.workdir import Workdir, lease, run_of
workdir = Workdir(Path(sys.argv[1]))
with lease(workdir), telling(run=run_of(workdir), node="here"):
    append_event(workdir.events, "run_started", stages=["ingest", "teach"])
    append_event(workdir.events, "stage_started", stage="teach", todo=1, total=8)
    append_event(workdir.events, "usage", what="teach", cpu_s=1.0, gpu_s=0.0, busy_s=2.0)
    facts = {"done": 8, "total": 32, "unit_name": "views", "per_second": 0.5, "eta_s": 48.0}
    append_event(workdir.events, "progress", what="teach", **facts, utilisation={"cpu": 0.9})
    print("live", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def live(lab: Lab) -> Iterator[subprocess.Popen[str]]:
    """A run in another process that is in the middle of teach."""
    command = [sys.executable, "-c", LIVE, str(lab.workdir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "live\n"
        yield process
        process.kill()


def test_status_of_a_live_run_from_another_shell(lab: Lab, live: subprocess.Popen[str]) -> None:
    document = as_json(lab.config, "status")
    assert document["current_stage"] == "teach"
    running = document["running"]
    assert (running["pid"], running["host"]) == (live.pid, socket.gethostname())
    assert running["run"] == run_of(Workdir(lab.workdir))
    assert running["nodes"] == {"here": "teach"}
    progress = document["progress"]
    assert (progress["stage"], progress["done"], progress["total"], progress["eta_s"]) == ("teach", 8, 32, 48.0)
    assert 0 <= progress["age_s"] < 100
    text = handstill("status", "-c", lab.config).out
    assert f"at work: process {live.pid} on {socket.gethostname()}, since 20" in text
    assert "teach: 8/32 views, 0.5 views/s, 48 s left, 90% cpu (" in text
    assert text.endswith("running now: teach\n")


def test_a_killed_run_is_not_running(lab: Lab, live: subprocess.Popen[str]) -> None:
    live.kill()
    live.wait()
    document = as_json(lab.config, "status")
    assert (document["running"], document["current_stage"], document["progress"]) == (None, None, None)


def test_a_run_on_another_machine_is_believed_while_it_says_something(lab: Lab) -> None:
    workdir = Workdir(lab.workdir)
    with lease(workdir), telling(run=run_of(workdir)):
        append_event(workdir.events, "run_started", stages=["teach"])
    holder = json.loads(workdir.lease.read_text())
    workdir.lease.write_text(json.dumps(holder | {"host": "elsewhere"}))
    assert as_json(lab.config, "status")["running"]["host"] == "elsewhere"
    last = events_of(lab.config)[-1]
    with workdir.events.open("a") as log:
        log.write(json.dumps(last | {"event": "usage", "what": "driver", "time": time.time() - 3600}) + "\n")
    assert as_json(lab.config, "status")["running"] is None


def test_a_run_that_ended_is_not_running(lab: Lab) -> None:
    lab.run()
    assert as_json(lab.config, "status")["running"] is None


def test_prometheus_can_scrape_how_far_a_stage_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(address="local", num_cpus=1, include_dashboard=False, _metrics_export_port=port, log_to_driver=False)
    try:
        with telling(pipeline="tiny"):
            show_progress("teach", 8, 32, 0.5, {"cpu": 0.75})
        page = scraped(port, "handstill_utilisation")
    finally:
        ray.shutdown()
    found = {
        line.split("{")[0]: line for line in page.splitlines() if "handstill_" in line and not line.startswith("#")
    }
    values = {name.removeprefix("ray_"): float(line.rpartition(" ")[2]) for name, line in found.items()}
    assert values == {
        "handstill_done": 8,
        "handstill_total": 32,
        "handstill_rate": 0.5,
        "handstill_utilisation": 0.75,
    }
    assert all('stage="teach"' in line and 'pipeline="tiny"' in line for line in found.values())


def scraped(port: int, until: str) -> str:
    """The page of metrics, as soon as it has what is looked for."""
    page = ""
    for _ in range(240):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                page = answer.read().decode()
        except OSError:
            page = ""
        if until in page:
            return page
        time.sleep(0.5)
    raise AssertionError(f"no {until} within 120 s, pid {os.getpid()}:\n{page[-2000:]}")
