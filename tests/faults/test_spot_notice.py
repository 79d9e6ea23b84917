"""SIGTERM, as a spot instance or Kubernetes gives it: what can be finished is, all is over in time, exit code 143.

Slow: five starts of the pipeline, two minutes on two idle cores.
"""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.driver import Driver, read_events, run, sick
from tests.faults.experiment import beside, cache_of, leftovers, prepare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TEACH = ("run", "teach")
SLOW = {"at": "store", "sample": "any", "how": "slow"}
"""A second a hand: eight for a shard."""
LATE_S = 8.0
"""A busy machine's share beyond the promise, for a process to be seen to have ended."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = prepare(tmp_path_factory.mktemp("notice"))
    code, said = run(config, *TEACH)
    assert code == 0, said
    return config


def happened(config: Path, event: str) -> Counter[str]:
    return Counter(line["unit"] for line in read_events(config) if line["event"] == event)


def test_the_shard_under_way_is_finished_and_no_other_begun(calm: Path) -> None:
    config = beside(calm, "finishing", {"cluster.stop_within_s": 60.0})
    with Driver(config, TEACH, sick(SLOW)) as driver:
        driver.wait_for("shard_started")
        code, seconds = driver.signal(signal.SIGTERM)
        said = driver.said
    assert code == 143
    assert seconds < 60 + LATE_S
    assert said.splitlines()[-1].startswith("handstill: stopped by SIGTERM; what is finished is kept")
    assert happened(config, "shard_committed") == happened(config, "shard_started")
    assert happened(config, "shard_committed").total() == 1
    goes_on(calm, config)
    assert set(happened(config, "shard_started").values()) == {1}, "nothing was computed twice"


def test_a_shard_that_cannot_be_finished_is_abandoned_in_time(calm: Path) -> None:
    config = beside(calm, "abandoning", {"cluster.stop_within_s": 12.0})
    with Driver(config, TEACH) as driver:
        hit = driver.freeze_inside_a_shard()
        code, seconds = driver.signal(signal.SIGTERM)
        said = driver.said
    assert code == 143
    assert seconds < 12 + LATE_S
    assert "Traceback" not in said
    goes_on(calm, config)
    begun = happened(config, "shard_started")
    assert {unit: times for unit, times in begun.items() if times > 1} in ({}, {hit["unit"]: 2})


def test_the_second_signal_does_not_wait(calm: Path) -> None:
    config = beside(calm, "hurrying", {"cluster.stop_within_s": 600.0})
    with Driver(config, TEACH) as driver:
        driver.freeze_inside_a_shard()
        driver.process.send_signal(signal.SIGTERM)
        driver.wait_for("teach_stopping")
        code, seconds = driver.signal(signal.SIGTERM)
    assert code == 143
    assert seconds < 60
    goes_on(calm, config)


def goes_on(calm: Path, config: Path) -> None:
    """The next run ends with the bytes of one that nobody stopped, every shard finished once."""
    code, said = run(config, *TEACH)
    assert code == 0, said
    assert cache_of(config) == cache_of(calm)
    assert leftovers(config) == []
    assert set((happened(config, "shard_committed") + happened(config, "shard_adopted")).values()) == {1}
