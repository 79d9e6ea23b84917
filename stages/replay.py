"""Replay: a cached view made again from its source and the parameters stored with it, and compared with what is stored.

No random number is drawn: scale, rotation, translation, colour, mirroring and box are those in the shard. Where the
source, the labels and the parameters are what they were, the encoded picture is the same to the bit, as long as the
libraries that decode, cut and encode are of the same versions; the labels are the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import PIL
import simplejpeg
from numpy.typing import NDArray

from models.crops import Augmentation, crop
from stages.preparation import Row, TruthShape, Values, box_rule, per_sample, seen, source_labels
from storage.config import PicturesConfig
from storage.encodings import decode_picture
from storage.manifest import Role
from storage.reading import CacheReader

LABEL_TOLERANCE = 1e-5
"""Relative to the largest magnitude of an array, or absolute below 1 (metres, radians, crop units): what the last bits
of another processor's matrix products may come to. On the same machine the difference is 0."""
PIXEL_TOLERANCE = 1.0
"""Mean absolute difference in levels of 255 that other versions of the libraries may make (OpenCV 5 moves up to a fifth
of the values of a crop, by up to 5). A box or an angle that is a little wrong shows in `views/affine` all the same."""


LIBRARIES = "libraries"
"""Their place in a shard's provenance."""


def picture_libraries() -> dict[str, str]:
    """The libraries that decide a picture's last bits, recorded with each shard."""
    return {"opencv": cv2.__version__, "pillow": PIL.__version__, "simplejpeg": simplejpeg.__version__}


@dataclass(frozen=True, eq=False)
class View:
    """One view of one sample, as it is stored or as it was made again."""

    sample_id: str
    view: int
    encoded: bytes
    values: Values
    """`labels/*` and `views/*` by array path: the entries of this view, and those that a sample has once."""


@dataclass(frozen=True)
class Comparison:
    """How far a view made again is from the stored one."""

    sample_id: str
    view: int
    differences: tuple[str, ...]
    """What cannot be explained by other library versions; empty: the view is what its parameters say."""
    identical_picture: bool
    """To the bit, as encoded."""
    max_pixel_difference: int
    """In levels of 255, of the decoded pictures."""
    max_label_difference: float
    """Over all labels and parameters, each in its own unit."""


def stored_view(reader: CacheReader, position: int, view: int) -> View:
    """What the cache holds of one view; every byte of it is checked on the way."""
    batch = reader.read([position], [view])
    values = {name: array[0] for name, array in batch.items() if name.startswith(("labels/", "views/"))}
    return View(str(batch["sample_id"][0]), view, reader.picture_bytes(position, view), values)


def remake(stored: View, row: Row, photo: NDArray[np.uint8], role: Role, pictures: PicturesConfig) -> View:
    """The view that the stored parameters make of a source.

    row, photo: of the manifest, and its decoded photograph (H,W,3) RGB. What the parameters must be by the manifest
    alone (box and mirroring) comes from there, so that a stored one that differs is seen.
    """
    parameters = stored.values
    augmentation = Augmentation(
        scale=float(parameters["views/scale"]),
        rotation_deg=float(parameters["views/rotation_deg"]),
        translation=(float(parameters["views/translation"][0]), float(parameters["views/translation"][1])),
        colour=(
            float(parameters["views/colour"][0]),
            float(parameters["views/colour"][1]),
            float(parameters["views/colour"][2]),
        ),
        flip=bool(parameters["views/flip"]),
    )
    cut = crop(photo, parameters["views/center"], float(parameters["views/box_px"]), True, augmentation)
    encoded, values = seen(cut, source_labels(row), augmentation, pictures)
    box_px = box_rule(role, row, stored.view).side_px(row["scale"])
    values |= {
        "views/center": np.array(row["center"], np.float64),
        "views/box_px": np.array(box_px, np.float64),
        "views/flip": np.array(not row["right"], np.bool_),
    }
    return View(row["sample_id"], stored.view, encoded, values | per_sample(row) | _truth(stored).values(row))


def _truth(stored: View) -> TruthShape:
    vertices = stored.values.get("labels/truth_vertices")
    return TruthShape("labels/truth_xyz" in stored.values, 0 if vertices is None else len(vertices))


def compare(stored: View, remade: View, same_libraries: bool) -> Comparison:
    """Hold a view made again against the stored one.

    same_libraries: whether the shard was made with today's versions; if so, one other bit of the picture is too much.
    """
    identical = stored.encoded == remade.encoded
    pixels = np.zeros(1) if identical else _pixel_differences(stored.encoded, remade.encoded)
    differences = [f"{name} differs by {error:.3g}" for name, error in _wrong_values(stored.values, remade.values)]
    if not identical and (same_libraries or pixels.mean() > PIXEL_TOLERANCE):
        share = (pixels > 0).mean()
        differences.append(
            f"the picture differs in {share:.1%} of its values, by {pixels.mean():.2g} levels in the mean and "
            f"{pixels.max():.0f} at most"
        )
    return Comparison(
        stored.sample_id,
        stored.view,
        tuple(differences),
        identical,
        int(pixels.max()),
        max(_error(stored.values[name], remade.values[name]) for name in stored.values.keys() & remade.values.keys()),
    )


def _pixel_differences(one: bytes, other: bytes) -> NDArray[np.int16]:
    difference: NDArray[np.int16] = decode_picture(one).astype(np.int16) - decode_picture(other)
    return np.abs(difference)


def _wrong_values(
    stored: Mapping[str, NDArray[Any]], remade: Mapping[str, NDArray[Any]]
) -> Sequence[tuple[str, float]]:
    """Names of the arrays that are not what they should be, and by how much."""
    found = []
    for name in sorted(stored.keys() | remade.keys()):
        if name not in stored or name not in remade:
            found.append((name, float("inf")))
            continue
        error = _error(stored[name], remade[name])
        allowed = LABEL_TOLERANCE * max(1.0, float(np.abs(remade[name]).max()))
        if not error <= allowed:  # a NaN too
            found.append((name, error))
    return found


def _error(one: NDArray[Any], other: NDArray[Any]) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())
