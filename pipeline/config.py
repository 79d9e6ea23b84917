"""pipeline.yaml as one typed, frozen value, with the sections that only the pipeline reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pipeline.tracking_uri import without_password
from stages.config import AuditConfig, DatasetConfig, SynthesiseConfig, TeacherConfig
from storage.config import CacheConfig, Section
from trainer.config import (
    REGISTERED,
    CompareConfig,
    DistillConfig,
    EvaluateConfig,
    StudentConfig,
    TrainConfig,
    TrainOptions,
    grid_problem,
    shares_problem,
)

Role = Literal["train", "evaluate"]
SomeSection = TypeVar("SomeSection", bound=Section)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""What may be part of a file's name on every system."""


class TrackingConfig(Section):
    """Where MLflow keeps the runs."""

    uri: Annotated[str, AfterValidator(without_password)] | None = None
    """null: a SQLite file in the workdir; the environment's MLFLOW_TRACKING_URI wins over both. No password in it."""
    experiment: str = Field(default="handstill", min_length=1)
    register_models: bool = True
    """Whether every trained student becomes a model of its run and a version of `<experiment>-<student>` in the model
    registry. If not, its files are an artifact of the run."""
    patience_s: float = Field(default=30.0, ge=0)
    """How long the end of a student waits for a server that does not answer; what is left is delivered by the next
    run."""
    system_metrics_s: float = Field(default=10.0, gt=0)
    """How often CPU, memory and GPU are looked at while a student trains."""


