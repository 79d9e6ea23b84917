"""The one module that writes to MLflow: a run a student, one for the teacher, nested under one run of the pipeline."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.config import TrackingConfig
from pipeline.workdir import Workdir
from storage.durable import partial_path, remove_tree, sync_directory, write_bytes_atomic
from storage.errors import WorkError

logging.getLogger("alembic").setLevel(logging.WARNING)  # a new SQLite file would print each of its migrations
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)

MAX_PARAM_CHARS = 6000  # MLflow refuses longer values


@dataclass(frozen=True)
class TrackingTarget:
    """Where runs go; picklable, so that workers log to the same place."""

    uri: str
    experiment: str
    artifacts: str | None
    """Artifact root of an experiment that has to be made; None: the server decides."""


def tracking_target(config: TrackingConfig, workdir: Workdir) -> TrackingTarget:
    """MLFLOW_TRACKING_URI, else the configured server, else a SQLite file in the workdir."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or config.uri
    if uri:
        return TrackingTarget(uri, config.experiment, None)
    return TrackingTarget(
        f"sqlite:///{workdir.tracking_database}", config.experiment, workdir.tracking_artifacts.as_uri()
    )


def _make_database(path: Path) -> None:
    """Make the workdir's SQLite file, whole or not at all.

    MLflow makes it by dozens of migrations, seconds long, and refuses one in which only some of them were done.
    """
    if path.exists():
        return
    folder = partial_path(path)
    folder.mkdir(parents=True)
    MlflowClient(tracking_uri=f"sqlite:///{folder / path.name}").get_experiment_by_name("")
    (folder / path.name).replace(path)
    sync_directory(path.parent)
    remove_tree(folder)


@dataclass(frozen=True)
class CacheInput:
    """One data set as a run read it: a cache snapshot."""

    dataset: str
    cache: str
    fingerprint: str
    digest: str
    context: str
    """training | evaluation."""


class Tracker:
    """A connected store and its experiment."""

    def __init__(self, target: TrackingTarget) -> None:
        self.target = target
        try:
            if target.artifacts is not None:
                _make_database(Path(target.uri.removeprefix("sqlite:///")))
            self._client = MlflowClient(tracking_uri=target.uri)
            self._experiment = self._experiment_id()
        except (MlflowException, OSError) as error:
            raise WorkError(f"tracking.uri: cannot use the MLflow store at {target.uri}: {error}") from None

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self.target.experiment)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(self.target.experiment, artifact_location=self.target.artifacts))

    def start(self, name: str, tags: Mapping[str, str], parent: str | None = None) -> str:
        """Begin a run; its id."""
        every = {"mlflow.runName": name, "mlflow.source.name": "handstill", **tags}
        if parent is not None:
            every["mlflow.parentRunId"] = parent
        return str(self._client.create_run(self._experiment, tags=every, run_name=name).info.run_id)

    def resume(self, run_id: str) -> bool:
        """Set a run that was begun earlier running again; False where the store does not know it."""
        try:
            self._client.get_run(run_id)
        except MlflowException:
            return False
        self._client.update_run(run_id, status="RUNNING")
        return True

    def params(self, run_id: str, values: Mapping[str, Any]) -> None:
        items = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in values.items()]
        for start in range(0, len(items), 100):  # MLflow's limit a call
            self._client.log_batch(run_id, params=items[start : start + 100])

    def metrics(self, run_id: str, values: Mapping[str, float], step: int = 0) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(run_id, metrics=[Metric(key, float(value), now, step) for key, value in values.items()])

    def tags(self, run_id: str, values: Mapping[str, str]) -> None:
        self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in values.items()])

    def inputs(self, run_id: str, caches: Sequence[CacheInput]) -> None:
        """Say which cache snapshots the run read, as MLflow dataset inputs."""
        self._client.log_inputs(run_id, [_dataset_input(cache) for cache in caches])

    def artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Store a file, or a folder with all that is in it."""
        if path.is_dir():
            self._client.log_artifacts(run_id, str(path), folder)
        else:
            self._client.log_artifact(run_id, str(path), folder)

    def end(self, run_id: str, status: str = "FINISHED") -> None:
        self._client.set_terminated(run_id, status)


def _dataset_input(cache: CacheInput) -> DatasetInput:
    source = json.dumps({"uri": cache.cache, "fingerprint": cache.fingerprint})
    entity = Dataset(name=cache.dataset, digest=cache.digest[:36], source_type="local", source=source)
    return DatasetInput(entity, [InputTag("mlflow.data.context", cache.context)])


@contextmanager
def pipeline_run(tracker: Tracker, name: str, tags: Mapping[str, str]) -> Iterator[str]:
    """The parent run of one `handstill run` that trains or evaluates."""
    run_id = tracker.start(name, {"handstill.kind": "pipeline", **tags})
    try:
        yield run_id
    except BaseException:
        tracker.end(run_id, "FAILED")
        raise
    tracker.end(run_id)


@dataclass(frozen=True)
class StudentRun:
    """What the tracking of one student needs; picklable."""

    target: TrackingTarget
    parent: str | None
    name: str
    tags: dict[str, str]
    inputs: tuple[CacheInput, ...]
    folder: Path
    """The student's own folder: it remembers its run, so that a resumed training goes on in it."""

    @property
    def memory(self) -> Path:
        return self.folder / "mlflow_run.json"

    def open(self, tracker: Tracker) -> str:
        """The student's run: the one it had, else a new one."""
        if self.memory.is_file():
            run_id = str(json.loads(self.memory.read_text(encoding="utf-8"))["run_id"])
            if tracker.resume(run_id):
                return run_id
        run_id = tracker.start(self.name, self.tags, self.parent)
        tracker.inputs(run_id, self.inputs)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(self.memory, json.dumps({"run_id": run_id}).encode())
        return run_id
