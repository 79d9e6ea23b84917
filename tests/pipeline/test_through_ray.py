"""The same stages through Ray, as a command of its own: what the tests beside this one leave out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.auditing import computed_on_ray
from pipeline.config import ClusterConfig
from pipeline.workers import ray_session
from stages.audit import AuditedCache, computed_by_threads, shard_jobs, tally_of
from stages.audit_document import statistics
from storage.cache import CacheFolder
from storage.errors import DamageError
from storage.reading import open_cache
from storage.snapshots import read_head
from tests.tiny_cache import write_tiny_cache
from tests.tiny_experiment import configure, events_of, make_experiment

ROOT = Path(__file__).parents[2]


def command(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pipeline.cli", *arguments, "-c", str(config)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    config = make_experiment(tmp_path_factory.mktemp("ray"))
    return config, command(config, "run", "teach", "--json")


LISTENERS = """
import json, os, psutil, ray
from pipeline.config import ClusterConfig
from pipeline.workers import ray_session
with ray_session(ClusterConfig()):
    policy = ray.get(ray.remote(lambda: os.environ["OMP_WAIT_POLICY"]).remote())
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    sockets = [s for p in family for s in p.net_connections() if s.status == psutil.CONN_LISTEN]
    print(json.dumps([policy, *(s.laddr.ip.removeprefix("::ffff:") for s in sockets)]))
"""


@pytest.mark.parametrize(("told", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_a_ray_of_our_own_listens_on_loopback_alone_and_its_threads_wait_as_told(
    told: dict[str, str], policy: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | told
    line = [sys.executable, "-c", LISTENERS]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    waits, *found = json.loads(done.stdout.splitlines()[-1])
    assert waits == policy
    assert len(found) > 5
    assert set(found) == {"127.0.0.1"}


def test_only_the_document_is_on_stdout(taught: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, done = taught
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    stages = json.loads(done.stdout)["stages"]
    assert stages["teach"]["done"] == 8
    assert "teach: 32/32 views" in done.stderr


def test_the_caches_are_those_of_a_single_process(
    taught: tuple[Path, subprocess.CompletedProcess[str]], finished: Path
) -> None:
    """Name for name and value for value; shards also say how many threads computed them, which may differ."""
    caches = sorted((taught[0].parent / "work/cache").iterdir())
    alone = sorted((finished / "work/cache").iterdir())
    assert [path.name for path in caches] == [path.name for path in alone]
    for mine, theirs in zip(caches, alone, strict=True):
        assert CacheFolder(mine).finished().keys() == CacheFolder(theirs).finished().keys()
        ours, others = open_cache(mine), open_cache(theirs)
        assert ours.ids == others.ids
        for row in range(len(ours)):
            for name, value in ours[row].items():
                other = others[row][name]
                if isinstance(value, str):
                    assert value == other
                else:
                    torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(other), rtol=1e-5, atol=1e-5)


def test_dask_on_ray_audits_to_the_same_digits_and_the_same_errors(tmp_path: Path) -> None:
    root = write_tiny_cache(tmp_path, n=22, samples_per_shard=2, encoding="pca8-int8")
    jobs = shard_jobs(AuditedCache("train", root, read_head(root)), worst=3)["tiny"]
    by_threads = tally_of(jobs, computed_by_threads(2))
    victim = next(root.glob("shards/*/teacher/features/c.*"))
    with ray_session(ClusterConfig()):
        on_ray = tally_of(jobs, computed_on_ray(0.5))
        victim.write_bytes(bytes(8) + victim.read_bytes()[8:])
        with pytest.raises(DamageError, match="crc32c of row 0") as caught:
            tally_of(jobs, computed_on_ray(0.5))
    assert "Traceback" not in str(caught.value)
    assert statistics(on_ray) == statistics(by_threads)
    assert on_ray.features.squares.tobytes() == by_threads.features.squares.tobytes()
    assert on_ray.worst == by_threads.worst


@pytest.mark.slow  # another start of Ray; the default suite calibrates without
def test_actors_calibrate_and_then_teach(taught: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    config, _ = taught
    configure(config, {"cache.features": {"encoding": "codes4"}})
    done = command(config, "run", "teach", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stages"]["teach"]["done"] == 8
    assert "calibrate: 24/24 views" in done.stderr
    assert json.loads(command(config, "verify", "--json").stdout)["ok"] is True


def test_two_students_train_at_the_same_time(taught: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Each takes one of two cores or more; events say from when to when."""
    config, _ = taught
    configure(config, {"train.workers": {"cpus": 1}, "train.steps": 20, "train.checkpoint_every": 20})
    done = command(config, "run", "train", "--json")
    assert done.returncode == 0, done.stderr
    begun, ended = (
        {event["unit"]: event["time"] for event in events_of(config) if event["event"] == name}
        for name in ("train_started", "train_done")
    )
    assert begun.keys() == ended.keys() == {"plain-seed0", "hybrid-seed0"}
    assert max(begun.values()) < min(ended.values())


@pytest.mark.slow  # a second training; the default suite has workers without MLflow and without the command line
def test_students_of_two_workers_each_come_out_of_the_command(
    taught: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    config, _ = taught
    configure(config, {"train.workers": {"count": 2, "cpus": 0.5}, "train.steps": 3})
    seen = len(events_of(config))
    done = command(config, "run", "--json")
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    assert (stages["train"]["done"], stages["evaluate"]["done"], stages["compare"]["done"]) == (2, 3, 1)
    events = events_of(config, seen)
    begun = {(event["unit"], event["rank"]) for event in events if event["event"] == "train_worker"}
    assert begun == {(unit, rank) for unit in ("plain-seed0", "hybrid-seed0") for rank in (0, 1)}
    assert [event["step"] for event in events if event["event"] == "train_done"] == [3, 3]
    assert not list(config.parent.rglob("ray-train"))


@pytest.mark.slow  # another start of Ray; the default suite has the same mistake without
def test_a_workers_mistake_of_the_user_keeps_its_type(
    taught: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    config, _ = taught
    path = config.parent / "teacher/checkpoints/hamer.ckpt"
    document = torch.load(path, weights_only=True)
    del document["state_dict"]["backbone.patch_embed.proj.weight"]
    torch.save(document, path)
    done = command(config, "run", "teach", "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "backbone.patch_embed.proj.weight" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 24
