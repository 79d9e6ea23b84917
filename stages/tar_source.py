"""The hands in one of HaMeR's WebDataset tars: `<key>.jpg` beside `<key>.data.pyd`, a pickled list of dictionaries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.annotations import HandAnnotation, UnusableError, read_annotation
from stages.pictures import Picture, look_at
from stages.sources import FoundHand, SourceScan
from storage.errors import InputError
from storage.tars import TarMember, TarScan
from storage.unpickling import UnsafePickleError, load_annotations

_PICTURES = ("jpg", "jpeg", "png")
_LABELS = "data.pyd"


@dataclass
class _Sample:
    """The members that share a key."""

    picture: Picture | None = None
    hands: list[HandAnnotation | str] | None = None
    duplicate: str | None = None
    """The first member that comes a second time: which of them belongs to the other cannot be known."""


class _TarHands:
    def __init__(self, path: Path) -> None:
        self._scan = TarScan(path)

    @property
    def sha256(self) -> str:
        return self._scan.sha256

    def hands(self) -> Iterator[FoundHand]:
        """In the order in which their keys first come; a picture and its labels need not stand side by side."""
        samples: dict[str, _Sample] = {}
        for member, content in self._scan:
            if member.extension in _PICTURES or member.extension == _LABELS:
                _add(samples.setdefault(member.key, _Sample()), member, content)
        for key, sample in samples.items():
            yield from _hands(key, sample)


def tar_hands(path: Path) -> SourceScan:
    """A scan of one tar; other members (detection masks) are read for the digest and otherwise ignored."""
    return _TarHands(path)


def _add(sample: _Sample, member: TarMember, content: bytes) -> None:
    is_label = member.extension == _LABELS
    if (sample.hands if is_label else sample.picture) is not None:
        sample.duplicate = sample.duplicate or member.name
    elif is_label:
        sample.hands = _read_hands(member, content)
    else:
        sample.picture = look_at(content, member.name, offset=member.offset)


def _read_hands(member: TarMember, content: bytes) -> list[HandAnnotation | str]:
    """One entry a hand; a member that cannot be read counts as one."""
    try:
        found = load_annotations(content, member.name)
    except UnsafePickleError as error:
        return [f"unsafe-label: {error}"]
    except InputError as error:
        return [f"bad-label: {error}"]
    return [_annotation(hand) for hand in found] or [f"no-hands: {member.name} lists none"]


def _annotation(hand: dict[str, object]) -> HandAnnotation | str:
    try:
        return read_annotation(hand)
    except UnusableError as error:
        return str(error)


def _hands(key: str, sample: _Sample) -> Iterator[FoundHand]:
    picture = sample.picture or Picture("", problem=f"no-picture: {key}.{_LABELS} has no picture beside it")
    hands = sample.hands if sample.hands is not None else [f"no-label: {picture.name} has no .{_LABELS} beside it"]
    for hand, annotation in enumerate(hands):
        found = f"duplicate: {sample.duplicate} stands twice in the tar" if sample.duplicate else annotation
        yield FoundHand(key, hand, picture, found)
