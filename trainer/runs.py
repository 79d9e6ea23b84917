"""What MLflow knows about the students: the one module that reads from it.

A run is found by its tags (`handstill.kind`, `.student`, `.seed`, `.strategy`, `.backbone`, `.identity`), its scores by
metrics named `<data set>/<metric>`, `latency_ms/<batch size>`, `fps`, `params_m`; the mean pose's scores by
`mean_pose/<data set>/<metric>` of the teacher's run; the errors of each sample by the artifact
`evaluation/<data set>/samples.parquet`, beside which lie the cases that are shown.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from mlflow.entities import Metric, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from storage.errors import DamageError, InputError, WorkError
from trainer.cases import Columns, read_table
from trainer.config import METRICS, REGISTERED

_NOT_DATA_SETS = ("validation", "label", "teacher", "latency_ms")
_DATA_SET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}")
_LONGEST_NAME = 80
_WHOLE = re.compile(r"-?[0-9]{1,18}")
_PAGE = 200
_MAX_BYTES = 1 << 30
"""Of an artifact that is read: samples tables of a million samples have a quarter of it."""
_PNG = b"\x89PNG\r\n\x1a\n"
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""What MLflow answers of a run, version or alias that is not there."""

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class StudentRun:
    """One finished run, of a student or (kind `teacher`) of the teacher."""

    run_id: str
    kind: str
    name: str
    seed: int | None
    strategy: str
    backbone: str
    identity: str
    params: dict[str, str]
    metrics: Scores
    mean_pose: Scores
    latency_ms: dict[str, float]
    fps: float | None
    params_m: float | None
    experiment: str = ""
    started_ms: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    training: dict[str, str] = field(default_factory=dict)
    """Data set -> digest of the snapshot that it learned from."""
    evaluated: dict[str, str] = field(default_factory=dict)
    """Data set -> digest of the snapshot that it was scored on last."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Its other metrics, as they were last."""


@dataclass(frozen=True)
class Selection:
    """Which runs are meant."""

    experiments: tuple[str, ...]
    filter: str = ""
    """In MLflow's words, for students: `tags.x = 'y' and params.steps = '100'`."""
    identities: frozenset[str] | None = None
    """Only students of these, and the teacher of these where it has one; None: any."""


