"""Whether everything that a configuration names is there, before any work starts; all that is missing at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from models.backbone_names import may_be_known
from models.hand_model import OPEN_HAND
from models.model_config import model_config_path
from pipeline.experiment import Experiment
from stages.config import HamerNpzDataset
from stages.ingest import source_files
from storage.errors import InputError
from storage.inputs import is_file, is_folder
from trainer.config import StudentRecipe, grid_problem


def check_inputs(experiment: Experiment, *, backbones: bool = True) -> None:
    """Look for every file that the configuration names.

    Args:
        backbones: also look whether each backbone gives what its student needs (importing timm takes seconds); if not,
            only whether its name is known.

    Raises:
        InputError: listing everything that is missing or is not what its digest says.
    """
    problems = [*_teacher_problems(experiment), *_dataset_problems(experiment), *_weights_problems(experiment)]
    problems += _backbone_problems(experiment, thoroughly=backbones)
    if problems:
        raise InputError("the configuration names what is not there:\n" + "\n".join(f"  {line}" for line in problems))


def _config_problem(checkpoint: Path) -> str | None:
    try:
        model_config_path(checkpoint)
    except InputError as error:
        return str(error)
    return None


def _teacher_problems(experiment: Experiment) -> Iterator[str]:
    teacher = experiment.config.teacher
    checkpoint = experiment.path(teacher.checkpoint)
    if not is_file(checkpoint):
        yield f"teacher.checkpoint: no file {checkpoint}; want HaMeR's Lightning checkpoint (hamer.ckpt)"
    elif (problem := _config_problem(checkpoint)) is not None:
        yield f"teacher.checkpoint: {problem}"
    elif teacher.checkpoint_sha256 is not None:
        found = experiment.digests.sha256(checkpoint)
        if found != teacher.checkpoint_sha256:
            yield (
                f"teacher.checkpoint_sha256: {checkpoint} has sha256 {found}, the configuration wants "
                f"{teacher.checkpoint_sha256}; bring the right file, or correct the digest"
            )
    hand = teacher.mano_model
    if hand is not None and hand != OPEN_HAND and not experiment.path(hand).is_file():
        yield f"teacher.mano_model: no file {experiment.path(hand)}; want MANO_RIGHT.pkl, or {OPEN_HAND}"


def _dataset_problems(experiment: Experiment) -> Iterator[str]:
    for name, dataset in experiment.datasets.items():
        if name in experiment.synthesised:
            continue
        yield from _complaint(f"datasets.{name}", partial(source_files, dataset, experiment.base))
        if isinstance(dataset, HamerNpzDataset):
            wanted = {"truth_xyz": dataset.truth_xyz, "truth_verts": dataset.truth_verts}
            for key, value in wanted.items():
                if value is not None and not is_file(experiment.path(value)):
                    yield f"datasets.{name}.{key}: no file {experiment.path(value)}"
            if not is_folder(experiment.path(dataset.image_dir)):
                yield f"datasets.{name}.image_dir: no folder {experiment.path(dataset.image_dir)}"


def _weights_problems(experiment: Experiment) -> Iterator[str]:
    for name, recipe in experiment.recipes().items():
        if recipe.weights is not None and not (weights := experiment.path(recipe.weights)).is_file():
            hint = "; it is a folder, name the file in it" if weights.is_dir() else "; nothing is ever downloaded"
            yield f"students.{name}.weights: no file {weights}{hint}"
        mocap = None if recipe.prior is None else recipe.prior.mocap
        if mocap is not None and not experiment.path(mocap).is_file():
            yield f"students.{name}.prior.mocap: no file {experiment.path(mocap)}; null takes the batch's own labels"


def _backbone_problems(experiment: Experiment, *, thoroughly: bool) -> Iterator[str]:
    for name, recipe in experiment.recipes().items():
        if thoroughly or not may_be_known(recipe.backbone):
            yield from _complaint(f"students.{name}.backbone", partial(_check_backbone, recipe, experiment))


def _check_backbone(recipe: StudentRecipe, experiment: Experiment) -> None:
    from models.student import feature_shape
    from trainer.learner import student_spec

    tokens = feature_shape(student_spec(recipe), recipe.distill.compared_stride)[1:]
    problem = grid_problem(recipe.distill, experiment.config.cache.features.grid, tokens)
    if problem is not None:
        raise InputError(problem)


def _complaint(where: str, look: Callable[[], object]) -> Iterator[str]:
    try:
        look()
    except InputError as error:
        yield f"{where}: {error}"
