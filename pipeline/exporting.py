"""`handstill export`: which trained student is meant, what is known about it, and where its export goes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.hand_model import OPEN_HAND
from pipeline.caches import cache_state
from pipeline.config import Role, did_you_mean
from pipeline.digests import digest_of
from pipeline.evaluating import EvaluationState, evaluation_states
from pipeline.experiment import Experiment, open_experiment
from pipeline.tables import human_bytes
from pipeline.training import StudentState, student_states
from storage.errors import InputError
from trainer.config import REGISTERED
from trainer.job import RESULT, STUDENT, read_result, student_folder

if TYPE_CHECKING:
    from pipeline.registered import RegisteredStudent
    from trainer.evaluate import EvaluationResult, EvaluationSet
    from trainer.export import ExportJob, ExportResult

SELECT_BY = "pa_mpjpe_mm"
"""The seed that scores best by this on the first evaluation set is exported."""
NOT_KNOWN = "not known: no pipeline file that names it was at hand; ask whoever made it"
"""A data set's licence, of a student without its configuration."""


@dataclass(frozen=True)
class Wish:
    """What the command line asks for."""

    what: str
    """A student's name, or a folder."""
    seed: int | None = None
    to: Path | None = None
    with_hand_model: bool = False
    int8: bool = False


def export(config: Path, wish: Wish) -> dict[str, Any]:
    """Write the export that is wished for; the document of `--json`.

    Raises:
        InputError: there is no such student, it is not trained, or the folder is taken.
        WorkError: ONNX Runtime does not give PyTorch's joints.
    """
    from trainer.export import export_student

    if wish.what.startswith(REGISTERED):
        from pipeline.registered import registered_student

        with registered_student(wish.what, config) as registered:
            job = _of_registry(config, wish, registered)
            return _document(job, export_student(job))
    named_by_path = Path(wish.what).exists() and not _names_a_student(config, wish.what)
    job = _of_folder(config, wish) if named_by_path else _of_name(open_experiment(config), wish)
    return _document(job, export_student(job))


def _names_a_student(config: Path, what: str) -> bool:
    """A file or folder may happen to be called like a student of the configuration; the student is meant then."""
    return config.is_file() and what in open_experiment(config).config.students


# ---- which student --------------------------------------------------------------------------------------------------


def _of_name(experiment: Experiment, wish: Wish) -> ExportJob:
    """The job for a student of the configuration: as it is configured now, and trained."""
    students = experiment.config.students
    if wish.what not in students:
        raise InputError(
            f"export: found {wish.what!r}; want the name of a student, or a folder with a trained one"
            f"{did_you_mean(wish.what, students)}"
        )
    states = student_states(experiment, cache_state(experiment, "train"))
    trained = [state for state in states if state.name == wish.what and wish.seed in (None, state.seed) and state.done]
    if not trained:
        raise InputError(_untrained(experiment, wish))
    scores = _scores(experiment)
    state = choose(trained, scores)
    return _job(experiment, wish, state, scores)


def choose(trained: Sequence[StudentState], scores: Mapping[str, EvaluationResult]) -> StudentState:
    """The seed with the best score, if all have one; else the one that was trained last."""
    rated = {state.label: _rating(scores[state.label]) for state in trained if state.label in scores}
    if len(rated) == len(trained) and None not in rated.values():
        return min(trained, key=lambda state: (rated[state.label] or 0.0, state.seed))
    return max(trained, key=lambda state: ((state.folder / RESULT).stat().st_mtime_ns, state.seed))


def _rating(result: EvaluationResult) -> float | None:
    return next(iter(result.metrics.values()), {}).get(SELECT_BY)


def _untrained(experiment: Experiment, wish: Wish) -> str:
    seed = "" if wish.seed is None else f" with seed {wish.seed}"
    which = "*" if wish.seed is None else wish.seed
    older = sorted(experiment.workdir.students.glob(f"{wish.what}/seed-{which}/*/{RESULT}"))
    hint = f", or export an older one by its folder, e.g. {older[-1].parent / STUDENT}" if older else ""
    return (
        f"export: the student {wish.what}{seed} is not trained as the file describes it now (seeds: "
        f"{', '.join(map(str, experiment.config.train.seeds))}). Run `handstill run train`{hint}"
    )


