"""What a scan of a source file yields, whatever its format, and how files are named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stages.annotations import Float32Array, HandAnnotation
from stages.pictures import Picture
from storage.errors import InputError


class SourceMissingError(InputError):
    """A file that the manifest names is not there, or cannot be read."""


class SourceChangedError(InputError):
    """A file that the manifest names holds other bytes than when it was ingested."""


@dataclass(frozen=True)
class FoundHand:
    """One hand of a source, usable or not."""

    key: str
    hand: int
    picture: Picture
    annotation: HandAnnotation | str
    """The labels before cleaning, or the reason why they could not be read."""
    truth_xyz: Float32Array | None = None
    """(63,) flat, where the data set's authors publish it apart from HaMeR's files."""
    truth_vertices: Float32Array | None = None
    """(V * 3,) flat"""


class SourceScan(Protocol):
    """One pass over a source file; `sha256` is the file's digest once `hands` has ended."""

    @property
    def sha256(self) -> str: ...

    def hands(self) -> Iterator[FoundHand]: ...


def path_from(configured: str, base: Path) -> Path:
    """A path of the configuration: ~ and $VAR spelt out, relative to the configuration file's folder."""
    return base / os.path.expandvars(os.path.expanduser(configured))  # noqa: PTH111  # Path knows no $VAR


def relative_to_base(path: Path, base: Path) -> str:
    """As the manifest names files: from the configuration's folder where they lie under it, so that it can be moved."""
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()
