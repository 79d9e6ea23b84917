"""Which keys of an identity changed: the nearest older identity on disk beside the one that is wanted now.

An identity is what decides an output (a cache, a student, a score), as JSON; its digest names the output's folder, and
the folder keeps it spelled out. Nearest is the one with the fewest keys that differ, the youngest of equals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.experiment import Experiment
from storage.identity import CACHE_JSON, stored_identity
from trainer.config import StudentRecipe, TrainOptions

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN_DIGITS = 12
_OF_THE_CODEC = ("features.calibration.", "features.codec_sha256")
"""Keys of a cache's identity that fitted encodings have. Before calibration the second is null."""


@dataclass(frozen=True)
class Change:
    """One key whose value differs."""

    of: str
    """The student, the scored network, or the cache's role."""
    key: str
    """As the configuration names it, where it does."""
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"changed: {self.key} {_shown(self.old)} -> {_shown(self.new)}"

    def as_json(self) -> dict[str, Any]:
        """An entry of `changes` in `plan --json`."""
        return {"of": self.of, "key": self.key, "old": self.old, "new": self.new}


def cache_changes(root: Path, role: str, identity: Mapping[str, Any]) -> list[Change]:
    """What a cache that is to be made has unlike the nearest one of its role that stands beside it."""
    older = [found for found in _identities(root.parent.glob(f"*/{CACHE_JSON}")) if found.get("role") == role]
    return [
        Change(role, _key_of_cache(key), old, new)
        for key, old, new in _nearest(identity, older)
        if not (key.startswith(_OF_THE_CODEC) and None in (old, new))  # it comes and goes with the encoding
    ]


def student_changes(
    experiment: Experiment, name: str, label: str, parent: Path, identity: Mapping[str, Any]
) -> list[Change]:
    """What a student has unlike the nearest one of its name and seed that was trained, in the keys of this identity.

    One whose cache is not up to date has no digests of what it reads yet, and is told by its recipe alone.
    """
    trained = [path.with_name("identity.json") for path in parent.glob("*/result.json")]
    own = experiment.config.students[name].model_fields_set
    return [
        Change(label, _key_of_student(key, name, own), old, new)
        for key, old, new in _nearest(identity, _of_keys(identity, _identities(trained)))
    ]


def _of_keys(identity: Mapping[str, Any], older: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    absent = {"cache", "snapshots"} - identity.keys()
    return [{key: value for key, value in before.items() if key not in absent} for before in older]


def score_changes(label: str, logged: Iterable[Path], identity: Mapping[str, Any]) -> list[Change]:
    """What a network's scores have unlike the nearest ones that were logged (paths of what was written last)."""
    older = _identities(path.with_name("identity.json") for path in logged)
    return [Change(label, _key_of_scores(key), old, new) for key, old, new in _nearest(identity, older)]


def by_change(changes: Iterable[Change]) -> list[str]:
    """A line for each change, with all that it concerns: `changed: train.lr 0.0001 -> 0.0002 (a-seed0, b-seed0)`."""
    concerned: dict[str, list[str]] = {}
    for change in changes:
        concerned.setdefault(str(change), []).append(change.of)
    return [f"{line} ({', '.join(of)})" for line, of in concerned.items()]


def _identities(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Those that can be read, the youngest first; a damaged one explains nothing."""
    found = [path for path in paths if path.is_file()]
    return [
        identity
        for path in sorted(found, key=lambda path: (-path.stat().st_mtime_ns, path))
        if (identity := _read(path)) is not None
    ]


def _read(path: Path) -> dict[str, Any] | None:
    if path.name == CACHE_JSON:
        return stored_identity(path.parent)
    try:
        document = json.loads(path.read_bytes())
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _nearest(identity: Mapping[str, Any], older: Iterable[Mapping[str, Any]]) -> list[tuple[str, Any, Any]]:
    return min((_differences(identity, before) for before in older), key=len, default=[])


def _differences(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of all that differ; None also where one of them has no such key."""
    now, before = dict(_leaves(new)), dict(_leaves(old))
    return [
        (key, before.get(key), now.get(key))
        for key in dict.fromkeys([*now, *before])
        if (key in before) != (key in now) or before[key] != now[key]
    ]


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _key_of_cache(key: str) -> str:
    """The dotted path in pipeline.yaml of a key of a cache's identity; what stands elsewhere is called what it is."""
    named = {
        "views.count": "cache.views",
        "views.augmentation": "cache.augmentation",
        "views.seed": "seed",
        "teacher.checkpoint_sha256": "teacher.checkpoint",
        "hand_model_sha256": "teacher.mano_model",
        "features.codec_sha256": "the codec",
    }
    if key.startswith("features.calibration."):
        return key.replace("features", "cache", 1)
    if key in named:
        return named[key]
    if key.startswith("teacher.model_config."):
        return key.replace("teacher.model_config.", "model_config.yaml ", 1)
    return f"cache.{key}" if key.startswith(("features", "pictures", "strict_numerics")) else key


def _key_of_student(key: str, name: str, own: Iterable[str]) -> str:
    """own: the keys that the student's own section gives; all others come from `train`, or are networks' defaults."""
    first, _, rest = key.partition(".")
    if first == "recipe":
        networks = StudentRecipe.model_fields.keys() - TrainOptions.model_fields.keys()
        from_train = rest.partition(".")[0] not in {*own, *networks}
        return f"train.{rest}" if from_train else f"students.{name}.{rest}"
    if first == "mix":
        return f"datasets.{rest}.weight"
    named = {"snapshots": f"the samples of {rest}", "cache": "the cache", "weights_sha256": f"students.{name}.weights"}
    return named.get(first, key)


def _key_of_scores(key: str) -> str:
    first, _, rest = key.partition(".")
    if first == "protocols":
        return f"datasets.{rest}.protocol"
    named = {
        "snapshots": f"the samples of {rest}",
        "cache": "the cache",
        "network": "the student",
        "latency": f"evaluate.{key}",
    }
    return named.get(first, key)


def _shown(value: Any) -> str:
    if isinstance(value, str) and _SHA256.fullmatch(value):
        return value[:_SHOWN_DIGITS]
    return value if isinstance(value, str) else json.dumps(value)
