"""MLflow as the pipeline writes to it: connect to a store, find or begin a run, put records of a spool there.

A store that does not answer raises `UnreachableError`, and the same records are sent again later; what a store will
never take raises `RefusedError`. Nothing here waits longer than a request may take, or repeats one.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.config import TrackingConfig
from pipeline.registering import ModelRequest, register_student
from pipeline.spool import Record
from pipeline.tracking_uri import URI_VARIABLE, named_in_environment, path_of_uri
from pipeline.workdir import Workdir
from storage.durable import partial_path, remove_tree, sync_directory
from storage.errors import WorkError

log = logging.getLogger("handstill")
logging.getLogger("alembic").setLevel(logging.WARNING)  # a new SQLite file would print each of its migrations
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks of what it raises too: a full disk
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each attempt at a server that is away

MAX_PARAM_CHARS = 6000  # MLflow refuses longer values
MAX_PARAMS, MAX_METRICS = 100, 1000
"""MLflow's limits a call."""
SPOOL_TAG = "handstill.spool"
"""On every run: which spool it is of. A run whose creation was not answered is found again by it."""
REQUEST_TIMEOUT_S = 10
"""MLflow's own default of 120 s, seven times, is for scripts that have nothing else to do."""
UPLOAD_BYTES_PER_S = 2_000_000
"""A server answers an upload when the file is in its store; so slowly may that go, beyond the timeout."""

_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_REQUEST_LIMITS = {
    _TIMEOUT: str(REQUEST_TIMEOUT_S),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # one bar a small file otherwise
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # where --json writes one document
}
_NO_ENTRY = ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
_NEVER = (
    "BAD_REQUEST", "ENDPOINT_NOT_FOUND", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "MALFORMED_REQUEST", "NOT_FOUND",
    "NOT_IMPLEMENTED", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST",
)  # fmt: skip
_LATER_HTTP = (401, 403, 408, 425, 429)
"""Of the 4xx: those that may be answered differently another time."""
_environment = threading.Lock()


EXPERIMENT_KIND, TRAINING = "mlflow.experimentKind", "custom_model_development"
"""A tag of the experiment: without it MLflow's page takes it for a chat bot's, and shows traces and judges."""


class UnreachableError(Exception):
    """The store does not answer, or not now; the same may be sent again later."""

    no_entry = False
    """It answered that we may not: the user has to do something."""


class RefusedError(Exception):
    """The store answered that it will not take this, now or later."""


@dataclass(frozen=True)
class TrackingTarget:
    """Where runs go; picklable, so that workers log to the same place."""

    uri: str
    experiment: str
    artifacts: str | None = None
    """Artifact root of an experiment that has to be made; None: the server decides."""
    patience_s: float = 30.0
    """How long the end of a unit of work waits until everything is delivered."""


def tracking_target(config: TrackingConfig, workdir: Workdir) -> TrackingTarget:
    """MLFLOW_TRACKING_URI, else the configured server, else a SQLite file in the workdir.

    Raises InputError where the variable holds a password.
    """
    limit_requests()  # also for those that read from there
    uri = named_in_environment() or config.uri
    if uri:
        return TrackingTarget(uri, config.experiment, None, config.patience_s)
    database = f"sqlite:///{workdir.tracking_database}"
    return TrackingTarget(database, config.experiment, workdir.tracking_artifacts.as_uri(), config.patience_s)


def named_by(config: TrackingConfig) -> str:
    """Who says where runs go, to begin an error with."""
    if named_in_environment():
        return URI_VARIABLE
    return "tracking.uri" if config.uri else "tracking.uri (null: a file in the workdir, which `handstill run` makes)"


@dataclass(frozen=True)
class CacheInput:
    """One data set as a run read it: a cache snapshot."""

    dataset: str
    cache: str
    fingerprint: str
    digest: str
    context: str
    """training | evaluation."""


