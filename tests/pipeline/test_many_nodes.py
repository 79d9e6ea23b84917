"""A Ray cluster of several nodes on this machine: each kind of work runs where its resources are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline import teaching
from pipeline.experiment import Experiment
from pipeline.teacher_actor import TeacherSettings, load_from_checkpoint
from stages.answers import Forward
from storage.reading import open_cache
from storage.snapshots import read_head
from tests.pipeline.commands import as_json
from tests.tiny_experiment import events_of, make_experiment


def loaded_on_the_cpu(settings: TeacherSettings) -> tuple[Forward, dict[str, Any]]:
    """What an actor on a simulated GPU computes with."""
    return load_from_checkpoint(replace(settings, gpus=0.0, threads=1))


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[str]]]:
    """Names of the nodes by kind: two with a GPU and only the core that its teacher takes, two with cores alone."""
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        kinds = {"gpu": {"num_gpus": 1, "num_cpus": 1}, "cores": {"num_cpus": 2}}
        found = {
            kind: {cluster.add_node(**resources).node_id[:12] for _ in range(2)} for kind, resources in kinds.items()
        }
        ray.init(address=cluster.address, log_to_driver=False)
        yield found
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_the_teacher_runs_on_gpus_and_the_decoding_elsewhere(
    nodes: dict[str, set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    changes = {"cluster.address": "auto", "teacher.workers": {"gpus": 1}, "teacher.precision": "fp32"}
    config = make_experiment(tmp_path / "many", changes)
    settings_of = teaching._settings

    def simulated(experiment: Experiment) -> TeacherSettings:
        return replace(settings_of(experiment), load=loaded_on_the_cpu)

    monkeypatch.setattr(teaching, "_settings", simulated)
    document = as_json(config, "run", "teach")
    assert document["stages"]["teach"]["done"] == 8
    ran: dict[str, set[str]] = defaultdict(set)
    for event in events_of(config):
        if event["event"] == "usage" and event["what"] != "driver":
            ran[event["what"]].add(event["node"].rpartition("/")[2])
    assert ran["teach"] == nodes["gpu"], "both of them, and nowhere else"
    assert ran["decode"]
    assert ran["decode"] <= nodes["cores"]
    made = {event["node"].rpartition("/")[2] for event in events_of(config) if event["event"] == "shard_committed"}
    assert made == nodes["gpu"]
    assert document["stages"]["teach"]["gpu_hours"] > 0, "GPUs were held"
    assert document["stages"]["ingest"]["gpu_hours"] == 0
    alone = {path.name: path for path in (finished / "work/cache").iterdir() if read_head(path)}
    for cache in (tmp_path / "many/work/cache").iterdir():
        assert open_cache(cache).ids == open_cache(alone[cache.name]).ids
