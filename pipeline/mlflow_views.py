"""What MLflow's own pages show of an experiment: its kind, and saved views with the columns that matter here.

A saved view is a tag of the experiment, as the page itself writes it (MLflow 3: an envelope of name, times and the
state of the page as JSON); older pages do not look at it. Without one the page shows names, times and durations, and
hundreds of metrics to choose from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import requests
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.tracking import EXPERIMENT_KIND, TRAINING, TrackingTarget, limit_requests
from trainer.config import METRICS
from trainer.report_tables import scored_sets

log = logging.getLogger("handstill")

_VIEW = "mlflow.sharedViewState."
_MADE_MS = 1_750_000_000_000
"""One time for all, so that the same view is the same tag."""
_SHOWN_METRICS = 4
"""Of each data set."""


def keep_views(target: TrackingTarget, document: Mapping[str, Any]) -> None:
    """Tag the experiment of a comparison so that its page shows students, scores and speed. Failing only warns."""
    limit_requests()
    try:
        client = MlflowClient(tracking_uri=target.uri)
        found = client.get_experiment_by_name(target.experiment)
        if found is None:
            return
        for key, value in _tags(document).items():
            if found.tags.get(key) != value:
                client.set_experiment_tag(found.experiment_id, key, value)
    except (MlflowException, requests.RequestException, OSError) as error:
        log.warning("MLflow at %s did not take the views of its pages: %s", target.uri, error)


def _tags(document: Mapping[str, Any]) -> dict[str, str]:
    sets = scored_sets(dict(document))
    groups = document["by_student"]
    scores = [
        f"{dataset}/{metric}"
        for dataset in sets
        for metric in [m for m in METRICS if any(m in g["metrics"].get(dataset, {}) for g in groups)][:_SHOWN_METRICS]
    ]
    what = [
        *(_column("tags", f"handstill.{tag}") for tag in ("strategy", "backbone", "seed")),
        _column("params", "steps"),
    ]
    speed = [_column("metrics", name) for name in ("fps", "params_m")]
    students = [*what, *(_column("metrics", name) for name in scores), *speed]
    training = [*what, *(_column("metrics", m) for m in ("loss", "validation/pa_mpjpe_mm", "pictures_per_s"))]
    best = scores[0] if scores else "fps"
    return {
        EXPERIMENT_KIND: TRAINING,
        f"{_VIEW}handstill-scores": _view("Scores and speed", "metrics.params_m > 0", students, best),
        f"{_VIEW}handstill-training": _view("Training", _of_kind("student"), training, "validation/pa_mpjpe_mm"),
        f"{_VIEW}handstill-reports": _view(
            "Reports", _of_kind("comparison"), [_column("metrics", "gate/passed")], None
        ),
    }


def _of_kind(kind: str) -> str:
    return f"tags.`handstill.kind` = '{kind}'"


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"


def _view(name: str, which: str, columns: Sequence[str], order_by: str | None) -> str:
    """which: MLflow's filter; order_by: a metric, None: the newest first."""
    state = {
        "searchFilter": which,
        "orderByKey": "attributes.start_time" if order_by is None else _column("metrics", order_by),
        "orderByAsc": order_by is not None and (order_by.endswith("_mm") or order_by == "loss"),
        "selectedColumns": list(columns),
    }
    envelope = {"name": name, "createdAt": _MADE_MS, "updatedAt": _MADE_MS, "state": json.dumps(state)}
    return json.dumps(envelope)
