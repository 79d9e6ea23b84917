"""One experiment as a run sees it: the configuration, where its paths start, where its outputs go."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import PipelineConfig, Role, resolve_path
from pipeline.digests import DigestMemory
from pipeline.inputs import with_copies
from pipeline.job_code import JOB_BASE
from pipeline.loading import load_config
from pipeline.tracking_uri import named_in_environment
from pipeline.workdir import Workdir, open_workdir
from stages.config import DatasetConfig, HamerNpzDataset
from storage.errors import InputError
from trainer.config import StudentRecipe

if TYPE_CHECKING:
    from pipeline.caches import CacheState


@dataclass(frozen=True)
class Experiment:
    """A loaded configuration with its paths resolved. `limit`: a smoke run on the first samples of each set."""

    config: PipelineConfig
    file: Path
    """The configuration's own path."""
    base: Path
    workdir: Workdir
    limit: int | None = None
    rehash: bool = False
    reread: set[str] = field(default_factory=set)
    """Shards and sources that were read again and found whole; only where everything is hashed again."""

    caches: dict[Role, CacheState] = field(default_factory=dict)
    """States of the caches, read once a process; `pipeline.caches` fills it, and empties it when they change."""

    @cached_property
    def digests(self) -> DigestMemory:
        """Digests of checkpoints and other single files, read once a process at most."""
        return DigestMemory(self.workdir.state / "digests.json", rehash=self.rehash)

    @property
    def caches_folder(self) -> Path:
        """Parent of the caches; a smoke run's lie in its own workdir."""
        root = self.config.cache.root
        return self.workdir.caches if root is None or self.limit is not None else self.path(root)

    @property
    def cache_references(self) -> Path:
        """Where those who use the caches' folder write down what they refer to, and lock it."""
        if self.caches_folder == self.workdir.caches:
            return self.workdir.references
        return self.caches_folder / "references"

    @property
    def synthesised(self) -> frozenset[str]:
        """The data sets that the synthesise stage makes."""
        return frozenset(self.config.synthesise.sets if self.config.synthesise is not None else ())

    @property
    def datasets(self) -> Mapping[str, DatasetConfig]:
        """The data sets; in a smoke run those that are synthesised lie under the smoke run's own workdir."""
        if self.limit is None:
            return self.config.datasets
        return {
            name: self._relocated(dataset) if name in self.synthesised else dataset
            for name, dataset in self.config.datasets.items()
        }

    def _relocated(self, dataset: DatasetConfig) -> DatasetConfig:
        inside = self.workdir.root / "data"

        def move(path: str) -> str:
            return str(inside / Path(*[part for part in Path(path).parts if part not in ("/", "..", "~")]))

        if isinstance(dataset, HamerNpzDataset):
            truth = {key: move(value) for key in ("truth_xyz", "truth_verts") if (value := getattr(dataset, key))}
            return dataset.model_copy(
                update={"path": move(dataset.path), "image_dir": move(dataset.image_dir), **truth}
            )
        paths = [dataset.path] if isinstance(dataset.path, str) else dataset.path
        return dataset.model_copy(update={"path": [move(path) for path in paths]})

    def datasets_by_role(self) -> list[tuple[Role, str, DatasetConfig]]:
        """(role, name, section) of every set that is trained or evaluated on; a set may have both roles."""
        roles: tuple[Role, ...] = ("train", "evaluate")
        return [(role, name, self.datasets[name]) for role in roles for name in self.config.datasets_of(role)]

    def recipes(self) -> dict[str, StudentRecipe]:
        """Every student's full recipe; a smoke run trains a few steps only, on batches that its samples fill."""
        found = {name: student.resolve(self.config.train) for name, student in self.config.students.items()}
        if self.limit is None:
            return found
        return {name: smoke_recipe(recipe, self.limit) for name, recipe in found.items()}

    def path(self, path: str) -> Path:
        """A path of the configuration, resolved."""
        return resolve_path(path, self.base)


def smoke_recipe(recipe: StudentRecipe, limit: int) -> StudentRecipe:
    """A recipe that goes once or twice over `limit` samples."""
    batch = min(recipe.batch_size, limit)
    steps = min(recipe.steps, max(2, limit // batch))
    return recipe.model_copy(update={"steps": steps, "batch_size": batch})


def open_experiment(config_path: Path, *, limit: int | None = None, rehash: bool = False) -> Experiment:
    """The experiment in a configuration file. In a submitted job it is on the job's cluster, its paths where they were.

    Raises:
        InputError: the file is wrong, or the limit is not positive.
    """
    config = load_config(config_path)
    base = config_path.absolute().parent
    if JOB_BASE in os.environ:
        base = Path(os.environ[JOB_BASE])
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": "auto"})})
    config = with_copies(config)
    if limit is not None and limit < 1:
        raise InputError(f"--limit: found {limit}, want a number of samples of at least 1")
    workdir = open_workdir(config.workdir, base)
    if workdir.store is not None:
        _check_on_store(config)
    if limit is not None:
        workdir = workdir.below(f"smoke-{limit}")
    workdir.refresh()
    return Experiment(config, config_path.absolute(), base, workdir, limit, rehash)


def _check_on_store(config: PipelineConfig) -> None:
    """What a workdir on an object store asks of the rest of a configuration."""
    if not (config.tracking.uri or named_in_environment()):
        raise InputError(
            "tracking.uri: not set, and the workdir is on an object store, where no MLflow database can lie. "
            "Name an MLflow server here or in MLFLOW_TRACKING_URI."
        )
    if config.cache.root is not None:
        raise InputError(
            f"cache.root: found {config.cache.root!r}, and the workdir is on an object store, where the caches lie in "
            "it; leave cache.root out."
        )
