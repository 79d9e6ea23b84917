"""Teachers that are killed for memory, by Ray or by the kernel: the run ends with advice and blames no sample.

Slow: five starts of the pipeline, two minutes on two idle cores.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.driver import read_events, run, sick
from tests.faults.experiment import beside, cache_of, leftovers, prepare
from tests.tiny_experiment import configure

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TEACH = ("run", "teach")
FULL = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
"""For Ray's monitor every machine is too full."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = configure(prepare(tmp_path_factory.mktemp("memory")), {"teacher.batch_size": 4, "cluster.max_retries": 1})
    code, said = run(config, *TEACH)
    assert code == 0, said
    return config


@pytest.mark.parametrize(
    ("name", "environment"), [("ray", FULL), ("kernel", sick({"at": "store", "sample": "any", "how": "die"}))]
)
def test_no_sample_is_to_blame(calm: Path, name: str, environment: dict[str, str]) -> None:
    """What the kernel kills for memory gets SIGKILL, whatever it was about to store."""
    config = beside(calm, name)
    code, said = run(config, "run", "ingest")
    assert code == 0, said
    code, said = run(config, *TEACH, environment=environment)
    assert code == 1
    assert "set teacher.batch_size: 2" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert [event for event in read_events(config) if event["event"] == "inquiry_done"] == []
    code, said = run(config, *TEACH)
    assert code == 0, said
    assert cache_of(config) == cache_of(calm)
    assert leftovers(config) == []
