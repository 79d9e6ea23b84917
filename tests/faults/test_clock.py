"""A time of day that jumps by days, forwards and back, while a run is at work: in driver, Ray and all workers.

Slow: two runs to the end of a training, a minute and a half on two idle cores.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from itertools import cycle
from pathlib import Path

import pytest

from tests.faults.driver import Driver, read_events, run, workdir_of
from tests.faults.experiment import SHARDS, beside, leftovers, prepare, results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TRAIN = ("run", "train")
DAY_S = 86_400
JUMPS_S = (DAY_S, -2 * DAY_S, 30, -30, 400 * DAY_S, 0)


@pytest.fixture
def clock(tmp_path: Path) -> dict[str, str]:
    """The environment in which $CLOCK_OFFSET is added to the time of day."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library, offset = tmp_path / "jumping_clock.so", tmp_path / "offset"
    source = Path(__file__).with_name("jumping_clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"], check=True)
    offset.write_text("0")
    return {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(offset)}


def test_the_clock_is_wrong_in_python(clock: dict[str, str]) -> None:
    Path(clock["CLOCK_OFFSET"]).write_text(str(400 * DAY_S))
    script = "import time, datetime; print(time.time(), datetime.datetime.now().timestamp())"
    told = subprocess.run(["python3", "-c", script], env=clock, capture_output=True, text=True, check=True).stdout
    assert [float(number) - time.time() for number in told.split()] == pytest.approx([400 * DAY_S] * 2, abs=60)


def test_a_jumping_clock_changes_nothing(tmp_path: Path, clock: dict[str, str]) -> None:
    calm = prepare(tmp_path)
    code, said = run(calm, *TRAIN)
    assert code == 0, said
    config = beside(calm, "jumping")
    jumps = cycle(JUMPS_S)
    with Driver(config, TRAIN, clock) as driver:
        while driver.process.poll() is None:
            Path(clock["CLOCK_OFFSET"]).write_text(str(next(jumps)))
            time.sleep(1)
        assert driver.finish() == 0, driver.said
        told = driver.said
    assert results(config) == results(calm)
    assert leftovers(config) == []
    events = read_events(config)
    times = [event["time"] for event in events]
    assert max(times) - min(times) > DAY_S, "the clock did jump"
    assert sum(event["event"] == "shard_committed" for event in events) == SHARDS
    assert {"teacher_hung", "teacher_died"} & {event["event"] for event in events} == set()
    seconds = [event["seconds"] for event in events if event["event"] == "stage_done"]
    assert all(0 <= value < 1800 for value in seconds), seconds
    left = [int(value) for value in re.findall(r"(-?\d+) s left", told)]
    assert all(0 <= value < 36_000 for value in left), left
    code, said = run(config, *TRAIN)  # the lease that the jumping run left is no hindrance
    assert code == 0, said
    assert [event["event"] for event in read_events(config)[len(events) :] if "_started" in event["event"]] == [
        "run_started"
    ]
    assert workdir_of(config).joinpath("mlflow.db").is_file()
