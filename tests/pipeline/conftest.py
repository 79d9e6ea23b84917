from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.pipeline import inline
from tests.pipeline.commands import as_json, handstill
from tests.pipeline.lab import Lab
from tests.tiny_experiment import make_experiment


@pytest.fixture(autouse=True)
def _no_server_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """The command line takes the logger for itself; pytest's capturing needs it back."""
    logger = logging.getLogger("handstill")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture
def inline_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process, without Ray."""
    inline.install(monkeypatch)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny experiment that ran from tars to report; tests work on copies. `run.json` holds what `run --json` said."""
    folder = tmp_path_factory.mktemp("finished")
    config = make_experiment(folder, {"train.steps": 1})
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        inline.install(patch)
        answer = handstill("run", "-c", config, "--json")
    assert answer.code == 0, answer.err
    (folder / "run.json").write_text(answer.out)
    for checkpoint in (folder / "work" / "students").rglob("checkpoint.pt"):
        checkpoint.unlink()  # only to resume from, and most of the bytes of a copy
    return folder


@pytest.fixture
def lab(finished: Path, tmp_path: Path, inline_workers: None) -> Lab:
    """A finished experiment of one's own, nothing to do. Sources at a new place are scanned anew, nothing more."""
    folder = tmp_path / "experiment"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("mlflow-artifacts"))
    found = Lab(folder / "pipeline.yaml")
    as_json(found.config, "run", "ingest")
    return found
