"""What a run must remember so that it can be had again: the configuration as it was read, its digest, the command."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

import yaml

from pipeline.experiment import Experiment
from storage.durable import write_bytes_atomic
from trainer.origins import COMMAND, CONFIGURATION

PIPELINE_YAML = "pipeline.yaml"
"""In the folder of what has a run; in MLflow under `configuration/`."""


def keep_configuration(experiment: Experiment, folder: Path) -> dict[str, str]:
    """Write the resolved configuration into the folder of a run, where it is not yet; the tags that name it.

    One that was begun with another file, which decides the same weights, keeps the file that it was begun with.
    """
    path = folder / PIPELINE_YAML
    if not path.is_file():
        document = experiment.config.model_dump(mode="json")
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(path, yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode())
    limit = [] if experiment.limit is None else ["--limit", str(experiment.limit)]
    return {
        CONFIGURATION: hashlib.sha256(path.read_bytes()).hexdigest(),
        COMMAND: shlex.join(["handstill", "-c", experiment.file.name, "run", *limit]),
    }
