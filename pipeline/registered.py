"""A student by its name in MLflow's model registry, such as the winner behind an alias: its folder, for who uses it.

A student whose training is in the configuration's workdir is taken from there, where what is known about it lies beside
it; another one is fetched for as long as it is needed. What a server says is not trusted (SECURITY.md).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from mlflow.artifacts import download_artifacts, list_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from models.student import STUDENT_FILES
from pipeline.config import did_you_mean
from pipeline.registering import IDENTITY
from pipeline.tracking import limit_requests, named_by, tracking_target
from pipeline.tracking_uri import URI_VARIABLE, existing, named_in_environment
from storage.errors import DamageError, InputError, WorkError
from trainer.config import REGISTERED
from trainer.job import STUDENT
from trainer.runs import Runs, Selection, printable, registered_version, split_registered, whole

_MAX_BYTES = 8 << 30
"""Of one of a student's files: three times HaMeR's own backbone."""
_FOLDER = re.compile(r"(?!\.)[^/\\\0]{1,200}")
_MODELS_NAMED = 100
_DIGEST = re.compile(r"[0-9a-f]{16,64}")
_PARAMS = ("steps", "batch_size", "lr", "weight_decay", "distill")


@dataclass(frozen=True)
class RegisteredStudent:
    """A version of the registry and where its student is."""

    uri: str
    version: ModelVersion
    folder: Path
    """There while the context is."""

    @property
    def name(self) -> str:
        """models:/NAME/VERSION, whatever alias was asked for: aliases move."""
        return f"{REGISTERED}{self.version.name}/{self.version.version}"

    def known(self) -> dict[str, Any]:
        """What the registry and the student's run say of it, for a model card.

        Raises WorkError where the store does not answer.
        """
        said = _said_of(self.version)
        found: dict[str, Any] = {"registered": self.name} | ({"student": said} if said else {})
        registered = Runs(self.uri, Selection(())).registered(self.name)
        if registered is None:  # made by hand, or its run was deleted
            return found
        run, _ = registered
        teacher = Runs(self.uri, Selection((run.experiment,))).teachers().get(run.experiment)
        return found | {
            "training": {"MLflow run": run.run_id}
            | {key: printable(run.params[key]) for key in _PARAMS if key in run.params},
            "data_sets": sorted(run.training),
            "metrics": run.metrics,
            "teacher_metrics": {} if teacher is None else teacher.metrics,
            "mean_pose_metrics": {} if teacher is None else teacher.mean_pose,
        }


@contextmanager
def registered_student(what: str, config: Path) -> Iterator[RegisteredStudent]:
    """The student that the registry has by that name.

    config: the pipeline file that says where MLflow is; where there is none, the environment does.

    Raises:
        InputError: nobody says where MLflow is, or it has no such student.
        WorkError: it does not answer.
        DamageError: what it has there is no student of ours.
    """
    limit_requests()
    uri, students = _place(what, config)
    with _answering(uri, what):
        version = registered_version(MlflowClient(tracking_uri=uri), what)
    if version is None:
        raise InputError(f"the model registry at {uri} has no {what}{_instead(uri, what)}")
    trained = None if students is None else _trained_here(version, students)
    if trained is not None:
        yield RegisteredStudent(uri, version, trained)
        return
    with tempfile.TemporaryDirectory() as folder:
        with _answering(uri, what):
            _fetch(uri, what, f"{version.source}/{STUDENT}", folder)
        yield RegisteredStudent(uri, version, Path(folder))


def _instead(uri: str, what: str) -> str:
    """What there is to choose from: models, or the aliases of the one that is meant."""
    with _answering(uri, what):
        client = MlflowClient(tracking_uri=uri)
        models = {model.name: model for model in client.search_registered_models(max_results=_MODELS_NAMED)}
    name, alias, _ = split_registered(what)
    if name not in models:
        return did_you_mean(name, sorted(models)) or "; it has no models"
    aliases = sorted(models[name].aliases)
    return (did_you_mean(alias, aliases) if alias else "") or f"; its page Models lists the versions of {name}"


def _fetch(uri: str, what: str, source: str, folder: str) -> None:
    """The files that make a student, by their names, and nothing else that is there."""
    sizes = {
        file.path.rpartition("/")[2]: int(file.file_size or 0)
        for file in list_artifacts(artifact_uri=source, tracking_uri=uri)
        if not file.is_dir
    }
    for name in STUDENT_FILES:
        if not 0 < sizes.get(name, 0) <= _MAX_BYTES:
            size = f"{sizes[name]} bytes" if name in sizes else "nothing"
            raise DamageError(
                f"{what} is no student of handstill: found {size} at {source}/{name}, want a file of at most "
                f"{_MAX_BYTES}"
            )
        download_artifacts(artifact_uri=f"{source}/{name}", dst_path=folder, tracking_uri=uri)


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
        tracking = experiment.config.tracking
        uri = tracking_target(tracking, experiment.workdir).uri
        return existing(uri, named_by(tracking)), experiment.workdir.students
    named = named_in_environment()
    if named is None:
        raise InputError(
            f"{what}: nobody says where its registry is; name the pipeline file with -c, or set {URI_VARIABLE}"
        )
    return existing(named, URI_VARIABLE), None


def _said_of(version: ModelVersion) -> dict[str, Any]:
    """Whose training the version is from; empty where its tags do not say so as ours do."""
    name, identity = version.tags.get("handstill.student", ""), version.tags.get(IDENTITY, "")
    seed = whole(version.tags.get("handstill.seed"))
    if seed is None or not _FOLDER.fullmatch(name) or not _DIGEST.fullmatch(identity):
        return {}
    return {"name": printable(name), "seed": seed, "identity": identity}


def _trained_here(version: ModelVersion, students: Path) -> Path | None:
    """The same student in a workdir, by its identity; tags that would lead elsewhere lead nowhere."""
    said = _said_of(version)
    if not said:
        return None
    folder = students / said["name"] / f"seed-{said['seed']}" / said["identity"][:16] / STUDENT
    return folder if folder.is_dir() else None
