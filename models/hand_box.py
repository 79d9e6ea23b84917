"""Where a hand is in a photograph, and which hand it is. Light to import; numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from models.crops import BoxRule
from storage.errors import InputError

SideFrom = Literal["given", "assumed", "detector"]

MIN_SIDE_PX = 4.0
"""Of the longer side. A hand of fewer pixels shows nothing."""
LARGEST_SQUARE = 8.0
"""The square that is cut out may be this many times as large as the photograph's longer side: in a larger one the hand
would be a dot, and smoothing the photograph for it would take minutes."""


@dataclass(frozen=True)
class HandBox:
    """A tight box around one hand, photo px: x right, y down, pixel centres at whole numbers."""

    x: float
    """of its left edge"""
    y: float
    """of its upper edge"""
    width: float
    height: float
    right: bool
    """A right hand. Left ones are mirrored on their way into the network, and what it says is mirrored back."""
    side_from: SideFrom = "given"
    """Who says which hand it is; `assumed`: nobody, and a right one was taken."""
    score: float | None = None
    """How sure the detector is that a hand is there, 0 to 1; None: the box was given."""

    @property
    def side(self) -> Literal["right", "left"]:
        return "right" if self.right else "left"

    @property
    def center(self) -> npt.NDArray[np.float64]:
        """(2,) photo px."""
        return np.array([self.x + self.width / 2, self.y + self.height / 2])

    def square_px(self, rule: BoxRule) -> float:
        """Side of the square that a network sees of it."""
        return rule.side_px(np.array([self.width, self.height]) / 200)

    def as_list(self) -> list[float]:
        """x, y, width, height."""
        return [self.x, self.y, self.width, self.height]

    def check(self, width_px: int, height_px: int, rule: BoxRule) -> None:
        """Raise InputError for a box that cuts no hand out of a photograph of this size."""
        told = f"the box {self}"
        if not all(math.isfinite(number) for number in self.as_list()):
            raise InputError(f"{told} holds numbers that are not finite; want x, y, width and height in pixels")
        if min(self.width, self.height) <= 0 or max(self.width, self.height) < MIN_SIDE_PX:
            raise InputError(f"{told} has no room for a hand; want a width and a height of {MIN_SIDE_PX:g} px and more")
        inside = self.x < width_px and self.y < height_px and self.x + self.width > 0 and self.y + self.height > 0
        if not inside:
            raise InputError(
                f"{told} lies outside the picture of {width_px} x {height_px} px; "
                "x and y are those of the upper left corner, in the picture as it is shown upright"
            )
        side, largest = self.square_px(rule), LARGEST_SQUARE * max(width_px, height_px)
        if side > largest:
            raise InputError(
                f"{told} asks for a square of {side:g} px of a picture of {width_px} x {height_px}; "
                f"want one of {largest:g} px at most"
            )

    def __str__(self) -> str:
        return ",".join(f"{number:g}" for number in self.as_list()) + f",{self.side}"


def parse_hand_box(text: str) -> HandBox:
    """`x,y,width,height`, then `,left` or `,right` where it is known; InputError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    try:
        x, y, width, height = (float(part) for part in parts[:4])
    except ValueError:
        raise InputError(f"--box: found {text!r}; want x,y,width,height in pixels, then ,left or ,right") from None
    return hand_box((x, y, width, height), *parts[4:], what=f"--box {text}")


def hand_box(numbers: tuple[float, float, float, float], side: str | None = None, *more: str, what: str) -> HandBox:
    """A box that somebody gave, of a `left` or `right` hand or, where nobody knows, None; `what` names it in errors."""
    if more or side not in (None, "left", "right"):
        found = ",".join([str(side), *more])
        raise InputError(f"{what}: found {found!r} for the hand's side; want left or right")
    x, y, width, height = numbers
    return HandBox(x, y, width, height, side != "left", "assumed" if side is None else "given")