def check_store(target: TrackingTarget) -> str | None:
    """Connect once; why the store does not answer now, or None where it does.

    Raises:
        WorkError: it answers that it cannot be used as it is named, or that we may not.
    """
    try:
        Tracker(target)
    except UnreachableError as error:
        if not error.no_entry:
            return str(error)
        problem = str(error)
    except (RefusedError, OSError) as error:
        problem = str(error)
    else:
        return None
    raise WorkError(f"tracking.uri: cannot use the MLflow store at {target.uri}: {problem}")


def limit_requests() -> None:
    """Have MLflow's clients in this process give up soon on a server that does not answer; the user's limits win."""
    for key, value in _REQUEST_LIMITS.items():
        os.environ.setdefault(key, value)


_WARNED: set[str] = set()


def _warn_of_old_place(artifacts: str, target: TrackingTarget) -> None:
    """A workdir's own store that was copied or moved goes on writing where it was; MLflow cannot be told otherwise."""
    if target.artifacts is None or artifacts in _WARNED or _same_folder(artifacts, target.artifacts):
        return
    _WARNED.add(artifacts)
    log.warning(
        "%s keeps its artefacts in %s, not beside it: this workdir was copied or moved, and the old place goes on "
        "being written to. Use another workdir, or give tracking.uri a server.",
        target.uri,
        artifacts,
    )


def _same_folder(first: str, second: str) -> bool:
    """Whether two URIs of files name one place, by a link or a second mount, too."""
    paths = [path_of_uri(uri).resolve() for uri in (first, second)]
    return paths[0] == paths[1] or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))


class Tracker:
    """A connected store and its experiment. Raises UnreachableError and RefusedError, as every method does."""

    def __init__(self, target: TrackingTarget) -> None:
        self.target = target
        limit_requests()
        try:
            if target.artifacts is not None:
                _make_database(Path(target.uri.removeprefix("sqlite:///")))
            self._client = MlflowClient(tracking_uri=target.uri)
        except MlflowException as error:  # a kind of store that there is not
            raise RefusedError(str(error)) from error
        with _in_our_words():
            self._experiment = self._experiment_id()

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self.target.experiment)
        if found is None:
            try:
                return self._client.create_experiment(
                    self.target.experiment, artifact_location=self.target.artifacts, tags={EXPERIMENT_KIND: TRAINING}
                )
            except MlflowException as error:
                found = self._client.get_experiment_by_name(self.target.experiment)
                if found is None:  # else another process made it just now
                    raise error
        _warn_of_old_place(found.artifact_location, self.target)
        if found.lifecycle_stage != "active":
            name = self.target.experiment
            raise RefusedError(f"its experiment {name!r} was deleted; restore it, or name another: tracking.experiment")
        return str(found.experiment_id)

    def run_of(self, spool: str, *, finished: bool = False) -> str | None:
        """The run of that spool; None where the store has none, or where somebody deleted it.

        finished: only one that said its end, which is the last that is delivered.
        """
        which = f"tags.`{SPOOL_TAG}` = '{spool}'" + (" and attributes.status = 'FINISHED'" if finished else "")
        with _in_our_words():
            found = self._client.search_runs([self._experiment], which, max_results=1)
        return str(found[0].info.run_id) if found else None

    def has(self, run_id: str) -> bool:
        """Whether the store has the run, and nobody deleted it."""
        with _in_our_words():
            try:
                return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return False
                raise

    def begin(self, start: Record, parent: str | None) -> str:
        """Begin the run that a spool's first record asks for; its id."""
        fields = start.fields
        tags = {"mlflow.runName": fields["name"], SPOOL_TAG: fields["spool"], **fields["tags"]}
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        with _in_our_words():
            made = self._client.create_run(self._experiment, fields["time_ms"], tags, fields["name"])
        return str(made.info.run_id)

    def metrics(self, run_id: str, records: Sequence[Record], *, in_doubt: bool) -> None:
        """Log the values of some metrics records.

        in_doubt: they may have been sent before, without an answer; what the store has is not sent again.
        """
        values = [
            Metric(key, float(value), record.fields["time_ms"], record.fields["step"])
            for record in records
            for key, value in record.fields["values"].items()
        ]
        with _in_our_words():
            if in_doubt:
                values = self._without_known(run_id, values)
            for start in range(0, len(values), MAX_METRICS):
                self._client.log_batch(run_id, metrics=values[start : start + MAX_METRICS])

    def _without_known(self, run_id: str, values: list[Metric]) -> list[Metric]:
        """MLflow's databases ignore a point that they have (same key, step, time, value); other stores add it again."""
        known = {
            (point.key, point.step, point.timestamp, repr(point.value))  # repr: a NaN is like another
            for key in {metric.key for metric in values}
            for point in self._client.get_metric_history(run_id, key)
        }
        return [m for m in values if (m.key, m.step, m.timestamp, repr(m.value)) not in known]

    def put(self, run_id: str, record: Record, folder: Path) -> None:
        """Put any record that is neither the start nor metrics; doing so twice is doing it once.

        folder: where the spool lies, from which artifacts have their paths.
        """
        fields = record.fields
        with _in_our_words():
            if record.kind == "params":
                items = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in fields["values"].items()]
                for start in range(0, len(items), MAX_PARAMS):
                    self._client.log_batch(run_id, params=items[start : start + MAX_PARAMS])
            elif record.kind == "inputs":
                self._client.log_inputs(run_id, [_dataset_input(CacheInput(**each)) for each in fields["caches"]])
            elif record.kind == "artifact":
                self._artifact(run_id, folder / fields["path"], fields["folder"])
            elif record.kind == "model":
                self._model(run_id, folder / fields["path"], ModelRequest(**fields["model"]))
            else:
                assert record.kind == "status", record.kind
                self._status(run_id, fields["status"], fields["time_ms"])

    def _artifact(self, run_id: str, path: Path, folder: str | None) -> None:
        with _time_to_upload(path):
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), folder)
            else:
                self._client.log_artifact(run_id, str(path), folder)

    def _model(self, run_id: str, path: Path, request: ModelRequest) -> None:
        with _time_to_upload(path):
            try:
                register_student(self._client, self._experiment, run_id, path, request)
            except MlflowException as error:
                if error.error_code not in ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"):
                    raise
                self._artifact(run_id, path, request.name)  # a server older than MLflow 3: at least the files
                raise RefusedError(
                    f"the server has no models of runs ({error}); the student is among the files"
                ) from error

    def _status(self, run_id: str, status: str, time_ms: int) -> None:
        if status == "RUNNING":
            self._client.update_run(run_id, status=status)
        else:
            self._client.set_terminated(run_id, status, time_ms)


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


