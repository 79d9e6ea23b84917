"""What a run tells its operator at its end, wherever it tells it; and whom it tells."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from pipeline.config import NotifyConfig
from pipeline.notifying import URL_VARIABLE, notify
from tests.pipeline.commands import as_json, handstill
from tests.pipeline.lab import Lab
from tests.tars import write_tar
from tests.tiny_experiment import hand_members, tar_path

FAILED = {"outcome": "failure", "text": "the disk is full"}
KEEPS = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"


def add_a_bad_hand(lab: Lab) -> None:
    """beta gets a fifth hand, whose picture cannot be read."""
    members: dict[str, bytes] = {}
    for number in range(5):
        members |= hand_members(f"00{number:04d}", [ord(c) for c in "beta"] + [number])
    members["000004.jpg"] = b"no picture"
    write_tar(tar_path(lab.folder, "beta"), members)


def test_a_run_says_what_changed_what_was_computed_and_left_out_and_what_it_cost(lab: Lab) -> None:
    add_a_bad_hand(lab)
    answer = handstill("run", "-c", lab.config, "--json")
    assert answer.code == 0, answer.err
    document = answer.document
    assert document["ok"] is True
    assert (document["outcome"], document["failure"], document["nothing_to_do"]) == ("success", None, False)
    assert document["changed"]["ingest"]["reasons"] == {"changed": 1}
    assert document["changed"]["teach"]["reasons"]["changed"] == 2
    assert list(document["changed"]) == ["ingest", "teach", "train", "evaluate", "compare"]
    assert document["quarantined"]["total"] == document["quarantined"]["new"] == 1
    (sample,) = document["quarantined"]["samples"]
    assert sample["sample_id"] == "beta:000004#0"
    assert document["quarantined"]["reasons"] == {sample["reason"].partition(":")[0]: 1}
    teach = document["stages"]["teach"]
    shards = lab.shards("beta")
    assert teach["done"] == 2
    written = sorted(sum(file.stat().st_size for file in shard.rglob("*") if file.is_file()) for shard in shards)
    assert teach["bytes_written"] in {sum(written[i] for i in pair) for pair in _pairs(len(written))}
    assert document["cost"]["bytes_written"] == sum(stage["bytes_written"] for stage in document["stages"].values())
    assert document["cost"]["cpu_hours"] > 0
    assert document["cost"]["gpu_hours"] == 0, "there is none here"
    assert 0 < document["cost"]["wall_s"] < 600
    for line in document["text"].splitlines():
        assert line in answer.err, "the log has it"
    kept = json.loads((lab.workdir / "summary.json").read_text())
    assert kept == {key: value for key, value in document.items() if key != "ok"}
    of_all_runs = [json.loads(path.read_text())["run"] for path in (lab.workdir / "summaries").iterdir()]
    assert of_all_runs.count(kept["run"]) == 1


def _pairs(count: int) -> Iterator[tuple[int, int]]:
    yield from ((a, b) for a in range(count) for b in range(a + 1, count))


def client_of(lab: Lab) -> MlflowClient:
    return MlflowClient(f"sqlite:///{lab.workdir / 'mlflow.db'}")


def pipeline_runs(lab: Lab) -> list[Run]:
    """The runs of MLflow that are about whole runs of the pipeline, the youngest first."""
    client = client_of(lab)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], "tags.`handstill.kind` = 'pipeline'"))


def test_mlflow_has_the_summary_on_the_pipelines_run(lab: Lab) -> None:
    lab.rewrite("beta", edits={0: 1})
    document = as_json(lab.config, "run", "teach")
    run = pipeline_runs(lab)[0]
    assert run.data.tags["handstill.stages"] == "ingest,teach"
    assert run.data.metrics["teach/done"] == 1
    assert run.data.metrics["teach/bytes_written"] == document["stages"]["teach"]["bytes_written"]
    assert [item.path for item in client_of(lab).list_artifacts(run.info.run_id)] == ["summary.json"]
    assert run.info.status == "FINISHED"


def test_a_run_with_nothing_to_do_says_so(lab: Lab) -> None:
    before = as_json(lab.config, "run")
    runs = len(pipeline_runs(lab))
    answer = handstill("run", "-c", lab.config, "--json")
    document = answer.document
    assert len(pipeline_runs(lab)) == runs, "MLflow hears nothing of it"
    assert document["nothing_to_do"] is True
    assert document["changed"] == {}
    assert document["since"] == before["ended"]
    assert document["cost"]["bytes_written"] == 0
    assert "tiny: nothing to do, " in answer.err
    assert list((lab.workdir / "tracking").iterdir()) == [], "nothing is left to be delivered"


def test_a_failed_run_has_a_summary_too(lab: Lab) -> None:
    lab.rewrite("alpha", edits={0: 1})
    lab.configure({"teacher.checkpoint_sha256": None, "train.lr": 1e12, "train.steps": 3})
    answer = handstill("run", "-c", lab.config, "--json")
    assert answer.code == 1, answer.err
    document = answer.document
    assert (document["ok"], document["exit_code"], document["outcome"]) == (False, 1, "failure")
    assert document["failure"]["kind"] == "work"
    assert document["error"] == document["failure"]["error"]
    assert document["stages"]["teach"]["done"] == 1
    assert document["stages"]["train"]["unfinished"] is True
    assert json.loads((lab.workdir / "summary.json").read_text())["failure"] == document["failure"]


@pytest.fixture
def told(tmp_path: Path) -> Path:
    return tmp_path / "told.json"


def test_a_command_is_told_on_its_stdin(lab: Lab, told: Path) -> None:
    lab.configure({"notify": {"command": [sys.executable, "-c", KEEPS, str(told)], "on": ["success", "failure"]}})
    document = as_json(lab.config, "run")
    assert json.loads(told.read_text()) == {key: value for key, value in document.items() if key != "ok"}
    lab.configure({"teacher.checkpoint": "nowhere.ckpt"})
    assert handstill("run", "-c", lab.config).code == 2
    failed = json.loads(told.read_text())
    assert (failed["outcome"], failed["failure"]["kind"]) == ("failure", "input")
    assert "nowhere.ckpt" in failed["text"]


def test_only_the_wanted_endings_are_told(lab: Lab, told: Path) -> None:
    lab.configure({"notify": {"command": [sys.executable, "-c", KEEPS, str(told)]}})
    as_json(lab.config, "run")
    assert not told.exists(), "failures only, unless asked for more"


def test_a_password_in_the_variable_is_refused_and_not_told(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hush@db.example/mlflow")
    answer = handstill("run", "-c", lab.config)
    assert (answer.code, "MLFLOW_TRACKING_URI: the address holds a password" in answer.err) == (2, True)
    assert "hush" not in answer.out + answer.err


def test_a_run_that_found_another_at_work_is_no_failure(tmp_path: Path) -> None:
    busy = {"outcome": "failure", "failure": {"kind": "busy", "error": "another run holds it"}, "text": "busy"}
    kept = tmp_path / "told.json"
    for on, is_told in ((["failure", "success"], False), (["busy"], True)):
        notify(NotifyConfig(command=[sys.executable, "-c", KEEPS, str(kept)], on=on), busy)
        assert kept.exists() is is_told


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["/nowhere/at-all"], "/nowhere/at-all: No such file or directory"),
        ([sys.executable, "-c", "raise SystemExit(7)"], "ended with exit code 7"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "was stopped after 0.3 s"),
    ],
    ids=["missing", "failing", "hanging"],
)
def test_a_command_that_fails_changes_nothing(lab: Lab, command: list[str], said: str) -> None:
    timeout_s = 0.3 if "sleep" in command[-1] else 9
    lab.configure({"notify": {"command": command, "on": ["success"], "timeout_s": timeout_s}})
    answer = handstill("run", "-c", lab.config, "--json")
    assert answer.code == 0
    assert answer.document["outcome"] == "success"
    assert said in answer.err


class Webhook:
    """A server on loopback that keeps what is posted to it."""

    def __init__(self, answer: int) -> None:
        posted: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                posted.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                self.send_response(answer)
                self.send_header("Location", "http://127.0.0.1:9/secret-elsewhere")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.posted = posted
        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/hooks/secret-token"

    def __enter__(self) -> Webhook:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def test_a_webhook_is_told_and_its_address_is_said_nowhere(lab: Lab) -> None:
    with Webhook(200) as hook:
        lab.configure({"notify": {"url": hook.url, "on": ["success"]}})
        answer = handstill("run", "-c", lab.config, "--json", "-v")
        ((path, document),) = hook.posted
    assert path == "/hooks/secret-token"
    assert document == {key: value for key, value in answer.document.items() if key != "ok"}
    check = handstill("check", "-c", lab.config)
    assert check.code == 0
    said = answer.out + answer.err + check.out + (lab.workdir / "logs" / "events.jsonl").read_text()
    assert "secret-token" not in said


@pytest.mark.parametrize("code", [302, 404, 500])
def test_a_webhook_that_refuses_is_logged_by_its_host(code: int, caplog: pytest.LogCaptureFixture) -> None:
    with Webhook(code) as hook:
        notify(NotifyConfig.model_validate({"url": hook.url}), FAILED)
        assert len(hook.posted) == 1
    assert f"127.0.0.1 answered {code}" in caplog.text
    assert "secret" not in caplog.text


def test_the_environments_address_wins(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with Webhook(204) as hook:
        monkeypatch.setenv(URL_VARIABLE, hook.url)
        notify(NotifyConfig.model_validate({"url": "http://127.0.0.1:9/secret-file"}), FAILED)
        assert len(hook.posted) == 1
    notify(NotifyConfig(), FAILED)  # nobody listens there any more
    monkeypatch.setenv(URL_VARIABLE, "file:///etc/secret-file")
    notify(NotifyConfig(), FAILED)
    assert [record.getMessage() for record in caplog.records] == [
        "notify.url: 127.0.0.1 cannot be reached: ConnectionRefusedError",
        "notify.url: not an http:// or https:// address",
    ]


def test_a_wrong_address_is_not_quoted(lab: Lab) -> None:
    lab.configure({"notify": {"url": "ftp://user:secret-word@example.com"}})
    answer = handstill("check", "-c", lab.config, "--json")
    assert answer.code == 2
    assert "notify.url: want an address that begins with http:// or https://" in answer.err
    assert "secret-word" not in answer.out + answer.err
