"""Which codec a fitted encoding has: fitted once, kept beside the caches, the same for training and evaluation sets.

<caches folder>/calibration/<key>/
    codec.safetensors   the constants (storage/codecs.py)
    calibration.json    what they were fitted on, their sha256 and their error (sealed)

The key covers the teacher, the crop rules, the grid, the encoding and the `cache.calibration` section, not the data
sets: once fitted a codec stays, so that another tar does not make whole caches stale. A cache's identity holds the
sha256 of the codec itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.experiment import Experiment
from stages.calibrate import CALIBRATION_VERSION
from storage.cache import CacheFolder
from storage.codecs import CODEC_FILE
from storage.config import is_fitted
from storage.durable import (
    partial_path,
    publish_directory,
    read_sealed_json,
    remove_tree,
    sealed_json,
    sha256_bytes,
    sweep_partial,
)
from storage.errors import DamageError, InputError
from storage.identity import fingerprint
from storage.verification import Damage

CALIBRATIONS = "calibration"
"""The folder of calibrations, beside the caches."""

CALIBRATION_JSON = "calibration.json"

_REMEDY = "`handstill run teach` puts it back; verify again after that: until then its caches have no name"


def with_codec(experiment: Experiment, identity: dict[str, Any]) -> dict[str, Any]:
    """A cache's identity with what decides its codec, where its encoding is fitted.

    `codec_sha256` is None before calibration: then the cache has no name yet, and nothing of it is there.
    """
    if not is_fitted(identity["features"]["encoding"]):
        return identity
    calibration: dict[str, Any] = experiment.config.cache.calibration.model_dump()
    if experiment.limit is not None:
        calibration["limit"] = experiment.limit  # a smoke run's few samples must not fit the codec of a real one
    features = identity["features"] | {"calibration": calibration | {"version": CALIBRATION_VERSION}}
    with_key = identity | {"features": features}
    found = fitted_codec(calibration_folder(experiment, with_key))
    return identity | {"features": features | {"codec_sha256": None if found is None else sha256_bytes(found)}}


def is_calibrated(identity: Mapping[str, Any]) -> bool:
    """Whether all of an identity is known: its encoding needs no codec, or has one."""
    return identity["features"].get("codec_sha256", "") is not None


def calibration_key(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a codec, beside the data sets. Batch size, views and pictures' quality are not of it: a codec that
    was fitted to views of another number serves as well, and its cache is another one anyway."""
    teacher = {name: value for name, value in identity["teacher"].items() if name != "batch_size"}
    features = {name: value for name, value in identity["features"].items() if name != "codec_sha256"}
    return {
        "preprocessing_version": identity["preprocessing_version"],
        "teacher": teacher,
        "features": features,
    }


def calibration_folder(experiment: Experiment, identity: Mapping[str, Any]) -> Path:
    """Where the codec of a cache with this identity is, or will be."""
    return experiment.caches_folder / CALIBRATIONS / fingerprint(calibration_key(identity))


def fitted_codec(folder: Path) -> bytes | None:
    """The content of a calibration's codec; None where there is none that is whole."""
    try:
        data = (folder / CODEC_FILE).read_bytes()
        document = read_sealed_json(folder / CALIBRATION_JSON)
    except (FileNotFoundError, NotADirectoryError, DamageError):
        return None
    return data if sha256_bytes(data) == document["codec_sha256"] else None


def calibration_damage(experiment: Experiment, identity: Mapping[str, Any]) -> list[Damage]:
    """What is wrong with the calibration of a cache with this identity; a calibration that never was is not wrong.

    The next run puts it back, from the copy that a cache holds where there is one.
    """
    if is_calibrated(identity):
        return []
    folder = calibration_folder(experiment, identity)
    if not folder.exists():
        copied = codec_of_a_cache(experiment, identity) is not None
        return [Damage(folder, f"is missing, and a cache was made with it; {_REMEDY}")] if copied else []
    for name in (CODEC_FILE, CALIBRATION_JSON):
        if not (folder / name).is_file():
            return [Damage(folder / name, f"is missing; {_REMEDY}")]
    try:
        read_sealed_json(folder / CALIBRATION_JSON)
    except DamageError as error:
        return [Damage(folder / CALIBRATION_JSON, f"{error}; {_REMEDY}")]
    return [Damage(folder / CODEC_FILE, f"its sha256 is not the one in {CALIBRATION_JSON}; {_REMEDY}")]


def codec_of_a_cache(experiment: Experiment, identity: Mapping[str, Any]) -> bytes | None:
    """The codec that a cache with the same key holds a copy of: a calibration that was lost need not be made again."""
    key = calibration_key(identity)
    for path in sorted(experiment.caches_folder.glob("*/cache.json")):
        folder = CacheFolder(path.parent)
        try:
            other = folder.identity
            if other["preprocessing_version"] == key["preprocessing_version"] and calibration_key(other) == key:
                folder.codec()
                return (folder.root / CODEC_FILE).read_bytes()
        except (DamageError, InputError, KeyError):
            continue
    return None


def publish_calibration(folder: Path, codec: bytes, about: Mapping[str, Any]) -> None:
    """Write a calibration, whole or not at all; a damaged one in its place goes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep_partial(folder.parent)
    if folder.exists():
        remove_tree(folder)
    partial = partial_path(folder)
    partial.mkdir()
    (partial / CODEC_FILE).write_bytes(codec)
    document = {"format": "handstill-calibration", "codec_sha256": sha256_bytes(codec)} | dict(about)
    (partial / CALIBRATION_JSON).write_bytes(sealed_json(document))
    publish_directory(partial, folder)
