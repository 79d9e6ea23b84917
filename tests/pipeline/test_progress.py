"""What a progress line says of rate and time left, and what those who look from outside are told."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline import progress as module
from pipeline.events import EventTail, append_event
from pipeline.progress import StageProgress, views_progress


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_starting_up_does_not_count_into_the_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress("teach", 100, "views") as progress:
        clock.now += 60  # weights are loaded
        progress.advance(10)
        clock.now += 5
        progress.advance(10)
        clock.now += 10
        progress.advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "teach: 10/100 views, starting, 60 s, time left unknown", "not the rate of loading weights"
    assert lines[-1] == "teach: 30/100 views, 1.3 views/s, 75 s, 52 s left"


def test_the_clock_starts_when_the_work_does(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress("teach", 100, "views") as progress:
        clock.now += 60
        progress.note({"event": "teacher_ready"})
        clock.now += 5
        progress.note({"event": "shard_started"})  # of another teacher
        clock.now += 5
        progress.advance(20)
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == "teach: 20/100 views, 2.0 views/s, 70 s, 40 s left"


def test_the_first_piece_is_rated_from_the_start(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress("verify", 4, "rows") as progress:
        clock.now += 2
        progress.advance(4)
    assert capsys.readouterr().err == "verify: 4/4 rows, 2.0 rows/s, 2 s, 0 s left\n"


def test_nothing_to_do_says_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with StageProgress("teach", 0, "views", events=tmp_path / "events.jsonl"):
        pass
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "events.jsonl").exists()


def test_the_event_log_has_progress_with_utilisation(
    clock: Clock, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "capacity", lambda: {"CPU": 4.0, "GPU": 2.0})
    events = tmp_path / "logs" / "events.jsonl"
    with views_progress("teach", 32, events) as follow:
        clock.now += 20
        append_event(events, "teacher_ready")
        follow()
        clock.now += 20
        append_event(events, "teach_batch", unit="x", views=8)
        append_event(events, "usage", what="teach", cpu_s=16.0, gpu_s=20.0, busy_s=20.0)
        follow()
    noted = [event for event in EventTail(events, from_start=True).new() if event["event"] == "progress"]
    assert [event["done"] for event in noted] == [0, 8, 8]
    assert noted[0]["per_second"] is noted[0]["eta_s"] is None
    assert noted[1]["utilisation"] == {"cpu": 0.1, "gpu": 0.25}
    assert (noted[1]["what"], noted[1]["total"], noted[1]["unit_name"]) == ("teach", 32, "views")
    assert (noted[1]["per_second"], noted[1]["eta_s"]) == (0.4, 60.0)
    assert "8/32 views, 0.4 views/s, 40 s, 60 s left, 10% cpu, 25% gpu" in capsys.readouterr().err
