"""When a teacher counts as hung: from the configuration, or from what the shards of the run took."""

from __future__ import annotations

import pytest

from pipeline.patience import FACTOR, LEAST_FIRST_S, LEAST_S, UNKNOWN_S, UNKNOWN_VIEW_S, Patience


def test_a_configured_time_holds_from_the_beginning() -> None:
    patience = Patience(40.0)
    patience.saw(10, 3600, first=True)
    assert patience.allows(10, first=True) == patience.allows(9999, first=False) == 40.0


def test_a_slow_first_shard_is_no_alarm() -> None:
    """Half an hour of ViT-H on a CPU, and loading it over a slow network, are a twentieth of what is allowed."""
    patience = Patience()
    assert patience.allows(1536, first=True) == UNKNOWN_VIEW_S * 1536 > 20 * 1800
    assert patience.allows(2, first=True) == UNKNOWN_S
    assert patience.expects(2) is None


def test_what_follows_is_measured_by_the_slowest_so_far() -> None:
    patience = Patience()
    patience.saw(100, 500, first=True)
    assert patience.allows(100, first=False) == FACTOR * 500, "the loading included, as long as nothing else is known"
    patience.saw(100, 60, first=False)
    patience.saw(100, 40, first=False)
    assert patience.allows(100, first=False) == FACTOR * 60
    assert patience.allows(200, first=False) == FACTOR * 120
    assert patience.expects(50) == 30


def test_another_teacher_has_to_load_too() -> None:
    patience = Patience()
    patience.saw(100, 900, first=True)
    patience.saw(100, 1, first=False)
    assert patience.allows(100, first=True) == FACTOR * 900
    assert patience.allows(100, first=False) == LEAST_S


@pytest.mark.parametrize(("first", "least_s"), [(True, LEAST_FIRST_S), (False, LEAST_S)])
def test_shards_of_seconds_have_minutes(first: bool, least_s: float) -> None:
    patience = Patience()
    patience.saw(4, 0.5, first=True)
    patience.saw(4, 0.1, first=False)
    assert patience.allows(4, first=first) == least_s