def _scores(experiment: Experiment) -> dict[str, EvaluationResult]:
    """What is evaluated as things are now, by label."""
    from trainer.evaluate import read_evaluation

    states: list[EvaluationState] = [state for state in evaluation_states(experiment) if state.done]
    found = {state.label: read_evaluation(state.folder, state.digest) for state in states}
    return {label: result for label, result in found.items() if result is not None}


def _job(experiment: Experiment, wish: Wish, state: StudentState, scores: Mapping[str, EvaluationResult]) -> ExportJob:
    from trainer.export import EXPORT_VERSION, ExportJob

    if wish.to is None and experiment.workdir.store is not None:
        raise InputError(f"export {wish.what}: give --to FOLDER: the workdir is on an object store")
    options = {"with_hand_model": wish.with_hand_model, "int8": wish.int8}
    kind = "".join(f"-{name.replace('_', '-')}" for name, wished in options.items() if wished)
    name = digest_of({"export_version": EXPORT_VERSION, "student": state.digest, **options})[:8]
    training = _sets(experiment, "train", state.recipe.on)
    evaluation = _sets(experiment, "evaluate", experiment.config.evaluate.on)
    return ExportJob(
        student=state.folder / STUDENT,
        out_dir=_place(wish.to) or experiment.workdir.exports / f"{state.label}{kind}-{name}",
        provenance=_provenance(experiment, state, scores),
        with_hand_model=wish.with_hand_model,
        int8=_int8(training, evaluation) if wish.int8 else None,
        check_on=next(iter((*evaluation, *training)), None),
    )


def _place(to: Path | None) -> Path | None:
    return None if to is None else to.expanduser().absolute()


def _sets(experiment: Experiment, role: Role, names: Sequence[str]) -> tuple[EvaluationSet, ...]:
    """Those of the sets that are cached now, whole."""
    from trainer.evaluate import EvaluationSet

    cache = cache_state(experiment, role)
    digests = {name: cache.digests.get(name) for name in names}
    return tuple(
        EvaluationSet(name, cache.address, digest, experiment.datasets[name].protocol)
        for name, digest in digests.items()
        if digest is not None
    )


def _int8(training: tuple[EvaluationSet, ...], evaluation: tuple[EvaluationSet, ...]) -> Any:
    from trainer.export import Int8

    if not training:
        raise InputError("--int8: no training set is cached to calibrate on. Run `handstill run teach`")
    return Int8(calibrate_on=training, measure_on=evaluation or training)


def _of_registry(config: Path, wish: Wish, registered: RegisteredStudent) -> ExportJob:
    """The job for a student that the registry named: where the configuration has it, with the scores and licences known
    here, else with those known there."""
    experiment = open_experiment(config) if config.is_file() else None
    if experiment is not None and wish.seed is None:
        for state in student_states(experiment, cache_state(experiment, "train")):
            if state.done and state.folder / STUDENT == registered.folder:
                job = _job(experiment, wish, state, _scores(experiment))
                return replace(job, provenance={**job.provenance, "registered": registered.name})
    job = _of_folder(config, replace(wish, what=str(registered.folder)), told=wish.what)
    there = registered.known()
    licences = {
        name: _licence(experiment, name) if experiment and name in experiment.config.datasets else NOT_KNOWN
        for name in there.pop("data_sets", ())
    }
    training = {**there.pop("training", {}), **job.provenance.get("training", {})}
    provenance = {**job.provenance, **there, "training": training}
    return replace(job, provenance=provenance | ({"data_sets": licences} if licences else {}))


