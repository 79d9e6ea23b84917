from __future__ import annotations

import numpy as np
import pytest

from models.crops import DEMO_BOX, HINT_BOX
from models.hand_box import HandBox, parse_hand_box
from storage.errors import InputError


def test_a_box_as_a_person_writes_it() -> None:
    box = parse_hand_box("10, 20.5,30,40 ,left")
    assert (box.as_list(), box.side, box.side_from, box.score) == ([10, 20.5, 30, 40], "left", "given", None)
    assert box.center.tolist() == [25, 40.5]
    unknown = parse_hand_box("10,20,30,40")
    assert (unknown.side, unknown.side_from) == ("right", "assumed")


def test_the_square_is_that_of_the_network() -> None:
    box = HandBox(0, 0, 90, 60, right=True)
    assert box.square_px(HINT_BOX) == pytest.approx(180)
    assert box.square_px(DEMO_BOX) == pytest.approx(2 * 90 * 256 / 192)


@pytest.mark.parametrize(
    "text", ["", "1,2,3", "1,2,3,x", "1,2,3,4,both", "1,2,3,4,left,left", "a,b,c,d,left", "1;2;3;4"], ids=repr
)
def test_what_is_no_box_is_told(text: str) -> None:
    with pytest.raises(InputError, match="--box"):
        parse_hand_box(text)


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ((1, 2, 0, 5), "no room"),
        ((1, 2, -3, 5), "no room"),
        ((1, 2, 2, 3), "no room"),
        ((np.nan, 2, 9, 9), "not finite"),
        ((1, 2, np.inf, 9), "not finite"),
        ((640, 2, 9, 9), "outside the picture of 640 x 480"),
        ((-50, 2, 50, 9), "outside the picture"),
        ((0, 0, 4000, 4000), "want one of 5120 px at most"),
    ],
)
def test_an_absurd_box_is_refused(numbers: tuple[float, float, float, float], told: str) -> None:
    with pytest.raises(InputError, match=told):
        HandBox(*numbers, right=True).check(640, 480, HINT_BOX)


def test_a_box_may_reach_over_the_edge() -> None:
    HandBox(-20, -20, 60, 60, right=True).check(640, 480, HINT_BOX)
    HandBox(630, 470, 60, 60, right=True).check(640, 480, HINT_BOX)
