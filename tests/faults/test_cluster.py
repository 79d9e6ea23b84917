"""A cluster of several nodes that loses a raylet, a whole node and its head in the middle of shards, and gains a node.

Slow: six starts of nodes and three of the pipeline, two minutes on two idle cores.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cluster import Node, RayNodes
from tests.faults.driver import Driver, read_events, run, send
from tests.faults.experiment import SHARDS, beside, cache_of, leftovers, prepare
from tests.tiny_experiment import configure

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TEACH = ("run", "teach")
WORKERS = {"count": 2, "cpus": 1, "gpus": 0}
"""In all runs: the threads of a forward pass are stored with each shard."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = configure(prepare(tmp_path_factory.mktemp("cluster")), {"teacher.workers": WORKERS})
    code, said = run(config, *TEACH)
    assert code == 0, said
    return config


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayNodes]:
    with RayNodes() as ray:
        ray.add()
        ray.add()
        for name, value in ray.environment.items():
            monkeypatch.setenv(name, value)
        yield ray


def node_of(ray: RayNodes, pid: int) -> Node:
    (found,) = [node for node in ray.nodes if pid in node.pids()]
    return found


@pytest.mark.parametrize("how", ["raylet", "node"])
def test_a_node_lost_in_the_middle_of_a_shard_and_another_one_added(calm: Path, ray: RayNodes, how: str) -> None:
    config = beside(calm, f"lost-{how}", {"cluster.address": "auto", "cluster.max_retries": 0})
    with Driver(config, TEACH) as driver:
        hit = driver.freeze_inside_a_shard()
        lost = node_of(ray, hit["pid"])
        lost.kill("raylet") if how == "raylet" else lost.lose()
        ray.forget(lost)
        ray.add()
        assert driver.finish() == 0, driver.said
    assert_as_undisturbed(calm, config, {hit["unit"]})
    (death,) = [event for event in read_events(config) if event["event"] == "teacher_died"]
    assert death["unit"] == hit["unit"], "and it did not count: no retry was allowed"


def test_one_node_is_left_and_goes_on_alone(calm: Path, ray: RayNodes) -> None:
    """Its two cores would both be teachers', if as many were hired as were asked for, and nothing would be decoded."""
    config = beside(calm, "alone", {"cluster.address": "auto"})
    with Driver(config, TEACH) as driver:
        hit = driver.freeze_inside_a_shard()
        lost = node_of(ray, hit["pid"])
        lost.lose()
        ray.forget(lost)
        assert driver.finish() == 0, driver.said
    assert_as_undisturbed(calm, config, {hit["unit"]})


def test_nodes_that_come_later_are_used(calm: Path, ray: RayNodes) -> None:
    """auto: a teacher a node. One of two nodes is lost before the run, and another one comes in its midst."""
    ray.nodes[0].lose()
    ray.forget(ray.nodes[0])
    config = beside(calm, "growing", {"cluster.address": "auto", "teacher.workers": {"cpus": 1, "gpus": 0}})
    with Driver(config, TEACH) as driver:
        first = driver.freeze_inside_a_shard()
        new = ray.add()
        other = driver.wait_for("shard_started")
        assert other["pid"] in new.pids()
        send(first["pid"], signal.SIGCONT)
        assert driver.finish() == 0, driver.said
    assert_as_undisturbed(calm, config, set())


def test_a_head_that_is_lost_ends_the_run_which_goes_on_elsewhere(
    calm: Path, ray: RayNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # Ray's default is a minute
    config = beside(calm, "headless", {"cluster.address": "auto"})
    with Driver(config, TEACH) as driver:
        hit = driver.freeze_inside_a_shard()
        ray.head.kill("gcs_server")
        assert driver.finish() == 1
    ray.head.lose()
    for node in list(ray.nodes):
        node.lose()
        ray.forget(node)
    ray.start_head()
    ray.add()
    ray.add()
    os.environ.update(ray.environment)
    code, said = run(config, *TEACH)
    assert code == 0, said
    begun = begun_by_unit(config)
    assert hit["unit"] in [unit for unit, times in begun.items() if times == 2]
    assert_as_undisturbed(calm, config, {unit for unit, times in begun.items() if times == 2})


def begun_by_unit(config: Path) -> Counter[str]:
    return Counter(event["unit"] for event in read_events(config) if event["event"] == "shard_started")


def assert_as_undisturbed(calm: Path, config: Path, hit: set[str]) -> None:
    """The same bytes and counts; every shard finished once, and begun again only where something hit it."""
    assert cache_of(config) == cache_of(calm)
    assert leftovers(config) == []
    events: list[dict[str, Any]] = read_events(config)
    finished = Counter(event["unit"] for event in events if event["event"] in ("shard_committed", "shard_adopted"))
    assert len(finished) == SHARDS
    assert set(finished.values()) == {1}
    begun = begun_by_unit(config)
    assert {unit: times for unit, times in begun.items() if times > 1 + (unit in hit)} == {}
    done = [event for event in events if event["event"] == "stage_done" and event["stage"] == "teach"][-1]
    assert (done["samples_in"], done["samples_done"], done["quarantined"]) == (52, 52, 0)