def _of_folder(config: Path, wish: Wish, told: str | None = None) -> ExportJob:
    """The job for a student's folder, or a checkpoint of Fast-HaMeR. Only int8 needs the configuration.

    told: what the user called it.
    """
    from trainer.export import ExportJob

    told = told or wish.what
    if wish.to is None:
        raise InputError(f"export {told}: give --to FOLDER: a student that is not named by the file has no place there")
    if wish.seed is not None:
        raise InputError(f"export {told}: --seed is for students named in the file; this is one student")
    student = student_folder(Path(wish.what))
    int8 = None
    if wish.int8:
        experiment = open_experiment(config)
        int8 = _int8(
            _sets(experiment, "train", experiment.config.train.on),
            _sets(experiment, "evaluate", experiment.config.evaluate.on),
        )
    return ExportJob(
        student=student,
        out_dir=wish.to.expanduser().absolute(),
        provenance=_known_of(student.absolute().parent),
        with_hand_model=wish.with_hand_model,
        int8=int8,
    )


# ---- what is known about it -----------------------------------------------------------------------------------------


def _provenance(experiment: Experiment, state: StudentState, scores: Mapping[str, EvaluationResult]) -> dict[str, Any]:
    config, recipe = experiment.config, state.recipe
    mine, teacher = scores.get(state.label), scores.get("teacher")
    return _known_of(state.folder) | {
        "student": {"name": state.name, "seed": state.seed, "identity": state.digest},
        "data_sets": {name: _licence(experiment, name) for name in recipe.on},
        "teacher": {"/".join(Path(config.teacher.checkpoint).parts[-3:]): config.teacher.licence},
        "metrics": {} if mine is None else mine.metrics,
        "teacher_metrics": {} if teacher is None else teacher.metrics,
        "mean_pose_metrics": {} if teacher is None else teacher.mean_pose,
        "weights": None if recipe.weights is None else "/".join(Path(recipe.weights).parts[-3:]),
        "rendered_only": recipe.weights is None and all(name in experiment.synthesised for name in recipe.on),
    }


def _licence(experiment: Experiment, dataset: str) -> str | None:
    stated = experiment.config.datasets[dataset].licence
    synthesise = experiment.config.synthesise
    if stated is None and dataset in experiment.synthesised and synthesise and synthesise.hand_model == OPEN_HAND:
        return "CC0 1.0: rendered by handstill from its open hand"
    return stated


def _known_of(folder: Path) -> dict[str, Any]:
    """What the records beside a student say of its training; empty where there are none."""
    result = read_result(folder)
    identity_file = folder / "identity.json"
    if result is None or not identity_file.is_file():
        return {}
    identity: dict[str, Any] = json.loads(identity_file.read_text(encoding="utf-8"))
    recipe = identity["recipe"]
    training = {
        "data sets (weights)": ", ".join(f"{name} ({weight:g})" for name, weight in identity["mix"].items()),
        "cache of the teacher's answers": identity["cache"],
        "steps": result.steps,
        "best step": result.best_step,
        "seed": result.seed,
    }
    training |= {key: recipe[key] for key in ("batch_size", "lr", "weight_decay", "distill") if key in recipe}
    return {
        "student": {"name": result.name, "seed": result.seed, "identity": result.identity},
        "training": training,
        "data_sets": dict.fromkeys(identity["mix"], NOT_KNOWN),
    }


# ---- what is said ---------------------------------------------------------------------------------------------------


def _document(job: ExportJob, result: ExportResult) -> dict[str, Any]:
    student = job.provenance.get("student", {})
    return {
        "ok": True,
        "student": student.get("name"),
        "seed": student.get("seed"),
        "folder": str(result.folder),
        "network": result.network,
        "bytes": result.bytes,
        "hand_model": str(result.hand_model),
        "difference_from_pytorch": asdict(result.difference),
        "int8": result.int8 or None,
    }


def export_text(document: Mapping[str, Any]) -> str:
    """The same for a person."""
    difference, graph = document["difference_from_pytorch"], "float graph " if document["int8"] else ""
    lines = [
        f"exported: {document['folder']}",
        f"network: {document['network']}, {human_bytes(document['bytes'])}",
        f"hand model: {document['hand_model']}",
        f"{graph}against PyTorch: joints within {difference['joints_mm']:.2g} mm, vertices within "
        f"{difference['vertices_mm']:.2g} mm, on {difference['pictures']} pictures",
    ]
    if document["int8"]:
        lines += [
            "what was written is its int8 form, which costs, in mm:",
            *(f"  {name}: {value:.3f}" for name, value in document["int8"].items()),
        ]
    return "\n".join(lines)