class Runs:
    """The finished runs of some MLflow experiments.

    Raises:
        InputError: an experiment that is not there, a filter that MLflow does not understand.
        WorkError: the store does not answer.
    """

    def __init__(self, tracking_uri: str, selection: Selection) -> None:
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one bar a small file otherwise
        self._uri, self._selection = tracking_uri, selection
        self._experiments: dict[str, str] = {}
        self._tables: dict[tuple[str, str], Columns | None] = {}
        with self._reading():
            self._client = MlflowClient(tracking_uri=tracking_uri)
            for name in selection.experiments:
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise InputError(
                        f"no experiment {name!r} at {tracking_uri} (there is: "
                        + (", ".join(self._known_experiments()) or "none")
                        + "); run `handstill run` first, or name one that is there; students' records are where "
                        "tracking.uri pointed when they were trained: point it there again, or take another workdir"
                    )
                self._experiments[found.experiment_id] = name

    @property
    def tracking_uri(self) -> str:
        """Where they are."""
        return self._uri

    def students(self) -> list[StudentRun]:
        """The last run of each student and seed of each experiment, by name and seed."""
        wanted = self._selection.identities
        runs = [r for r in self._of_kind("student", self._selection.filter) if wanted is None or r.identity in wanted]
        latest = {(run.experiment, run.name, run.seed): run for run in reversed(runs)}
        order = {name: place for place, name in enumerate(self._experiments.values())}
        return sorted(latest.values(), key=lambda run: (order[run.experiment], run.name, run.seed or 0))

    def teachers(self) -> dict[str, StudentRun]:
        """By experiment, its teacher: of the wanted identities, else the last one."""
        wanted = self._selection.identities or frozenset()
        found: dict[str, StudentRun] = {}
        for run in sorted(self._of_kind("teacher"), key=lambda run: run.identity in wanted, reverse=True):
            found.setdefault(run.experiment, run)
        return found

    def registered(self, name: str) -> tuple[StudentRun, str] | None:
        """The run behind `models:/<name>/<version>` or `models:/<name>@<alias>`, and the version; None: there is none.

        Raises:
            InputError: the name is neither of the two, or the version's run is gone.
        """
        with self._reading():
            found = registered_version(self._client, name)
            if found is None:
                return None
            try:
                run = self._client.get_run(found.run_id or "")
            except MlflowException as error:
                if error.error_code in _ABSENT:
                    return None
                raise
            home = run.info.experiment_id
            experiment = self._experiments.get(home) or self._client.get_experiment(home).name
        return _student_run(run, experiment), str(found.version)

    def samples(self, run: StudentRun, dataset: str) -> Columns | None:
        """The columns of the run's samples table on that data set; None where it has none. Read once."""
        key = (run.run_id, dataset)
        if key not in self._tables:
            self._tables[key] = self._table(run, f"evaluation/{dataset}/samples.parquet")
        return self._tables[key]

    def cases(self, run: StudentRun, dataset: str) -> Columns | None:
        """What the run answered best and worst, with the pictures: trainer.cases."""
        artifact = f"evaluation/{dataset}/cases.parquet"
        table = self._table(run, artifact)
        if table is not None and (missing := {"picture", "label_2d"} - table.keys()):
            raise self._damaged(run, artifact, f"it has no column {min(missing)}")
        return table

    def evaluation(self, run: StudentRun) -> dict[str, Any]:
        """The run's evaluation.json; empty where it has none."""
        with tempfile.TemporaryDirectory() as folder:
            artifact = "evaluation/evaluation.json"
            path = self._download(run, artifact, Path(folder))
            try:
                document = {} if path is None else json.loads(path.read_bytes())
            except (ValueError, RecursionError) as error:
                raise self._damaged(run, artifact, f"it is no JSON ({error})") from error
            if not isinstance(document, dict):
                raise self._damaged(run, artifact, f"it holds a {type(document).__name__}, wanted an object")
            return document

    def picture(self, run: StudentRun) -> bytes | None:
        """The PNG of the run's answers on validation pictures."""
        with tempfile.TemporaryDirectory() as folder:
            artifact = "pictures/pictures.png"
            path = self._download(run, artifact, Path(folder))
            data = None if path is None else path.read_bytes()
            if data is not None and not data.startswith(_PNG):
                raise self._damaged(run, artifact, "it is no PNG")
            return data

    def curve(self, run: StudentRun, metric: str) -> list[tuple[int, float]]:
        """(step, value) of everything the run logged under that name."""
        return sorted({(point.step, point.value) for point in self.history(run, metric)})

    def history(self, run: StudentRun, metric: str) -> list[Metric]:
        """Everything the run logged under that name, with the times."""
        with self._reading():
            return list(self._client.get_metric_history(run.run_id, metric))

    def _known_experiments(self) -> list[str]:
        return [found.name for found in self._client.search_experiments(max_results=20)]

    def _of_kind(self, kind: str, more: str = "") -> list[StudentRun]:
        """Finished runs of that kind, the newest first."""
        wanted = [f"tags.`handstill.kind` = '{kind}'", "attributes.status = 'FINISHED'", *([more] if more else [])]
        runs: list[StudentRun] = []
        token = None
        while True:
            with self._reading(what=f"--filter {more!r}" if more else ""):
                page = self._client.search_runs(
                    list(self._experiments),
                    filter_string=" and ".join(wanted),
                    max_results=_PAGE,
                    order_by=["attributes.start_time DESC"],
                    page_token=token,
                )
            runs += [_student_run(run, self._experiments[run.info.experiment_id]) for run in page]
            token = page.token
            if not token:
                return runs

    def _table(self, run: StudentRun, artifact: str) -> Columns | None:
        with tempfile.TemporaryDirectory() as folder:
            path = self._download(run, artifact, Path(folder))
            try:
                return None if path is None else read_table(path)
            except DamageError as error:
                raise self._damaged(run, artifact, str(error)) from error

    def _download(self, run: StudentRun, artifact: str, folder: Path) -> Path | None:
        """The artifact's copy; None: the run has none. DamageError: a folder, or larger than any of ours."""
        parent = artifact.rpartition("/")[0]
        with self._reading():
            found = [each for each in self._client.list_artifacts(run.run_id, parent) if each.path == artifact]
            if not found:
                return None
            if found[0].is_dir:  # else everything below it would be fetched
                raise self._damaged(run, artifact, "it is a folder")
            if (found[0].file_size or 0) > _MAX_BYTES:
                raise self._damaged(run, artifact, f"it has {found[0].file_size} bytes, at most {_MAX_BYTES} are read")
            return Path(self._client.download_artifacts(run.run_id, artifact, str(folder)))

    def _damaged(self, run: StudentRun, artifact: str, why: str) -> DamageError:
        return DamageError(
            f"{artifact} of run {run.run_id} at {self._uri} is damaged: {why}. Leave the run out (--filter), or delete "
            "it and run `handstill run`, which logs it again"
        )

    @contextmanager
    def _reading(self, what: str = "") -> Iterator[None]:
        """what: of the user's words, that the store may refuse."""
        try:
            yield
        except MlflowException as error:
            if what and error.error_code == "INVALID_PARAMETER_VALUE":
                raise InputError(f"{what}: MLflow does not understand it: {error.message}") from error
            raise WorkError(f"cannot read the MLflow store at {self._uri}: {_reason(error)}") from error
        except (OSError, requests.RequestException) as error:
            raise WorkError(f"cannot read the MLflow store at {self._uri}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why a store was not read, in a line: of a server that is not there the words of the system, of which MLflow's
    client makes a paragraph."""
    found = re.search(r"\[Errno -?\d+\] ([\w ]+)", str(error))
    if found and re.search("HTTPS?ConnectionPool", str(error)):  # not a full disk of our own
        return f"{found[1]}; is its server up, and is that the address?"
    return str(error)


def registered_version(client: MlflowClient, name: str) -> ModelVersion | None:
    """The version that `models:/<name>@<alias>` or `models:/<name>/<version>` names; None: there is none.

    Raises InputError where the name is neither of the two; what the client raises where the store does not answer.
    """
    model, alias, version = split_registered(name)
    try:
        return client.get_model_version_by_alias(model, alias) if alias else client.get_model_version(model, version)
    except MlflowException as error:
        if error.error_code in _ABSENT:
            return None
        raise


def split_registered(name: str) -> tuple[str, str, str]:
    """Model, alias and version of `models:/<name>@<alias>` or `models:/<name>/<version>`; one of the last two is
    empty. InputError where it is neither."""
    what = name.removeprefix(REGISTERED)
    model, at, alias = what.rpartition("@")  # a model's name may have one, an alias not
    if at and model and alias and "/" not in alias:
        return model, alias, ""
    model, _, version = what.rpartition("/")
    if model and version.isdigit():
        return model, "", version
    raise InputError(f"found {name!r}, want {REGISTERED}<name>@<alias> or {REGISTERED}<name>/<version>")


def whole(text: str | None) -> int | None:
    """The number that a tag or parameter says; None where it says none."""
    return int(text) if text is not None and _WHOLE.fullmatch(text) else None


def _student_run(run: Run, experiment: str) -> StudentRun:
    tags, metrics = run.data.tags, run.data.metrics
    seed = tags.get("handstill.seed")
    if seed is not None and whole(seed) is None:
        raise DamageError(
            f"run {run.info.run_id}: its tag handstill.seed is {seed!r}, wanted a whole number; mend the tag"
        )
    kind = tags.get("handstill.kind", "student")
    return StudentRun(
        run_id=run.info.run_id,
        kind=kind,
        name=printable(tags.get("handstill.student", kind)),
        seed=whole(seed),
        strategy=printable(tags.get("handstill.strategy", "")),
        backbone=printable(tags.get("handstill.backbone", "")),
        identity=tags.get("handstill.identity", ""),
        params=dict(run.data.params),
        metrics=_scores(metrics),
        mean_pose=_scores({k.removeprefix("mean_pose/"): v for k, v in metrics.items() if k.startswith("mean_pose/")}),
        latency_ms={k.removeprefix("latency_ms/"): v for k, v in metrics.items() if k.startswith("latency_ms/")},
        fps=metrics.get("fps"),
        params_m=metrics.get("params_m"),
        experiment=experiment,
        started_ms=int(run.info.start_time or 0),
        tags=dict(tags),
        training=_snapshots(run, "training"),
        evaluated=_snapshots(run, "evaluation"),
        numbers=dict(metrics),
    )


def printable(text: str) -> str:
    """A name as pages and figures can show it: control characters and what is beyond 80 characters replaced."""
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 1]}\u2026"


def _snapshots(run: Run, context: str) -> dict[str, str]:
    inputs = run.inputs.dataset_inputs if run.inputs else []
    return {
        each.dataset.name: each.dataset.digest
        for each in inputs
        if any(tag.key == "mlflow.data.context" and tag.value == context for tag in each.tags)
    }


def _scores(metrics: Mapping[str, float]) -> Scores:
    scores: Scores = {}
    for key, value in metrics.items():
        dataset, _, metric = key.partition("/")
        # a data set's name becomes part of files' names, and a server may say anything
        ours = metric in METRICS and dataset not in _NOT_DATA_SETS and _DATA_SET.fullmatch(dataset)
        if ours and math.isfinite(value):
            scores.setdefault(dataset, {})[metric] = value
    return {name: {m: scores[name][m] for m in METRICS if m in scores[name]} for name in sorted(scores)}


def datasets_of(runs: Sequence[StudentRun]) -> list[str]:
    """The data sets that some of the runs were scored on."""
    return sorted({dataset for run in runs for dataset in run.metrics})


def by_name(runs: Collection[StudentRun]) -> dict[str, list[StudentRun]]:
    """Runs by student, seeds together. With the experiment before the name, where two have a student of that name."""
    homes: dict[str, set[str]] = {}
    for run in runs:
        homes.setdefault(run.name, set()).add(run.experiment)
    groups: dict[str, list[StudentRun]] = {}
    for run in runs:
        groups.setdefault(f"{run.experiment}/{run.name}" if len(homes[run.name]) > 1 else run.name, []).append(run)
    return groups
