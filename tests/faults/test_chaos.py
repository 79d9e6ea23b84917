"""Minutes of kills at random moments; whatever comes through them has the bytes of a run that nobody disturbed."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.chaos import Chaos
from tests.faults.driver import Driver, run, send, workers_of
from tests.faults.experiment import beside, leftovers, prepare, results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CHAOS_S = 300
LONGEST_PEACE_S = 20.0
DRIVERS_SHARE = 0.3
"""Of the kills; the others hit a worker."""
FEWEST_KILLS = 10


@pytest.fixture
def calm(tmp_path: Path) -> Path:
    config = prepare(tmp_path)
    code, said = run(config)
    assert code == 0, said
    return config


def test_everything_is_killed_on_a_cluster(tmp_path: Path) -> None:
    """Drivers, teachers, decoders, raylets, nodes and heads, twice each: a quarter of an hour. For longer: chaos.py."""
    chaos = Chaos(tmp_path, seed=0)
    chaos.until(minutes=0, kills=2)
    assert min(chaos.state.kills.values()) >= 2
    assert chaos.state.rounds >= 1


@pytest.mark.parametrize("seed", [0])
def test_random_kills(calm: Path, seed: int) -> None:
    draw = random.Random(seed)
    undisturbed = results(calm)
    end = time.monotonic() + CHAOS_S
    kills = rounds = 0
    while time.monotonic() < end:
        config = beside(calm, f"chaos-{rounds}")
        code = -1
        while code != 0:
            code, hits = disturb(config, draw, end)
            kills += hits
            assert code in (0, 1, -signal.SIGKILL), config.with_suffix(".stderr").read_text()
        assert results(config) == undisturbed
        assert leftovers(config) == []
        rounds += 1
    assert kills >= FEWEST_KILLS


def disturb(config: Path, draw: random.Random, until: float) -> tuple[int, int]:
    """One run, in which processes are killed now and then; its exit code and how many were."""
    kills = 0
    with Driver(config) as driver:
        while time.monotonic() < until:
            try:
                return driver.process.wait(draw.uniform(0, LONGEST_PEACE_S)), kills
            except subprocess.TimeoutExpired:
                workers = workers_of(driver.process.pid)
                victim = driver.process.pid if draw.random() < DRIVERS_SHARE or not workers else draw.choice(workers)
                send(victim, signal.SIGKILL)
                kills += 1
        return driver.finish(), kills


def test_killed_in_the_other_stages(calm: Path) -> None:
    """SIGKILL while sources are scanned, MLflow's file is made, students are scored, and the report is written."""
    config = beside(calm, "late")
    with Driver(config) as driver:
        driver.wait_for("ingest_started")
        driver.kill()
    with Driver(config) as driver:
        driver.wait_for("stage_started", stage="train")
        driver.wait_until(lambda: list(config.with_suffix("").glob(".mlflow.db.*/mlflow.db")), "the database")
        driver.kill()
    with Driver(config) as driver:
        driver.wait_for("evaluate_started")
        driver.kill()
    with Driver(config) as driver:
        driver.wait_for("evaluate_started")
        assert driver.signal(signal.SIGINT)[0] == 130
        assert driver.said.splitlines()[-1].startswith("handstill: stopped by SIGINT; ")
    with Driver(config) as driver:
        driver.wait_for("stage_started", stage="compare")
        driver.kill()
    code, said = run(config)
    assert code == 0, said
    assert results(config) == results(calm)
    assert leftovers(config) == []
    assert (config.with_suffix("") / "report" / "report.html").is_file()
