"""How the teach stage scales with nodes, and what the driver costs, with teachers that sleep for a fixed time.

    python benchmarks/cluster_scaling.py [--quick] [--json FILE] [--nodes 1,2,4,8] [--workers 64] [--latency-s 1]

Each node is a raylet of its own on this machine (Ray's cluster utility) with one simulated GPU, and cores to decode
beside its teacher. Actors, decoding tasks, claims, the event log and the handing out of shards are those of
`handstill run teach`; only the forward pass sleeps, so that two cores are enough to see what the scheduling costs. A
teacher's answers are not written: how fast a disk takes them is measured in benchmarks/teach_throughput.py.

Scaling: shards a second between the first time that every teacher can have ended one and the last time that none can be
idle, with the same number of shards a node; 1.0 is what that many single nodes would do. The driver: processor time
that it uses for a shard and in all, with as many teachers as `--workers` on one node. At the real job's 512 samples a
shard and three views, one H200 takes about a second for a shard, which is the latency here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from models.hand_model import OPEN_HAND, load_hand_model
from pipeline.config import ClusterConfig
from pipeline.events import EventTail
from pipeline.progress import views_progress
from pipeline.sharing import ShardClaims
from pipeline.teacher_actor import TeacherSettings
from pipeline.teachers import teach_all
from pipeline.usage import processor_seconds
from pipeline.workdir import Workdir, claim_of, lease
from stages.answers import Forward
from stages.config import HamerTarDataset, WorkersConfig
from stages.hamer_files import write_tar
from stages.ingest import scan_source
from stages.preparation import PreparedBatch, ShardJob, TeachSettings
from stages.synthesise import draw_pictures
from storage.config import CacheConfig

HANDS = 2
"""In each shard: decoding them costs next to nothing, and it is done all the same."""
BATCH_SIZE = 4


@dataclass(frozen=True)
class Sleeper:
    """A teacher that takes so long for a shard, and what its actor calls in place of loading one; picklable."""

    latency_s: float

    def load(self, _: TeacherSettings) -> tuple[Forward, dict[str, Any]]:
        """Nothing to load, nothing to compute."""
        return lambda _pictures, _grid: {}, {}

    def work(self, _: ShardJob, batches: Iterable[PreparedBatch], __: Forward, ___: Mapping[str, Any]) -> float:
        """Take the shard's decoded batches, as a teacher does, and the time; when it ended."""
        ends = time.time() + self.latency_s
        for _batch in batches:
            pass
        time.sleep(max(0.0, ends - time.time()))
        return time.time()


@dataclass(frozen=True)
class Turn:
    """What one cluster did."""

    shards_per_s: float
    driver_cpu_s: float
    """In the same time."""
    wall_s: float
    shards: int


@contextmanager
def cluster_of(nodes: int, gpus: int, cores: int) -> Iterator[None]:
    """Connected to a head without resources and so many nodes."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=cores, num_gpus=gpus, wait=False)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def jobs_of(folder: Path, workdir: Workdir, count: int) -> Iterator[ShardJob]:
    """So many shards of the same few hands."""
    tar = folder / "hands.tar"
    if not tar.is_file():
        pictures = draw_pictures(load_hand_model(OPEN_HAND), 0, range(HANDS))
        write_tar(tar, ((f"{number:06d}", picture) for number, picture in enumerate(pictures)))
    rows = scan_source("hands", HamerTarDataset(format="hamer_tar", path=str(tar)), tar, folder)
    settings = TeachSettings.of("train", CacheConfig(views=1), BATCH_SIZE, 0)
    job = ShardJob("hands", "", rows, settings, folder / "cache" / ("0" * 16), folder, workdir.events)
    return (replace(job, input_hash=f"{number:064x}") for number in range(count))


def turn(folder: Path, teachers: int, shards_each: int, latency_s: float) -> Turn:
    """Let so many teachers do so many shards each, on the cluster that is connected."""
    workdir = Workdir(Path(tempfile.mkdtemp(dir=folder)))
    sleeper, shards = Sleeper(latency_s), teachers * shards_each
    ended: list[tuple[float, float]] = []

    def note(_: ShardJob, __: float) -> None:
        ended.append((time.time(), processor_seconds()))

    with (
        lease(workdir),
        ShardClaims(workdir.references) as claims,
        views_progress("teach", shards * HANDS, workdir.events) as follow,
    ):
        settings = TeacherSettings(
            folder, None, "fp32", 1.0, workdir.events, claim_of(workdir), decode_retries=0, load=sleeper.load
        )
        jobs = claims.take_turns(jobs_of(folder, workdir, shards), lambda job: workdir.root / "x" / job.input_hash)
        workers = WorkersConfig(count=teachers, gpus=1, cpus=0.01)
        teach_all(jobs, settings, workers, ClusterConfig(address="auto"), follow, sleeper.work, note)
    seen = sum(event["event"] == "teach_batch" for event in EventTail(workdir.events, from_start=True).new())
    assert len(ended) == seen == shards, (len(ended), seen, shards)
    # Until every teacher has ended one shard some are still starting; after the first has none left some are idle.
    (first, cpu_first), (last, cpu_last) = ended[teachers - 1], ended[-1 - (teachers - 1)]
    between = shards - 2 * teachers + 1
    return Turn(between / (last - first), cpu_last - cpu_first, last - first, between)


def report(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows: list[tuple[str, float, str]] = []
    rates: dict[int, float] = {}
    for nodes in arguments.nodes:
        with cluster_of(nodes, gpus=1, cores=2):
            found = turn(folder, nodes, arguments.shards, arguments.latency_s)
        rates[nodes] = found.shards_per_s
        rows.append((f"{nodes} nodes", found.shards_per_s, "shards/s"))
    rows.append(("the limit of one node: its teacher's latency", 1 / arguments.latency_s, "shards/s"))
    with cluster_of(1, gpus=arguments.workers, cores=4):
        found = turn(folder, arguments.workers, arguments.shards, arguments.latency_s)
    driver_s = found.driver_cpu_s / found.shards
    rows += [
        (f"{arguments.workers} teachers on one node", found.shards_per_s, "shards/s"),
        (f"{arguments.workers} teachers: the driver's processor time a shard", driver_s * 1000, "ms"),
        (f"{arguments.workers} teachers: the driver's share of a core", found.driver_cpu_s / found.wall_s, "cores"),
    ]
    least, most = min(rates), max(rates)
    ratios = {
        "scaling_efficiency": rates[most] / rates[least] / (most / least),
        "of_latency_limit": rates[most] * arguments.latency_s / most,
        f"driver_share_at_{arguments.workers}_workers": found.driver_cpu_s / found.wall_s,
        "driver_share_if_nothing_waited": driver_s * arguments.workers / arguments.latency_s,
    }
    return {
        "name": "cluster_scaling",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, ray {ray.__version__}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rows": [{"what": what, "value": round(value, 4), "unit": unit} for what, value, unit in rows],
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 and 2 nodes, 4 teachers on one, few shards")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--nodes", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--latency-s", type=float, default=1.0)
    parser.add_argument("--shards", type=int, default=20, help="for each teacher")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.nodes, arguments.workers, arguments.shards = [1, 2], 4, 6
    folder = Path(tempfile.mkdtemp(prefix="cluster_scaling-"))
    try:
        found = report(arguments, folder)
    finally:
        shutil.rmtree(folder)
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
