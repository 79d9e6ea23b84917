"""`predict --boxes FILE`: the hands' boxes of many pictures, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError

from models.hand_box import HandBox, hand_box
from stages.photos import Photo
from storage.config import Section
from storage.errors import InputError


class GivenBox(Section):
    """One hand."""

    box: tuple[float, float, float, float] = Field()
    """x, y of the upper left corner, width, height; px of the upright picture."""
    side: Literal["left", "right"] | None = None
    """null: not known, and taken for a right hand."""


_FILE = TypeAdapter(dict[str, list[GivenBox]])


def read_boxes(path: Path, photos: Sequence[Photo]) -> Mapping[Path, Sequence[HandBox]]:
    """The boxes of each photo, which the file names by its path, its path in the folder that was named, or its name.

    The file: {"photo.jpg": [{"box": [x, y, width, height], "side": "left"}, ...], ...}; an empty list says that no hand
    is there. Raises InputError for a file that is not like this, a photo that it does not name, a name of no photo.
    """
    try:
        given = _FILE.validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"--boxes: {path} cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(
            f"--boxes: {path}: {where}: {first['msg']}; want "
            '{"photo.jpg": [{"box": [x, y, width, height], "side": "left"}], ...}'
        ) from None
    found: dict[Path, list[HandBox]] = {}
    used = set()
    for photo in photos:
        names = [name for name in (str(photo.path), photo.name, photo.path.name) if name in given]
        if not names:
            raise InputError(f"--boxes: {path} does not name {photo.name}; give [] where no hand is")
        used.add(names[0])
        what = f"--boxes: {path}: {names[0]}"
        found[photo.path] = [hand_box(entry.box, entry.side, what=what) for entry in given[names[0]]]
    left = sorted(set(given) - used)
    if left:
        raise InputError(f"--boxes: {path} names {left[0]!r}, which is none of the pictures ({len(left)} such names)")
    return found
