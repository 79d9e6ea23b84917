"""A trained student as a model of MLflow: with a signature, loadable by `mlflow.pyfunc.load_model`, in the registry.

The model is the student's own folder (safetensors and JSON) and the name of the module that reads it, `models.pyfunc`;
nothing is pickled. Doing it again finds what was done: one model a run, one version a name and identity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, Schema, TensorSpec

from pipeline.provenance import provenance_tags
from storage.durable import partial_path, remove_tree

IDENTITY = "handstill.identity"
_REQUIREMENTS = ("torch", "torchvision", "timm", "safetensors", "numpy", "pydantic")
"""What the loader needs beside handstill, which no package index has."""
_DATA = "student"
"""The student's folder within the model."""


@dataclass(frozen=True)
class ModelRequest:
    """What a student's model is to be called."""

    name: str
    """Of the model in its run."""
    registered: str
    """In the registry."""
    tags: dict[str, str]
    step: int
    """At which the weights are from."""


def registered_name(experiment: str, student: str) -> str:
    """`<experiment>-<student>`, without what a registry does not allow in a name."""
    return re.sub(r"[^A-Za-z0-9._ -]+", "-", f"{experiment}-{student}").strip("-")


def register_student(
    client: MlflowClient, experiment_id: str, run_id: str, student: Path, request: ModelRequest
) -> None:
    """Make a student's folder a model of its run and a version in the registry, where it is not yet."""
    model = _model_of_run(client, experiment_id, run_id, request)
    if model.status != LoggedModelStatus.READY:
        _upload(client, student, model.model_id, run_id)
        client.finalize_logged_model(model.model_id, "READY")
    outputs = client.get_run(run_id).outputs
    if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, request.step)])
    _register(client, model, run_id, request)


def _model_of_run(client: MlflowClient, experiment_id: str, run_id: str, request: ModelRequest) -> LoggedModel:
    """The run's model, READY, or PENDING where its files are not there yet."""
    found = client.search_logged_models([experiment_id], f"tags.`{IDENTITY}` = '{request.tags[IDENTITY]}'")
    for model in found:
        if model.source_run_id == run_id:
            return model
    return client.create_logged_model(experiment_id, request.name, run_id, request.tags)


def model_of_run(client: MlflowClient, experiment_id: str, run_id: str) -> LoggedModel | None:
    """The finished model of a run; None where it has none."""
    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    return next((model for model in found if model.status == LoggedModelStatus.READY), None)


def make_registered_model(client: MlflowClient, name: str) -> None:
    """Make a registered model, unless it is there."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _register(client: MlflowClient, model: LoggedModel, run_id: str, request: ModelRequest) -> None:
    make_registered_model(client, request.registered)
    identity = request.tags[IDENTITY]
    if client.search_model_versions(f"name = '{request.registered}' and tags.`{IDENTITY}` = '{identity}'"):
        return
    # The place and not models:/<id>, which a database's client looks up in another store: MLflow's default one.
    client.create_model_version(
        request.registered,
        model.artifact_location,
        run_id,
        tags=request.tags,
        model_id=model.model_id,
        await_creation_for=0,
    )


def _upload(client: MlflowClient, student: Path, model_id: str, run_id: str) -> None:
    """The student's folder, and beside it what MLflow wants to know: who reads it, what goes in, what comes out.

    Written by hand, as any flavour's own writer does: `mlflow.pyfunc.save_model` would copy the student first.
    """
    model = Model(run_id=run_id, model_id=model_id, signature=signature(student), metadata=_about())
    model.add_flavor(
        "python_function",
        loader_module="models.pyfunc",
        data=_DATA,
        python_version=python_version(),
        env={"virtualenv": "python_env.yaml"},
    )
    about = partial_path(student)
    about.mkdir()
    try:
        model.save(str(about / "MLmodel"))
        (about / "requirements.txt").write_text("".join(f"{name}=={version(name)}\n" for name in _REQUIREMENTS))
        (about / "python_env.yaml").write_text(f"python: {python_version()}\ndependencies:\n- -r requirements.txt\n")
        client.log_model_artifacts(model_id, str(student), _DATA)
        client.log_model_artifacts(model_id, str(about))
    finally:
        remove_tree(about)


def signature(student: Path) -> ModelSignature:
    """float32 crops in; what the student says of each, its features left out, out."""
    from models.pyfunc import INPUT_SHAPE, answer_shapes  # brings torch, which the driver does without

    images = Schema([TensorSpec(np.dtype("float32"), INPUT_SHAPE)])
    answers: list[ColSpec | TensorSpec] = [
        TensorSpec(np.dtype("float32"), shape, name) for name, shape in answer_shapes(student).items()
    ]
    return ModelSignature(images, Schema(answers))


def _about() -> dict[str, Any]:
    from models.preprocessing import IMAGE_MEAN, IMAGE_STD
    from models.sizes import IMAGE_SIZE

    return {
        "input": f"RGB crops of {IMAGE_SIZE} px; pixels / 255, minus the mean, over the standard deviation",
        "mean": list(IMAGE_MEAN),
        "std": list(IMAGE_STD),
        "needs": f"handstill {provenance_tags()['handstill.version']} on the path",
    }