class ClusterConfig(Section):
    """Where the work runs, and how much of it may."""

    address: str = Field(default="local", pattern=r"^(local|auto|ray://.+)$")
    """local: a Ray of our own on this machine, loopback only. auto: the cluster we are on. ray://…: that cluster. A
    submitted job works on the cluster it was submitted to."""
    jobs: str | None = Field(default=None, pattern=r"^https?://.+$")
    """The job server that `handstill submit` talks to, the head's dashboard; null: the environment's
    RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    job_python: str = Field(default="python", min_length=1)
    """The nodes' interpreter for a submitted job, with the dependencies installed."""
    max_retries: int = Field(default=3, ge=0)
    """How often a unit of work whose worker died is given to another."""
    shard_timeout_s: float | Literal["auto"] = Field(default="auto")
    """A teacher that works longer on one shard hangs: it is killed and the shard given to another. auto: ten times the
    slowest of this run so far, by its views, and never less than five minutes (pipeline/patience.py)."""
    stop_within_s: float = Field(default=25.0, ge=1)
    """After SIGTERM, the notice of a spot instance or of Kubernetes, the run is over within this time: shards that can
    be finished are, the others are left for the next run. Less than the 30 s that both give."""
    max_gpu_hours: float | None = Field(default=None, gt=0)
    """A run whose plan costs more stops before it starts."""

    @field_validator("shard_timeout_s")
    @classmethod
    def _lasts(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and value <= 0:
            raise ValueError("want auto, or seconds above 0")
        return value


def _is_web_address(url: SecretStr) -> SecretStr:
    if not url.get_secret_value().startswith(("http://", "https://")):
        raise ValueError("want an address that begins with http:// or https:// (it is a secret, so it is not shown)")
    return url


class NotifyConfig(Section):
    """Who is told how a run ended. What goes wrong in telling is logged, and changes nothing."""

    command: list[str] = Field(default=[])
    """A program and its arguments, run without a shell; it gets the run's summary as JSON on stdin."""
    url: Annotated[SecretStr, AfterValidator(_is_web_address)] | None = None
    """A webhook that gets the summary as a POST. Never shown or logged; the environment's HANDSTILL_NOTIFY_URL wins."""
    on: list[Literal["failure", "success", "busy"]] = Field(default=["failure"])
    """Which endings are worth telling; busy: another run had the workdir, so that this one did nothing."""
    timeout_s: float = Field(default=10.0, gt=0)
    """How long each of them may take."""


class KeepConfig(Section):
    """How much of what no plan refers to any more is kept all the same; nothing, unless told."""

    keep_days: float | None = Field(default=None, ge=0)
    """So long after `clean`, or a run's end, first found it stale."""
    keep_last: int = Field(default=0, ge=0)
    """The so many youngest: of caches those of each role, of students and scores those of each name and seed."""


class RetentionConfig(Section):
    """What `clean` leaves of stale outputs. What a configuration refers to is never deleted."""

    caches: KeepConfig = KeepConfig()
    """Also calibrations and manifests, and stale shards and snapshots of caches in use, to which keep_days applies."""
    students: KeepConfig = KeepConfig()
    """And their scores."""
    events: KeepConfig = KeepConfig()
    """The event log and the summaries of runs; keep_last counts runs. Neither number: all of it stays."""
    pinned: list[str] = Field(default=[])
    """Folders that always stay, by their last part: a cache's fingerprint, a student's identity, or
    hybrid/seed-0/<identity>. What a pinned student was trained on stays with it."""
    at_end: bool = False
    """Whether every run that succeeds cleans up at its end."""


class PipelineConfig(Section):
    """The whole experiment; sections in the order in which they run."""

    schema_version: Literal[1]
    name: Name
    workdir: str = Field(min_length=1)
    """All outputs go here. A relative path starts at this file's folder."""
    seed: int = Field(default=0, ge=0)
    synthesise: SynthesiseConfig | None = None
    datasets: dict[Name, DatasetConfig]
    teacher: TeacherConfig
    cache: CacheConfig = CacheConfig()
    audit: AuditConfig = AuditConfig()
    train: TrainConfig
    students: dict[Name, StudentConfig]
    evaluate: EvaluateConfig
    compare: CompareConfig = CompareConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
    notify: NotifyConfig = NotifyConfig()
    retention: RetentionConfig = RetentionConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> PipelineConfig:
        wrong = disagreements(self.model_dump(mode="json"))
        if wrong:
            raise PydanticCustomError("references", "{problems}", {"problems": "\n".join(wrong)})
        return self

    def datasets_of(self, role: Role) -> list[str]:
        """The data sets that some student trains on, or that are evaluated on, in the file's order."""
        if role == "evaluate":
            used = set(self.evaluate.on)
        else:
            used = {name for student in self.students.values() for name in student.resolve(self.train).on}
        return [name for name in self.datasets if name in used]


def disagreements(document: Mapping[str, Any]) -> list[str]:
    """What is wrong between the sections of a configuration: names that refer to nothing, grids that serve nobody.

    Takes the plain mapping, so that a file with other mistakes gets these told as well; what is not of the right shape
    is passed over here.
    """
    datasets, students = _mapping(document.get("datasets")), _mapping(document.get("students"))
    wrong = [
        f"{place}: no data set is named {name!r}{did_you_mean(name, datasets)}"
        for place, names in _uses_of_datasets(document)
        for name in names
        if datasets and name not in datasets
    ]
    gate = _mapping(_mapping(document.get("compare")).get("gate"))
    evaluated = _names(_mapping(document.get("evaluate")).get("on"))
    if isinstance(scored := gate.get("dataset"), str) and evaluated and scored not in evaluated:
        wrong.append(f"compare.gate.dataset: {scored!r} is not evaluated on{did_you_mean(scored, evaluated)}")
    wrong += [
        f"compare.gate.students: no student is named {name!r}{did_you_mean(name, students)}"
        for name in _names(gate.get("students"))
        if name not in students
    ]
    baseline = gate.get("baseline")
    if isinstance(baseline, str) and not baseline.startswith(REGISTERED) and baseline not in students:
        wrong.append(f"compare.gate.baseline: no student is named {baseline!r}{did_you_mean(baseline, students)}")
    if (
        _mapping(document.get("compare")).get("promote")
        and _mapping(document.get("tracking")).get("register_models") is False
    ):
        wrong.append("compare.promote: the winner's model is what is registered, and tracking.register_models is false")
    if document.get("students") == {}:
        wrong.append("students: names no student; want at least one")
    return [*wrong, *_unserved_students(document), *_unequal_shares(document)]


def _uses_of_datasets(document: Mapping[str, Any]) -> Iterator[tuple[str, Collection[str]]]:
    """(dotted path, the data sets it names)."""
    yield "train.on", _names(_mapping(document.get("train")).get("on"))
    yield "evaluate.on", _names(_mapping(document.get("evaluate")).get("on"))
    for name, student in _mapping(document.get("students")).items():
        yield f"students.{name}.on", _names(_mapping(student).get("on"))
    yield "synthesise.sets", list(_mapping(_mapping(document.get("synthesise")).get("sets")))


def _unserved_students(document: Mapping[str, Any]) -> Iterator[str]:
    cache = _read(CacheConfig, document.get("cache", {}))
    for name, section in _mapping(document.get("students")).items():
        distill = _read(DistillConfig, _mapping(section).get("distill", {}))
        if cache is not None and distill is not None:
            problem = grid_problem(distill, cache.features.grid)
            if problem is not None:
                yield f"students.{name}: {problem}"


def _unequal_shares(document: Mapping[str, Any]) -> Iterator[str]:
    train = {"batch_size": TrainOptions.model_fields["batch_size"].default} | dict(_mapping(document.get("train")))
    for name, section in _mapping(document.get("students")).items():
        own = _mapping(section)
        size = own.get("batch_size", train["batch_size"])
        workers = {"count": 1} | dict(_mapping(train.get("workers"))) | dict(_mapping(own.get("workers")))
        if isinstance(size, int) and isinstance(count := workers["count"], int) and count > 0:
            problem = shares_problem(size, count)
            if problem is not None:
                yield f"students.{name}: {problem}"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _names(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _read(kind: type[SomeSection], value: object) -> SomeSection | None:
    try:
        return kind.model_validate(value)
    except ValidationError:
        return None  # told on its own


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or what there is to choose from."""
    known = [str(item) for item in known]
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def resolve_path(path: str, base: Path) -> Path:
    """A path of the file: ~ expands, relative ones start at the folder of the configuration file."""
    return (base / Path(path).expanduser()).absolute()
