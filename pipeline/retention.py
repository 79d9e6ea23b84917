"""Which stale outputs stay all the same: those that `retention` of the configuration keeps, or that somebody needs.

Stale is what no plan refers to (`pipeline.clean`). Kept of it is what is pinned, what holds records that MLflow has not
got, the youngest few, what has not been stale for long enough, and what an unfinished training that is kept reads.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline.config import KeepConfig, RetentionConfig
from pipeline.experiment import Experiment
from pipeline.spool import SPOOL, Spool
from storage.durable import canonical_json, write_bytes_atomic
from storage.errors import DamageError, InputError
from storage.identity import stored_identity
from storage.snapshots import read_snapshot, snapshot_path

DAY_S = 86400.0


@dataclass(frozen=True)
class Stale:
    """An output that no plan refers to."""

    path: Path
    policy: KeepConfig
    among: str | None = None
    """Those it is ranked with for `keep_last`; None: it is a part of something that is not stale, and has no rank."""
    has_spool: bool = False
    """Whether records for MLflow may lie in it."""


def stale_output(path: Path, retention: RetentionConfig) -> Stale:
    """A student's or a score's folder, ranked among those of its name and seed."""
    return Stale(path, retention.students, str(path.parent), has_spool=True)


def stale_cache(root: Path, retention: RetentionConfig) -> Stale:
    """A whole cache, ranked among those of its role."""
    identity = stored_identity(root)
    return Stale(root, retention.caches, "unknown role" if identity is None else str(identity.get("role")))


def kept(experiment: Experiment, stale: Iterable[Stale], *, remember: bool) -> dict[Path, str]:
    """Which of them stay, and why.

    remember: write down what is stale since now; `keep_days` counts from there.

    Raises:
        InputError: `retention.pinned` names what is not there: it may be misspelt, and what was meant would be deleted.
    """
    items = list(stale)
    retention = experiment.config.retention
    _check_pins(experiment, retention.pinned)
    since = _stale_since(experiment, items, remember=remember)
    reasons = {
        item.path: why
        for item in items
        if (why := _why_kept(item, items, since[item.path], pinned=_is_pinned(item.path, retention.pinned))) is not None
    }
    needed = _needed_by_trainings(experiment, [*reasons, *_pinned_students(experiment)])
    return reasons | {item.path: needed[item.path] for item in items if item.path in needed}


def undelivered(folder: Path) -> int:
    """Records for MLflow, in the spools below a folder, that it has not got."""
    return sum(Spool(path.parent).left() for path in folder.rglob(SPOOL))


def cut_events(path: Path, policy: KeepConfig, now_s: float) -> int:
    """Take from the event log what the policy does not keep: whole runs, the oldest first; the bytes that went.

    Only while nobody has the workdir but the caller.
    """
    keep_from, _ = _old_events(path, policy, now_s)
    if keep_from:
        write_bytes_atomic(path, path.read_bytes()[keep_from:])
    return keep_from


def old_event_bytes(path: Path, policy: KeepConfig, now_s: float) -> int:
    """How many bytes `cut_events` would take."""
    return _old_events(path, policy, now_s)[0]


def old_summaries(folder: Path, policy: KeepConfig, now_s: float) -> list[Path]:
    """The summaries of runs whose events would go."""
    paths = sorted(folder.glob("*.json"))
    if policy.keep_days is None and not policy.keep_last:
        return []
    young_s = now_s - (policy.keep_days or 0.0) * DAY_S
    last = set(paths[-policy.keep_last :]) if policy.keep_last else set()
    return [path for path in paths if path not in last and path.stat().st_mtime < young_s]


def _old_events(path: Path, policy: KeepConfig, now_s: float) -> tuple[int, int]:
    """(the byte from which on events are kept, the size of the log)."""
    if not path.is_file():
        return 0, 0
    runs: list[tuple[int, float]] = []
    size = 0
    with path.open("rb") as file:
        for line in file:
            if b'"run_started"' in line:
                runs.append((size, float(json.loads(line)["time"])))
            size += len(line)
    if policy.keep_days is None and not policy.keep_last:
        return 0, size
    young_s = now_s - (policy.keep_days or 0.0) * DAY_S
    young = [begin for begin, time_s in runs if time_s >= young_s]
    last = [begin for begin, _ in runs[-policy.keep_last :]] if policy.keep_last else []
    return min([*young, *last], default=runs[-1][0] if runs else 0), size


def _why_kept(item: Stale, among: list[Stale], since_s: float, *, pinned: bool) -> str | None:
    if pinned:
        return "pinned"
    if item.has_spool and (left := undelivered(item.path)):
        return f"{left} records of it are not in MLflow yet; a run delivers them"
    policy = item.policy
    if item.among is not None and policy.keep_last:
        ranked = sorted((other.path for other in among if other.among == item.among), key=_age_key, reverse=True)
        if item.path in ranked[: policy.keep_last]:
            return f"among the last {policy.keep_last}"
    if policy.keep_days is not None and time.time() - since_s < policy.keep_days * DAY_S:
        day = datetime.fromtimestamp(since_s, UTC)
        return f"stale since {day:%Y-%m-%d}, kept for {policy.keep_days:g} days"
    return None


def _age_key(path: Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, str(path)


def _stale_since(experiment: Experiment, items: list[Stale], *, remember: bool) -> dict[Path, float]:
    """When each was first found stale; now, where that is news."""
    path = experiment.workdir.state / "stale_since.json"
    try:
        before: Mapping[str, float] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        before = {}  # it may be lost: then all of it is stale since now
    now_s = round(time.time(), 3)
    found = {item.path: float(before.get(str(item.path), now_s)) for item in items}
    if remember:
        data = canonical_json({str(item): since_s for item, since_s in found.items()})
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(path, data)
    return found


def _is_pinned(path: Path, pins: Iterable[str]) -> bool:
    return any(path.name == pin or path.parts[-len(Path(pin).parts) :] == Path(pin).parts for pin in pins)


def _check_pins(experiment: Experiment, pins: Iterable[str]) -> None:
    there = list(_pinnable(experiment)) if pins else []
    wrong = [pin for pin in pins if not any(_is_pinned(path, [pin]) for path in there)]
    if wrong:
        raise InputError(
            f"retention.pinned: no student, score or cache is named {', '.join(map(repr, wrong))}; want the last "
            f"part of a folder below {experiment.workdir.students}, {experiment.workdir.evaluations} or "
            f"{experiment.caches_folder}. Nothing was deleted."
        )


def _pinnable(experiment: Experiment) -> Iterator[Path]:
    workdir = experiment.workdir
    yield from workdir.students.glob("*/*/*")
    yield from workdir.evaluations.glob("*/*")
    yield from experiment.caches_folder.glob("*")


def _pinned_students(experiment: Experiment) -> Iterator[Path]:
    pins = experiment.config.retention.pinned
    return (path for path in experiment.workdir.students.glob("*/*/*") if _is_pinned(path, pins))


def _needed_by_trainings(experiment: Experiment, folders: Iterable[Path]) -> dict[Path, str]:
    """What of the caches a training reads that is pinned, or kept and not finished: cache, snapshots, their shards."""
    needed: dict[Path, str] = {}
    pins = experiment.config.retention.pinned
    for folder in folders:
        identity_file = folder / "identity.json"
        if not folder.is_relative_to(experiment.workdir.students) or not identity_file.is_file():
            continue
        if (folder / "result.json").is_file() and not _is_pinned(folder, pins):
            continue  # it has what it needed
        identity = json.loads(identity_file.read_bytes())
        root = experiment.caches_folder / str(identity["cache"])
        why = f"{folder.relative_to(experiment.workdir.students)} reads it"
        needed[root] = why
        for digest in identity["snapshots"].values():
            table = snapshot_path(root, str(digest))
            needed |= {table: why, table.with_suffix(".json"): why}
            needed |= {root / "shards" / f"{name}.zarr": why for name in _shards_of(table)}
    return needed


def _shards_of(snapshot: Path) -> set[str]:
    try:
        return set(read_snapshot(snapshot, ["shard"])["shard"].drop_null().to_pylist())
    except (DamageError, InputError):
        return set()  # gone or damaged: that training will not go on anyway
