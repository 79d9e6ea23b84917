"""Training beside a real MLflow server that dies, comes back, or does not."""

from __future__ import annotations

import hashlib
import json
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from safetensors.numpy import load_file

from models.sizes import IMAGE_SIZE
from models.student import Student
from pipeline import provenance, run_log, training
from pipeline.config import ClusterConfig
from pipeline.delivery import deliver_leftovers
from pipeline.run_log import StudentRun, pipeline_run
from pipeline.spool import Spool
from pipeline.tracking import CacheInput, TrackingTarget, check_store
from pipeline.training import TrainUnit, train_unit
from pipeline.workdir import Workdir, claim_of
from pipeline.workers import Resources
from storage.errors import WorkError
from tests.mlflow_server import MlflowServer
from tests.trainer.jobs import tiny_job
from trainer.job import TrainJob
from trainer.loop import train

STEPS = 6
IDENTITY = "handstill.identity"


@pytest.fixture(autouse=True)
def _as_in_a_training_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "models.teacher", raising=False)
    monkeypatch.setattr(run_log, "GATHER_S", 0.0)
    monkeypatch.setattr(run_log, "START_PATIENCE_S", 1.0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    return tiny_job(tmp_path_factory.mktemp("job"), steps=STEPS, checkpoint_every=3, validate_every=3)


@pytest.fixture(scope="module")
def calm(job: TrainJob) -> dict[str, str]:
    """The weights of a training that nobody disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "models.teacher", raising=False)
        torch.set_num_threads(1)
        return weights(train(replace(job, out_dir=job.out_dir.parent / "calm")).student)


def weights(student: Path) -> dict[str, str]:
    """A digest a tensor: pytest spends minutes on telling long bytes apart."""
    tensors = load_file(student / "weights.safetensors")
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in tensors.items()}


def unit_for(
    job: TrainJob, workdir: Workdir, target: TrackingTarget, name: str, parent: str | None = None
) -> TrainUnit:
    folder = workdir.students / name / "seed-3" / "identity"
    folder.mkdir(parents=True, exist_ok=True)
    tags = {"handstill.kind": "student", "handstill.student": name, IDENTITY: f"id-{name}"}
    inputs = (CacheInput("tiny", "cache", "f" * 16, "d" * 64, "training"),)
    return TrainUnit(
        job=replace(job, out_dir=folder, name=name),
        run=StudentRun(target, parent, f"{name}-seed3", tags, inputs, folder),
        label=f"{name}-seed3",
        events=workdir.events,
        registered_name=f"tests-{name}",
        system_metrics_s=0.2,
        claim=claim_of(workdir),
        resources=Resources(),
        threads=None,
        cluster=ClusterConfig(),
    )


def at_steps(patch: pytest.MonkeyPatch, actions: Mapping[int, Callable[[], None]]) -> None:
    """Do something when the loop has reported a step."""
    append = training.append_event

    def append_and_act(path: Path, event: str, **fields: Any) -> None:
        append(path, event, **fields)
        if event == "train_step" and fields["step"] in actions:
            actions[fields["step"]]()

    patch.setattr(training, "append_event", append_and_act)


def kill_once_begun(server: MlflowServer, spool: Spool) -> None:
    """Kill it as soon as it has the run and something of it."""
    deadline = time.monotonic() + 60
    while spool.position().offset < 1000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.kill()


def run_named(uri: str, name: str) -> Run:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    return run


def assert_whole(uri: str, run: Run, spool: Spool) -> None:
    """Every value that was logged is in the store, once, at its step and its time, and the files and the model are."""
    client = MlflowClient(uri)
    logged = sorted(
        (key, record.fields["step"], record.fields["time_ms"], value)
        for record in spool.records()
        if record.kind == "metrics"
        for key, value in record.fields["values"].items()
    )
    stored = sorted(
        (point.key, point.step, point.timestamp, point.value)
        for key in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, key)
    )
    assert stored == logged
    for key in ("loss", "lr", "pictures_per_s", "loader_wait_share"):
        assert [step for name, step, *_ in stored if name == key] == list(range(1, STEPS + 1)), key
    assert [step for name, step, *_ in stored if name == "validation/loss"] == [3, STEPS]
    assert len([name for name, *_ in stored if name == "system/process_memory_megabytes"]) >= 2
    assert run.info.status == "FINISHED"
    assert run.data.params["backbone"] == "test_efficientnet"
    assert [item.dataset.name for item in run.inputs.dataset_inputs] == ["tiny"]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "pictures")] == ["pictures/pictures.png"]
    assert len(run.outputs.model_outputs) == 1
    assert spool.left() == 0
    assert spool.position().refused == ()


def test_a_server_killed_in_mid_training_and_started_again(
    server: MlflowServer, job: TrainJob, calm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, target = Workdir(tmp_path), TrackingTarget(server.uri, "tests", patience_s=60)
    with pipeline_run(workdir, target, "pipeline", {}) as parent:
        unit = unit_for(job, workdir, target, "disturbed", parent)
        spool = Spool(unit.run.folder)

        at_steps(monkeypatch, {2: lambda: kill_once_begun(server, spool), 5: server.start})
        result = train_unit(unit)
    run = run_named(server.uri, "disturbed-seed3")
    assert_whole(server.uri, run, spool)
    assert weights(result.student) == calm
    above = run_named(server.uri, "pipeline")
    assert run.data.tags["mlflow.parentRunId"] == above.info.run_id
    assert above.info.status == "FINISHED"
    assert list(workdir.tracking_runs.iterdir()) == [], "the pipeline's own spool has done its duty"
    _the_model_answers_as_the_student(server.uri, result.student, tmp_path)


def _the_model_answers_as_the_student(uri: str, student: Path, tmp_path: Path) -> None:
    """In a fresh process, which knows the registry and the name."""
    script = """
import sys, json, mlflow, numpy, torch
torch.set_num_threads(1)
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/tests-disturbed/1")
images = numpy.load(sys.argv[2])
numpy.savez(sys.argv[3], **model.predict(images))
print(json.dumps(model.metadata.signature.to_dict()))
"""
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "images.npy", images.numpy())
    said = subprocess.run(
        [sys.executable, "-c", script, uri, str(tmp_path / "images.npy"), str(tmp_path / "answers.npz")],
        capture_output=True,
        text=True,
        check=False,
        cwd=provenance.ROOT,
    )
    assert said.returncode == 0, said.stderr
    with torch.inference_mode():
        wanted = {name: value.numpy() for name, value in Student.load(student)(images).items() if name != "features"}
    with np.load(tmp_path / "answers.npz") as answers:
        assert set(answers) == set(wanted)
        for name, value in wanted.items():
            assert np.array_equal(answers[name], value), name
    signature = json.loads(said.stdout)
    inputs, outputs = json.loads(signature["inputs"]), json.loads(signature["outputs"])
    assert [item["tensor-spec"] for item in inputs] == [{"dtype": "float32", "shape": [-1, 3, 256, 256]}]
    told = {item["name"]: item["tensor-spec"] for item in outputs}
    assert told == {n: {"dtype": "float32", "shape": [-1, *value.shape[1:]]} for n, value in wanted.items()}


def test_a_server_that_is_away_all_the_time(
    server: MlflowServer,
    job: TrainJob,
    calm: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Away from the start, and away at the end; the next run delivers, under the same parent, once."""
    workdir, target = Workdir(tmp_path), TrackingTarget(server.uri, "tests", patience_s=0.5)
    with pipeline_run(workdir, target, "pipeline-of-lost", {}) as parent:
        left = unit_for(job, workdir, replace(target, patience_s=0.5), "left", parent)
        at_steps(monkeypatch, {2: lambda: kill_once_begun(server, Spool(left.run.folder))})
        assert weights(train_unit(left).student) == calm
        never = unit_for(job, workdir, target, "never", parent)
        assert weights(train_unit(never).student) == calm
    assert Spool(left.run.folder).left() > STEPS - 2
    assert Spool(left.run.folder).position().run_id is not None
    assert Spool(never.run.folder).left() > STEPS
    assert Spool(never.run.folder).position().run_id is None
    deliver_leftovers(workdir, target)
    assert f"records of {Spool(never.run.folder).path} are not in MLflow" in caplog.text
    assert check_store(target) is not None
    server.start()
    deliver_leftovers(workdir, target, all_dead=True)
    assert list(workdir.tracking_runs.iterdir()) == []
    above = run_named(server.uri, "pipeline-of-lost")
    assert above.info.status == "FINISHED"
    for unit in (left, never):
        run = run_named(server.uri, unit.run.name)
        assert_whole(server.uri, run, Spool(unit.run.folder))
        assert run.data.tags["mlflow.parentRunId"] == above.info.run_id
        assert len(MlflowClient(server.uri).search_model_versions(f"name = '{unit.registered_name}'")) == 1


def test_a_server_that_swallows_everything_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes connections and never answers."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # 10 s without it
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = TrackingTarget(f"http://127.0.0.1:{silent.getsockname()[1]}", "tests", patience_s=0.3)
        began = time.monotonic()
        with pipeline_run(Workdir(tmp_path), target, "pipeline", {}) as parent:
            assert "does not answer" in caplog.text
            run = StudentRun(target, parent, "student", {}, (), tmp_path / "student").open()
            appending = time.monotonic()
            for step in range(100):
                run.metrics({"loss": 1.0}, step)
            assert time.monotonic() - appending < 1.0
            assert run.close("FINISHED") == 103, "start, inputs, 100 steps, the end"
        assert time.monotonic() - began < 20
        assert len(list(Workdir(tmp_path).tracking_runs.iterdir())) == 1


def test_a_store_that_cannot_be_used_stops_the_stage_at_its_start(tmp_path: Path) -> None:
    target = TrackingTarget("nonsense://there", "tests")
    with (
        pytest.raises(WorkError, match=r"tracking\.uri: cannot use the MLflow store at nonsense://there"),
        pipeline_run(Workdir(tmp_path), target, "pipeline", {}),
    ):
        raise AssertionError("nothing may begin")


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.tracking import TrackingTarget
from pipeline.workdir import Workdir
from pipeline import provenance, run_log, training
from tests.pipeline.test_tracking_server import at_steps, unit_for
from tests.trainer.jobs import tiny_job
import pytest, pickle, time, torch
torch.set_num_threads(1)  # as in the other trainings: sums in another order would be other weights
run_log.GATHER_S = 0.0
unit = pickle.loads(Path(sys.argv[1]).read_bytes())

def die():
    spool = run_log.Spool(unit.run.folder)
    while spool.left() > 4:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

at_steps(pytest.MonkeyPatch(), {5: die})
training.train_unit(unit)
"""


def test_a_trainer_killed_between_two_checkpoints(job: TrainJob, calm: dict[str, str], tmp_path: Path) -> None:
    """Killed after step 5, resumed after step 3: steps 4 and 5 are trained twice and logged once."""
    workdir = Workdir(tmp_path)
    target = TrackingTarget(f"sqlite:///{workdir.tracking_database}", "tests", workdir.tracking_artifacts.as_uri())
    unit = unit_for(job, workdir, target, "killed")
    (tmp_path / "unit.pickle").write_bytes(pickle.dumps(unit))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "unit.pickle")]
    died = subprocess.run(command, capture_output=True, check=False, cwd=provenance.ROOT)
    assert died.returncode == -9, died.stderr.decode()
    spool = Spool(unit.run.folder)
    assert max(r.fields["step"] for r in spool.records() if "loss" in r.fields.get("values", {})) == 5
    deliver_leftovers(workdir, target, all_dead=True)
    assert run_named(target.uri, "killed-seed3").info.status == "KILLED"
    assert weights(train_unit(unit).student) == calm
    assert_whole(target.uri, run_named(target.uri, "killed-seed3"), Spool(unit.run.folder))
