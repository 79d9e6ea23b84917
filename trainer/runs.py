"""What MLflow knows about the students: the one module that reads from it.

A run is found by its tags (`handstill.kind`, `.student`, `.seed`, `.strategy`, `.backbone`, `.identity`), its scores by
metrics named `<data set>/<metric>`, `latency_ms/<batch size>`, `fps`, `params_m`; the mean pose's scores by
`mean_pose/<data set>/<metric>` of the teacher's run; the errors of each sample by the artifact
`evaluation/<data set>/samples.parquet`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray

from storage.errors import InputError, WorkError
from trainer.config import METRICS

_NOT_DATA_SETS = ("validation", "label", "teacher", "latency_ms")
_PAGE = 200

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


class Runs:
    """The finished runs of one MLflow experiment."""

    def __init__(self, tracking_uri: str, experiment: str) -> None:
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one bar a small file otherwise
        try:
            self._client = MlflowClient(tracking_uri=tracking_uri)
            found = self._client.get_experiment_by_name(experiment)
        except (MlflowException, OSError) as error:
            raise WorkError(f"cannot read the MLflow store at {tracking_uri}: {error}") from error
        if found is None:
            raise InputError(f"no experiment {experiment!r} at {tracking_uri}; run `handstill run` first")
        self._experiment_id = found.experiment_id

    def students(self, identities: Collection[str] | None = None) -> list[StudentRun]:
        """The last run of each student and seed, by name and seed; of these identities only, if given."""
        runs = [run for run in self._of_kind("student") if identities is None or run.identity in identities]
        latest = {(run.name, run.seed): run for run in reversed(runs)}
        return [latest[key] for key in sorted(latest, key=lambda key: (key[0], key[1] or 0))]

    def teacher(self) -> StudentRun | None:
        """The last run of the teacher."""
        return next(iter(self._of_kind("teacher")), None)

    def sample_errors(self, run: StudentRun, dataset: str) -> dict[str, NDArray[Any]] | None:
        """The columns of the run's samples table on that data set; None where it has none."""
        with tempfile.TemporaryDirectory() as folder:
            path = self._download(run, f"evaluation/{dataset}/samples.parquet", Path(folder))
            if path is None:
                return None
            table = pq.read_table(path)
            return {name: table[name].to_numpy() for name in table.column_names}

    def picture(self, run: StudentRun) -> bytes | None:
        """The PNG of the run's answers on validation pictures."""
        with tempfile.TemporaryDirectory() as folder:
            path = self._download(run, "pictures/pictures.png", Path(folder))
            return None if path is None else path.read_bytes()

    def curve(self, run: StudentRun, metric: str) -> list[tuple[int, float]]:
        """(step, value) of everything the run logged under that name."""
        history = self._client.get_metric_history(run.run_id, metric)
        return sorted({(m.step, m.value) for m in history})

    def _of_kind(self, kind: str) -> list[StudentRun]:
        """Finished runs of that kind, the newest first."""
        runs, token = [], None
        while True:
            page = self._client.search_runs(
                [self._experiment_id],
                filter_string=f"tags.`handstill.kind` = '{kind}' and attributes.status = 'FINISHED'",
                max_results=_PAGE,
                order_by=["attributes.start_time DESC"],
                page_token=token,
            )
            runs += [_student_run(run) for run in page]
            token = page.token
            if not token:
                return runs

    def _download(self, run: StudentRun, artifact: str, folder: Path) -> Path | None:
        parent = artifact.rpartition("/")[0]
        if artifact not in {found.path for found in self._client.list_artifacts(run.run_id, parent)}:
            return None
        return Path(self._client.download_artifacts(run.run_id, artifact, str(folder)))


def _student_run(run: Run) -> StudentRun:
    tags, metrics = run.data.tags, run.data.metrics
    seed = tags.get("handstill.seed")
    return StudentRun(
        run_id=run.info.run_id,
        kind=tags["handstill.kind"],
        name=tags.get("handstill.student", tags["handstill.kind"]),
        seed=None if seed is None else int(seed),
        strategy=tags.get("handstill.strategy", ""),
        backbone=tags.get("handstill.backbone", ""),
        identity=tags.get("handstill.identity", ""),
        params=dict(run.data.params),
        metrics=_scores(metrics),
        mean_pose=_scores({k.removeprefix("mean_pose/"): v for k, v in metrics.items() if k.startswith("mean_pose/")}),
        latency_ms={k.removeprefix("latency_ms/"): v for k, v in metrics.items() if k.startswith("latency_ms/")},
        fps=metrics.get("fps"),
        params_m=metrics.get("params_m"),
    )


def _scores(metrics: dict[str, float]) -> Scores:
    scores: Scores = {}
    for key, value in metrics.items():
        dataset, _, metric = key.partition("/")
        if metric in METRICS and dataset not in _NOT_DATA_SETS:
            scores.setdefault(dataset, {})[metric] = value
    return {name: {m: scores[name][m] for m in METRICS if m in scores[name]} for name in sorted(scores)}
