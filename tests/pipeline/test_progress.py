"""What a progress line says of rate and time left."""

from __future__ import annotations

import time

import pytest

from pipeline.progress import StageProgress


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_starting_up_does_not_count_into_the_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with StageProgress("teach", 100, "views") as progress:
        clock.now += 60  # weights are loaded
        progress.advance(10)
        clock.now += 5
        progress.advance(10)
        clock.now += 10
        progress.advance(10)
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "teach: 30/100 views, 1.3 views/s, 75 s, 52 s left"


def test_the_first_piece_is_rated_from_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with StageProgress("verify", 4, "rows") as progress:
        clock.now += 2
        progress.advance(4)
    assert capsys.readouterr().err == "verify: 4/4 rows, 2.0 rows/s, 2 s, 0 s left\n"


def test_nothing_to_do_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress("teach", 0, "views"):
        pass
    assert capsys.readouterr().err == ""