def _dataset_input(cache: CacheInput) -> DatasetInput:
    source = json.dumps({"uri": cache.cache, "fingerprint": cache.fingerprint})
    entity = Dataset(name=cache.dataset, digest=cache.digest[:36], source_type="local", source=source)
    return DatasetInput(entity, [InputTag("mlflow.data.context", cache.context)])


@contextmanager
def _time_to_upload(path: Path) -> Iterator[None]:
    """More time for an answer while a big file or folder is on its way.

    Raises:
        RefusedError: there is nothing at that path.
    """
    if not path.exists():
        raise RefusedError(f"{path} is gone")
    files = [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]
    extra_s = sum(found.stat().st_size for found in files) // UPLOAD_BYTES_PER_S
    with _environment:  # MLflow reads the limit from there at every request, and from nowhere else
        before = os.environ[_TIMEOUT]
        os.environ[_TIMEOUT] = str(int(before) + extra_s)
        try:
            yield
        finally:
            os.environ[_TIMEOUT] = before


@contextmanager
def _in_our_words() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if error.error_code in _NEVER:
            raise RefusedError(_first_line(error)) from error
        raise _unreachable(error, no_entry=error.error_code in _NO_ENTRY) from error
    except requests.HTTPError as error:  # of an upload
        code = 0 if error.response is None else error.response.status_code
        if 400 <= code < 500 and code not in _LATER_HTTP:
            raise RefusedError(_first_line(error)) from error
        raise _unreachable(error, no_entry=code in (401, 403)) from error
    except OSError as error:
        raise _unreachable(error, no_entry=False) from error


def _unreachable(error: Exception, *, no_entry: bool) -> UnreachableError:
    told = UnreachableError(_first_line(error))
    told.no_entry = no_entry
    return told


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:500]
