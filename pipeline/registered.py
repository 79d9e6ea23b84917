"""A student by its name in MLflow's model registry, such as the winner behind an alias: its folder, for who uses it.

A student whose training is in the configuration's workdir is taken from there, where what is known about it lies beside
it; another one is fetched for as long as it is needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.registering import IDENTITY
from pipeline.tracking import limit_requests, tracking_target
from pipeline.tracking_uri import URI_VARIABLE, existing, named_in_environment
from storage.errors import InputError, WorkError
from trainer.job import STUDENT
from trainer.runs import registered_version


@contextmanager
def registered_student(what: str, config: Path) -> Iterator[Path]:
    """The folder of the student that the registry has by that name, there while the context is.

    config: the pipeline file that says where MLflow is; where there is none, the environment does.

    Raises:
        InputError: nobody says where MLflow is, or it has no such student.
        WorkError: it does not answer.
    """
    limit_requests()
    uri, students = _place(what, config)
    existing(uri, URI_VARIABLE)
    with _answering(uri, what):
        version = registered_version(MlflowClient(tracking_uri=uri), what)
    if version is None:
        raise InputError(f"the model registry at {uri} has no {what}; its page Models lists what it has")
    trained = None if students is None else _trained_here(version, students)
    if trained is not None:
        yield trained
        return
    with tempfile.TemporaryDirectory() as folder:
        with _answering(uri, what):
            download_artifacts(artifact_uri=f"{version.source}/{STUDENT}", dst_path=folder, tracking_uri=uri)
        yield Path(folder) / STUDENT


@contextmanager
def _answering(uri: str, what: str) -> Iterator[None]:
    try:
        yield
    except (MlflowException, requests.RequestException, OSError) as error:
        raise WorkError(f"the model registry at {uri} did not give {what}: {error}") from error


def _place(what: str, config: Path) -> tuple[str, Path | None]:
    """The registry's address, and where the configuration's students are, if there is one."""
    if config.is_file():
        from pipeline.experiment import open_experiment

        experiment = open_experiment(config)
        return tracking_target(experiment.config.tracking, experiment.workdir).uri, experiment.workdir.students
    uri = named_in_environment()
    if uri is None:
        raise InputError(
            f"{what}: nobody says where its registry is; name the pipeline file with -c, or set {URI_VARIABLE}"
        )
    return uri, None


def _trained_here(version: ModelVersion, students: Path) -> Path | None:
    """The same student in a workdir, by its identity."""
    names = [version.tags.get(f"handstill.{key}") for key in ("student", "seed")]
    identity = version.tags.get(IDENTITY)
    if None in names or identity is None:
        return None
    folder = students / str(names[0]) / f"seed-{names[1]}" / identity[:16] / STUDENT
    return folder if folder.is_dir() else None
