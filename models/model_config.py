"""Where a checkpoint's model_config.yaml stands. Light to import: planning asks too."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import TypeVar

from storage.errors import InputError

AnyPath = TypeVar("AnyPath", bound=PurePath)

MODEL_CONFIG = "model_config.yaml"


def model_config_places(checkpoint: AnyPath) -> tuple[AnyPath, AnyPath]:
    """Where it may be beside an absolute path, of this machine or of a store; the first that is there counts."""
    folder = checkpoint.parent
    return folder.parent / MODEL_CONFIG, folder / MODEL_CONFIG


def model_config_path(checkpoint: Path) -> Path:
    """The configuration that belongs to a checkpoint.

    HaMeR and Fast-HaMeR keep it in the folder above the checkpoint's own; AnyHand beside the checkpoint. Where both are
    there, HaMeR's rule holds. Raises InputError that names both places.
    """
    places = model_config_places(checkpoint.absolute())
    for place in places:
        if place.is_file():
            return place
    raise InputError(
        f"{checkpoint}: found no {MODEL_CONFIG}, wanted as {places[0]} (HaMeR's place) or {places[1]}. "
        "It comes with the checkpoint: bring it too."
    )
