"""What a student takes of a cluster, and how many are given out at once. Ray itself: test_through_ray, tests/faults."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline import workers
from pipeline.config import ClusterConfig
from pipeline.workers import Resources, network_resources
from storage.errors import InputError
from trainer.config import StudentWorkers

CPUS, GPUS = {"CPU": 16.0}, {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("available", "nodes", "asked", "found"),
    [
        (CPUS, 1, {}, Resources(16, 0)),
        (CPUS, 2, {}, Resources(8, 0)),
        (GPUS, 1, {}, Resources(1, 1)),
        (CPUS, 2, {"count": 4}, Resources(2, 0, 4)),
        (CPUS, 1, {"cpus": 2}, Resources(2, 0)),
        (GPUS, 1, {"count": 2, "cpus": 3}, Resources(3, 1, 2)),
        (GPUS, 1, {"gpus": 0.5}, Resources(1, 0.5)),
        (GPUS, 1, {"gpus": 0}, Resources(16, 0)),
    ],
)
def test_what_a_student_takes(
    monkeypatch: pytest.MonkeyPatch, available: dict[str, float], nodes: int, asked: dict[str, Any], found: Resources
) -> None:
    monkeypatch.setattr(workers, "cluster_size", lambda: (available, nodes))
    assert network_resources(StudentWorkers.model_validate(asked)) == found


def test_a_machine_that_has_too_little_is_told_before_anything_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cluster_size", lambda: (CPUS, 1))
    asked = StudentWorkers(count=3, cpus=8)
    with pytest.raises(InputError, match="3 workers take 24 CPU, this machine has 16"):
        network_resources(asked, ClusterConfig())
    assert network_resources(asked, ClusterConfig(address="auto")).cpus == 8  # a cluster may grow


def test_students_that_start_workers_of_their_own_wait_until_these_fit() -> None:
    def room(taken: list[Resources], wanted: Resources) -> bool:
        return workers._has_room(CPUS, taken, wanted)

    pair = Resources(cpus=4, workers=2)
    assert room([], pair)
    assert room([pair], pair)
    assert not room([pair, pair], pair)
    assert room([], Resources(cpus=99, workers=2))  # whatever it takes: Ray says so
    alone = Resources(cpus=4)
    assert room([alone] * 15, alone)  # tasks wait with Ray
    assert not room([alone] * 16, alone)
