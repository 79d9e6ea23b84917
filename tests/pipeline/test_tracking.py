"""What MLflow shows of a whole run, and what the next run does for a store that missed something."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from pipeline import provenance, submitting, tracking
from pipeline.config import PipelineConfig
from pipeline.spool import POSITION, Spool
from pipeline.system_metrics import machine_state
from tests.pipeline.commands import handstill
from tests.pipeline.lab import NO_WORK, Lab
from tests.tiny_experiment import CONFIG

COMMIT = "mlflow.source.git.commit"


def client_of(lab: Lab) -> MlflowClient:
    return MlflowClient(f"sqlite:///{lab.workdir / 'mlflow.db'}")


def runs_of(client: MlflowClient) -> list[Run]:
    """The newest first."""
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"]))


def run_named(client: MlflowClient, name: str) -> Run:
    """The newest of that name."""
    return next(run for run in runs_of(client) if run.info.run_name == name)


def history(client: MlflowClient, run: Run) -> dict[str, list[tuple[int, float, int]]]:
    return {
        key: [(p.step, p.value, p.timestamp) for p in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }


def histories(client: MlflowClient) -> dict[str, dict[str, list[tuple[int, float, int]]]]:
    """Of every run, by its name."""
    runs = runs_of(client)
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {str(run.info.run_name): history(client, run) for run in runs}


def student_folder(lab: Lab, name: str) -> Path:
    (folder,) = (lab.workdir / "students" / name / "seed-0").iterdir()
    return folder


def test_the_runs_are_nested_and_say_what_was_read_by_which_code(lab: Lab) -> None:
    runs = {str(run.info.run_name): run for run in runs_of(client_of(lab))}
    assert len(runs_of(client_of(lab))) == 5
    (comparison,) = runs.keys() - {"tiny", "plain-seed0", "hybrid-seed0", "teacher"}
    assert comparison.endswith(" mm PA-MPJPE: comparison of 2 students")
    commit = subprocess.run(
        ["git", "-C", str(provenance.ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    for name in ("plain-seed0", "hybrid-seed0"):
        run = runs[name]
        assert run.data.tags["mlflow.parentRunId"] == runs["tiny"].info.run_id
        assert run.data.tags["handstill.version"]
        if commit.returncode == 0 and (provenance.ROOT / ".git").exists():
            assert run.data.tags[COMMIT] == commit.stdout.strip()
        contexts = {tag.value for item in run.inputs.dataset_inputs for tag in item.tags}
        assert contexts == {"training", "evaluation"}
        wanted = {"loss", "lr", "grad_norm", "pictures_per_s", "loader_wait_share", "val/pa_mpjpe_mm", "params_m"}
        wanted |= {f"system/{name}" for name in ("cpu_utilization_percentage", "system_memory_usage_megabytes")}
        assert wanted <= run.data.metrics.keys()
        assert {"backbone", "lr", "seed", "strategy", "distill.outputs"} <= run.data.params.keys()
        assert run.info.status == "FINISHED"
    assert list((lab.workdir / "tracking").iterdir()) == []


def test_each_student_is_a_model_of_its_run_and_one_version(lab: Lab) -> None:
    client = client_of(lab)
    for name in ("plain", "hybrid"):
        (version,) = client.search_model_versions(f"name = 'tiny-{name}'")
        run = run_named(client, f"{name}-seed0")
        assert version.run_id == run.info.run_id
        assert {"handstill.strategy", "handstill.seed", "handstill.identity"} <= version.tags.keys()
        (output,) = run.outputs.model_outputs
        model = client.get_logged_model(output.model_id)
        assert (model.name, str(model.status)) == ("student", "READY")
        assert version.source == model.artifact_location


def test_a_store_whose_answers_were_forgotten_is_given_nothing_twice(lab: Lab) -> None:
    """The position is lost: every record is in doubt, and the store is asked what it has."""
    before = histories(client_of(lab))
    artifacts = lab.workdir / "mlflow-artifacts"
    for path in lab.workdir.rglob(POSITION):
        path.unlink()
    assert lab.run() == NO_WORK
    assert histories(client_of(lab)) == before
    assert all(Spool(path.parent).left() == 0 for path in lab.workdir.rglob("tracking.jsonl"))
    for name in ("plain", "hybrid"):
        assert len(client_of(lab).search_model_versions(f"name = 'tiny-{name}'")) == 1
    assert not artifacts.exists() or not list(artifacts.rglob("weights.safetensors")), "the model was there already"


def test_another_store_gets_the_whole_story(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where such a store puts artifacts
    before = histories(client_of(lab))
    other = f"sqlite:///{tmp_path / 'other.db'}"
    lab.configure({"tracking.uri": other})
    folder = student_folder(lab, "plain")
    Spool(folder).append("status", status="FINISHED")  # anything that was not delivered
    assert lab.run() == NO_WORK
    client = MlflowClient(other)
    assert histories(client) == {"plain-seed0": before["plain-seed0"]}
    assert run_named(client, "plain-seed0").info.status == "FINISHED"
    assert len(client.search_model_versions("name = 'tiny-plain'")) == 1
    (weights,) = (tmp_path / "mlruns").rglob("weights.safetensors")
    assert weights.read_bytes() == (folder / "student" / "weights.safetensors").read_bytes()


def test_a_student_that_was_killed_is_said_to_be(lab: Lab) -> None:
    """A run that never said its end, and whose workdir nobody works in."""
    Spool(student_folder(lab, "plain")).append("status", status="RUNNING")
    assert lab.run() == NO_WORK
    assert run_named(client_of(lab), "plain-seed0").info.status == "KILLED"


def test_scores_wait_for_the_store_and_are_not_computed_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.configure({"evaluate.latency.warmup": 1, "tracking.patience_s": 0.2})

    def away(*_: Any, **__: Any) -> None:
        raise tracking.UnreachableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(tracking.Tracker, "_experiment_id", away)
        answer = handstill("run", "-c", lab.config)
    assert answer.code == 1
    assert "is scored, and MLflow at" in answer.err
    scored = list(lab.workdir.glob("evaluations/*/*/evaluation.json"))
    written = {path: path.stat().st_mtime_ns for path in scored}
    lab.configure({"tracking.patience_s": 30.0})
    assert lab.run().scored == ["hybrid", "plain", "teacher"]
    assert {path: path.stat().st_mtime_ns for path in scored} == written
    client = client_of(lab)
    for name, points in {"plain-seed0": 2, "hybrid-seed0": 2, "teacher": 1}.items():
        assert len(history(client, run_named(client, name))["fps"]) == points, "one an evaluation, each in its run"


def test_without_models_the_students_files_are_an_artifact(tmp_path: Path, lab: Lab) -> None:
    lab.configure({"tracking.register_models": False, "students.plain.lr": 5e-4, "students.hybrid!": None})
    lab.run("train")
    client = client_of(lab)
    runs = client.search_runs(["1"], "tags.`handstill.student` = 'plain'", order_by=["attributes.start_time DESC"])
    newest = runs[0]
    assert sorted(file.path for file in client.list_artifacts(newest.info.run_id, "student")) == [
        f"student/{name}" for name in ("hand_model.safetensors", "student.json", "weights.safetensors")
    ]
    assert len(client.search_model_versions("name = 'tiny-plain'")) == 1, "that of the first training"


def test_code_outside_a_checkout_is_named_by_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    tags = provenance.provenance_tags.__wrapped__()
    assert COMMIT not in tags
    assert tags["handstill.version"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert COMMIT not in provenance.provenance_tags.__wrapped__(), "a repository without a commit"


def test_a_deleted_experiment_stops_the_stage_at_its_start(lab: Lab) -> None:
    client_of(lab).delete_experiment("1")
    lab.configure({"students.plain.lr": 5e-4})
    answer = handstill("run", "train", "-c", lab.config)
    assert answer.code == 1
    assert "its experiment 'tiny' was deleted" in answer.err
    client_of(lab).restore_experiment("1")
    assert lab.run("train").trained == ["plain"]


def test_the_gpu_is_looked_at_once_the_process_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> int:
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3_000_000, 12_000_000))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5_000_000)
    monkeypatch.setattr(torch.cuda, "utilization", no_driver)
    assert not [name for name in machine_state(psutil.Process()) if "gpu" in name]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    state = machine_state(psutil.Process())
    assert state["system/gpu_0_memory_usage_megabytes"] == 9
    assert state["system/gpu_0_memory_usage_percentage"] == 75
    assert state["system/process_gpu_memory_peak_megabytes"] == 5
    assert "system/gpu_0_utilization_percentage" not in state
    monkeypatch.setattr(torch.cuda, "utilization", lambda: 42)
    assert machine_state(psutil.Process())["system/gpu_0_utilization_percentage"] == 42


def test_a_submitted_job_names_the_code_that_was_submitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its code is packed without repository and package data."""
    tags = {"mlflow.source.name": "handstill", "handstill.version": "1.2.3", COMMIT: "0" * 40}
    sent = submitting._environment(PipelineConfig.model_validate(CONFIG), tmp_path / "pipeline.yaml", "job-1")
    assert json.loads(sent[provenance.JOB_PROVENANCE]) == provenance.provenance_tags()
    monkeypatch.setenv(provenance.JOB_PROVENANCE, json.dumps(tags))
    assert provenance.provenance_tags.__wrapped__() == tags
    monkeypatch.delenv(provenance.JOB_PROVENANCE)

    def not_installed(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(provenance, "version", not_installed)
    assert provenance.provenance_tags.__wrapped__()["handstill.version"] == version("handstill")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.provenance_tags.__wrapped__()["handstill.version"] == "unknown"
