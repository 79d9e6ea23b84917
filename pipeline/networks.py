"""Which network is meant by a name: the configuration's teacher, a student of its matrix, a folder, a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from models.hand_model import OPEN_HAND, HandModel
from models.sizes import HAMER
from models.student import Student
from storage.errors import InputError
from storage.inputs import bring
from trainer.config import REGISTERED
from trainer.job import STUDENT, student_folder

TEACHER = "teacher"


@dataclass(frozen=True)
class NamedNetwork:
    """A network ready to look, and where it came from."""

    network: nn.Module
    """In eval mode, on the CPU."""
    hand_model: HandModel
    backbone: str
    source: Path | str
    """The folder or checkpoint that was read, or the version in the registry: models:/NAME/VERSION."""

    @property
    def sees_inner_columns(self) -> bool:
        """HaMeR's ViT sees columns 32..224 of its crop only."""
        return self.backbone == HAMER


def open_network(what: str, config: Path, mano_model: str | None = None) -> NamedNetwork:
    """The network that `what` names.

    what: `teacher`, the one of the configuration; a student's name in it, or NAME/seed-N; a student's folder, as
    `train` and `Student.save` write it; a checkpoint of HaMeR, of what takes its place, or of Fast-HaMeR; a name in
    MLflow's model registry, models:/NAME@ALIAS or models:/NAME/VERSION.
    mano_model: the hand model of a checkpoint that holds none: a file or `open-hand`.
    Raises InputError where there is none, DamageError when its files do not belong together.
    """
    if what.startswith(REGISTERED):
        from pipeline.registered import registered_student

        with registered_student(what, config) as registered:
            return replace(_student(registered.folder, mano_model), source=registered.name)
    path = Path(what).expanduser()
    if path.is_file():
        return _checkpoint(path, mano_model)
    if path.is_dir() and what != TEACHER:
        return _student(student_folder(path), mano_model)
    if what == TEACHER:
        return _teacher(config, mano_model)
    return _student(_trained(what, config), mano_model)


def _checkpoint(path: Path, mano_model: str | None) -> NamedNetwork:
    from models.fast_hamer import load_fast_hamer
    from models.hamer import read_model_config
    from models.model_config import model_config_path
    from models.teacher import load_teacher

    with path.open("rb") as file:
        beginning = file.read(9)
    if not beginning.startswith((b"PK", b"\x80")) and beginning[8:] != b"{":  # torch's two kinds, safetensors
        raise InputError(
            f"--network: {path} is a file, but no checkpoint by its first bytes; name a checkpoint, a student's "
            "folder, or a student of the configuration"
        )
    tree = read_model_config(model_config_path(path))
    model = tree.get("MODEL")
    backbone = model.get("BACKBONE") if isinstance(model, dict) else None
    if isinstance(backbone, dict) and backbone.get("TYPE") == "vit":
        teacher = load_teacher(path, mano_model)
        return NamedNetwork(teacher, teacher.hand_model, HAMER, path)
    student, _ = load_fast_hamer(path, mano_model)
    return NamedNetwork(student, student.hand_model, student.spec.backbone, path)


def _teacher(config: Path, mano_model: str | None) -> NamedNetwork:
    from pipeline.experiment import open_experiment

    experiment = open_experiment(config)
    section = experiment.config.teacher
    hand = section.mano_model
    if hand is not None and hand != OPEN_HAND:
        hand = str(experiment.path(hand))
    checkpoint = experiment.path(section.checkpoint)
    bring(checkpoint)
    return _checkpoint(checkpoint, mano_model or hand)


def _student(folder: Path, mano_model: str | None) -> NamedNetwork:
    if mano_model is not None:
        raise InputError(f"--mano-model: {folder} has its own hand model; the option is for checkpoints that hold none")
    student = Student.load(folder)
    return NamedNetwork(student, student.hand_model, student.spec.backbone, folder)


def _trained(what: str, config: Path) -> Path:
    """The folder of a student of the matrix, trained as the configuration is now."""
    if not config.is_file():
        raise InputError(
            f"--network: {what!r} is no folder and no checkpoint, and there is no {config} that could have a student "
            "of that name; name a student's folder or a checkpoint, or the configuration with -c"
        )
    from pipeline.caches import cache_state
    from pipeline.config import did_you_mean
    from pipeline.experiment import open_experiment
    from pipeline.training import student_states

    experiment = open_experiment(config)
    name, _, seed = what.partition("/")
    if name not in experiment.config.students:
        names = {TEACHER: None, **experiment.config.students}
        raise InputError(
            f"--network: {what!r} is no folder, checkpoint or student of {config}{did_you_mean(name, names)}"
        )
    states = [
        state
        for state in student_states(experiment, cache_state(experiment, "train"))
        if state.name == name and seed in ("", f"seed-{state.seed}")
    ]
    for state in states:
        if state.done:
            return state.folder / STUDENT
    if not states:
        raise InputError(f"--network: {what!r}: no such seed; train.seeds has {experiment.config.train.seeds}")
    older = sorted(path.parent for state in states for path in state.parent.glob("*/result.json"))
    hint = f"; an older one is in {older[-1]}: name that folder" if older else ""
    raise InputError(f"--network: {what!r} is not trained as {config} is now: handstill run train{hint}")
