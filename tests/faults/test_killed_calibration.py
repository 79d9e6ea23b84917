"""A calibration whose teacher dies, and whose driver is killed in the middle: it begins again, to the same bytes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.driver import Driver, run, send, workdir_of
from tests.faults.experiment import beside, cache_of, leftovers, prepare

TEACH = ("run", "teach")


@pytest.mark.slow  # three starts of Ray; the default suite stops a calibration without
def test_a_killed_calibration_leaves_nothing_and_begins_again_to_the_same_bytes(tmp_path: Path) -> None:
    calm = prepare(tmp_path)
    fitted = beside(calm, "fitted", {"cache.features": {"encoding": "codes4"}})
    disturbed = beside(fitted, "disturbed")
    code, said = run(fitted, *TEACH)
    assert code == 0, said

    with Driver(disturbed, TEACH) as driver:
        send(driver.wait_for("teach_batch")["pid"], signal.SIGKILL)
        driver.wait_for("teacher_died")
        driver.wait_for("teach_batch")
        assert "calibrated" not in {event["event"] for event in driver.events()}
        driver.kill()
    assert list(workdir_of(disturbed).glob("cache/*/*")) == [], "nothing is there but the log"

    code, said = run(disturbed, *TEACH)
    assert code == 0, said
    assert cache_of(disturbed) == cache_of(fitted)
    assert leftovers(disturbed) == []
