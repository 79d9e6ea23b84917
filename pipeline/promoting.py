"""The winner of a comparison in MLflow's model registry: a version of its own, and an alias that points at it.

The order is what keeps the alias honest: the gate was passed, the version is there and ready, nobody moved the alias
since the gate was looked at, and only then one call moves it. Whoever loads `models:/<name>@<alias>` gets the winner of
before or the new one, and never what failed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import requests
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.registering import IDENTITY, make_registered_model, model_of_run
from pipeline.tracking import TrackingTarget, limit_requests
from storage.errors import InputError, WorkError
from trainer.config import REGISTERED
from trainer.runs import registered_version

log = logging.getLogger("handstill")


@dataclass(frozen=True)
class Alias:
    """An alias of a registered model."""

    model: str
    alias: str

    @property
    def uri(self) -> str:
        return f"{REGISTERED}{self.model}@{self.alias}"


def version_behind(target: TrackingTarget, alias: Alias) -> str | None:
    """The version that an alias points at now; None: at none."""
    with _answering(target):
        return _version_behind(MlflowClient(tracking_uri=_uri(target)), alias)


def promote(target: TrackingTarget, alias: Alias, winner: Mapping[str, Any], before: str | None) -> dict[str, Any]:
    """Register the winner (`gate.winner` of the comparison's document) and point the alias at it; what was done.

    before: the version that the alias pointed at when the gate was looked at. Doing it again finds what was done.

    Raises:
        InputError: the winner's run has no model.
        WorkError: somebody moved the alias meanwhile, or the store does not answer.
    """
    with _answering(target):
        client = MlflowClient(tracking_uri=_uri(target))
        version = _version_of(client, alias.model, winner)
        now = _version_behind(client, alias)
        if now != before:
            raise WorkError(
                f"{alias.uri} went from {_told(before)} to {_told(now)} while the students were compared with what it "
                "was; nothing was moved. Compare again."
            )
        if now != version:
            client.set_registered_model_alias(alias.model, alias.alias, version)
    who = f"{winner['student']} (seed {winner['seed']})"
    sentence = (
        f"{alias.uri} is {who} already, version {version}."
        if now == version
        else f"{alias.uri} is {who} now, version {version}; it was {_told(before)}."
    )
    return {"model": alias.model, "alias": alias.alias, "version": version, "before": before, "sentence": sentence}


def stays(alias: Alias, before: str | None) -> dict[str, Any]:
    """What is said of an alias that the gate did not let anybody have."""
    stays_with = "points at nobody still" if before is None else f"stays with {_told(before)}"
    sentence = f"{alias.uri} {stays_with}: who fails the gate is not registered."
    return {"model": alias.model, "alias": alias.alias, "version": before, "before": before, "sentence": sentence}


def _version_of(client: MlflowClient, model: str, winner: Mapping[str, Any]) -> str:
    """The winner's version of the model, made where there is none: one an identity."""
    made = client.search_model_versions(f"name = '{model}' and tags.`{IDENTITY}` = '{winner['identity']}'")
    if made:
        return str(made[0].version)
    run = client.get_run(winner["run_id"])
    logged = model_of_run(client, run.info.experiment_id, winner["run_id"])
    if logged is None:
        raise InputError(
            f"compare.promote: run {winner['run_id']} of {winner['student']} has no model to register; set "
            "tracking.register_models to true and train it again"
        )
    make_registered_model(client, model)
    tags = {key: value for key, value in run.data.tags.items() if key.startswith("handstill.")}
    version = client.create_model_version(
        model,
        logged.artifact_location,
        winner["run_id"],
        tags=tags,
        description="\n\n".join(winner["sentences"]),
        model_id=logged.model_id,
    )
    if version.status != "READY":
        raise WorkError(f"version {version.version} of {model} is {version.status}: {version.status_message}")
    return str(version.version)


def _version_behind(client: MlflowClient, alias: Alias) -> str | None:
    found = registered_version(client, alias.uri)
    return None if found is None else str(found.version)


def _uri(target: TrackingTarget) -> str:
    limit_requests()
    return target.uri


def _told(version: str | None) -> str:
    return "nobody" if version is None else f"version {version}"


@contextmanager
def _answering(target: TrackingTarget) -> Iterator[None]:
    try:
        yield
    except (MlflowException, requests.RequestException, OSError) as error:
        raise WorkError(f"compare.promote: the model registry at {target.uri} does not answer: {error}") from error
