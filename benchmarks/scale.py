"""Planning the real job, and a run that finds it done: seconds and memory at up to 2.72 million samples in 2,165 tars.

    python benchmarks/scale.py [--quick] [--json FILE] [--samples N ...] [--folder DIR]

A workdir is fabricated without a teacher, as a finished run of the ten data sets, an evaluation set and 16 students
leaves it: sparse tars, manifests, shards of sparse stand-ins with the sizes of real ones, their ledger records,
snapshots, students, scores, a report. Then the real commands run as processes of their own: `plan` before anything was
scanned, `plan` before anything was taught, `plan` and `run` with everything done. What the commands look at is all real
(names, sizes, times, digests); pictures, features and weights are holes in files.

Beside them stand the machine's own times for the least that must be done: to start Python and import what a plan
imports, and to look at every file of every shard once.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from models.hand_model import OPEN_HAND
from pipeline.caches import CacheState, cache_state
from pipeline.comparing import report_identity
from pipeline.digests import stamp
from pipeline.evaluating import LOGGED, evaluation_states
from pipeline.experiment import Experiment, open_experiment
from pipeline.manifests import ManifestIndex, sources_of
from pipeline.teaching import ROLES
from pipeline.training import student_states
from storage import layout, zarr3
from storage.cache import HAND_MODEL, CacheFolder
from storage.durable import canonical_json
from storage.ledger import FileDigest, ShardRecord, write_record
from storage.manifest import SCHEMA, manifest_name, write_manifest
from storage.snapshots import publish_snapshot, write_head

DATASETS = {
    "interhand26m-train": 1_424_632,
    "dexycb-train": 406_888,
    "mtc-train": 363_947,
    "freihand-train": 130_240,
    "h2o3d-train": 121_996,
    "ho3d-train": 83_325,
    "coco-wholebody-train": 78_666,
    "rhd-train": 61_705,
    "halpe-train": 34_289,
    "mpii-nzsl-train": 15_184,
}
"""HaMeR's training sets and their samples (DESIGN section 6)."""
TARS, EVALUATION_SAMPLES = 2_165, 3_960
ALL_SAMPLES = sum(DATASETS.values())
VIEWS, BATCH_SIZE = 3, 64
BACKBONES = ("mobilenetv3_large_100", "mobilevit_s", "resnet50", "convnext_large")
DISTILL: dict[str, dict[str, float]] = {
    "none": {},
    "outputs": {"outputs": 0.3},
    "features": {"features": 1.8},
    "hybrid": {"outputs": 0.3, "features": 1.8},
}
CHECKPOINT_BYTES = 2_689_536_166
"""Of HaMeR's checkpoint; its digest is remembered, as after a first run."""
TAR_BYTES_A_SAMPLE = 30_000
PLAN_STATES = ("nothing scanned", "nothing taught", "all done")


def shares(samples: int) -> dict[str, list[int]]:
    """Samples in each tar of each data set, when all of them hold `samples`."""
    found = {}
    for name, whole in DATASETS.items():
        size = max(2, round(whole * samples / ALL_SAMPLES))
        tars = max(1, round(size * TARS / ALL_SAMPLES))
        found[name] = [size * (index + 1) // tars - size * index // tars for index in range(tars)]
    return found


def write_sources(folder: Path, samples: int) -> Path:
    """Sparse tars, an evaluation npz with its pictures, a teacher's files, and the configuration; its path."""
    datasets: dict[str, Any] = {}
    for name, tars in shares(samples).items():
        (folder / "tars" / name).mkdir(parents=True)
        for index, size in enumerate(tars):
            sparse(folder / "tars" / name / f"{index:06d}.tar", size * TAR_BYTES_A_SAMPLE)
        last = len(tars) - 1
        datasets[name] = {"format": "hamer_tar", "path": f"tars/{name}/{{000000..{last:06d}}}.tar"}
    (folder / "freihand").mkdir()
    sparse(folder / "freihand_val.npz", 10_000_000)
    for index in range(evaluation_size(samples)):
        sparse(folder / "freihand" / f"{index:08d}.jpg", 20_000)
    datasets["freihand-val"] = {"format": "hamer_npz", "path": "freihand_val.npz", "image_dir": "freihand"}
    (folder / "teacher" / "checkpoints").mkdir(parents=True)
    sparse(folder / "teacher/checkpoints/hamer.ckpt", CHECKPOINT_BYTES)
    backbone = {"TYPE": "vit", "EMBED_DIM": 1280, "DEPTH": 32}
    document = {"MODEL": {"IMAGE_SIZE": 256, "BACKBONE": backbone}, "EXTRA": {"FOCAL_LENGTH": 5000}}
    (folder / "teacher/model_config.yaml").write_text(yaml.safe_dump(document))
    config = folder / "pipeline.yaml"
    config.write_text(yaml.safe_dump(configuration(datasets), sort_keys=False))
    return config


def configuration(datasets: dict[str, Any]) -> dict[str, Any]:
    """pipeline.yaml of the real job: every data set, 16 students."""
    return {
        "schema_version": 1,
        "name": "scale",
        "workdir": "work",
        "datasets": datasets,
        "teacher": {
            "checkpoint": "teacher/checkpoints/hamer.ckpt",
            "mano_model": OPEN_HAND,
            "batch_size": BATCH_SIZE,
            "precision": "bf16",
        },
        "cache": {"views": VIEWS, "samples_per_shard": 512},
        "train": {"on": list(DATASETS), "steps": 100_000, "batch_size": 64, "lr": 1e-4},
        "students": {
            f"{backbone}-{name}": {"backbone": backbone, "distill": distill}
            for backbone in BACKBONES
            for name, distill in DISTILL.items()
        },
        "evaluate": {"on": ["freihand-val"]},
    }


def evaluation_size(samples: int) -> int:
    return max(8, round(EVALUATION_SAMPLES * samples / ALL_SAMPLES))


def sparse(path: Path, size: int) -> None:
    """A file of that size, all of it a hole."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.ftruncate(descriptor, size)
    os.close(descriptor)


def digests(seed: str, count: int) -> list[str]:
    """That many different sha256 digests, as hexadecimal."""
    data = np.random.default_rng(list(seed.encode())).bytes(32 * count).hex()
    return [data[64 * index : 64 * index + 64] for index in range(count)]


def manifest(dataset: str, source: str, first: int, count: int) -> pa.Table:
    """A manifest with ids, digests and places like those of a real one; labels are zeros, which a plan never reads."""
    keys = [f"{dataset}/{index // 997:04d}/image_{index:08d}" for index in range(first, first + count)]
    tar = source.endswith(".tar")
    columns: dict[str, Any] = {
        "sample_id": [f"{dataset}:{key}#0" for key in keys],
        "key": keys,
        "ordinal": range(count),
        "image_name": [f"{key}.jpg" for key in keys] if tar else [f"{index:08d}.jpg" for index in range(count)],
        "image_sha256": digests(f"image {source}", count),
        "labels_sha256": digests(f"labels {source}", count),
        "image_offset": range(512, 512 + count * TAR_BYTES_A_SAMPLE, TAR_BYTES_A_SAMPLE) if tar else [-1] * count,
    }
    same = {"dataset": dataset, "source": source, "source_sha256": hashlib.sha256(source.encode()).hexdigest()}
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.repeat(pa.scalar(_usual(field, same), field.type), count)
        for field in SCHEMA
    ]
    return pa.table(arrays, schema=SCHEMA)


def _usual(field: pa.Field, same: dict[str, str]) -> Any:
    """What every row of a manifest has in that column."""
    if field.nullable:
        return None
    if pa.types.is_fixed_size_list(field.type):
        return [0.0] * field.type.list_size
    return same.get(field.name, "" if pa.types.is_string(field.type) else 1)


def write_manifests(experiment: Experiment) -> None:
    """Every source scanned: its manifest, and the index that knows it; and the teacher's digest in its memory."""
    index = ManifestIndex(experiment)
    sizes = {
        name: itertools.chain(tars) for name, tars in shares(int(experiment.config.name.removeprefix("scale-"))).items()
    }
    for name, config in experiment.datasets.items():
        first = 0
        for source in sources_of(experiment, name, config):
            count = next(sizes[name]) if name in sizes else len(list(source.path.with_name("freihand").iterdir()))
            table = manifest(name, str(source.path.relative_to(experiment.base)), first, count)
            first += count
            path = experiment.workdir.manifests / name / manifest_name(table)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_manifest(path, table)
            index.remember(source, [stamp(item) for item in source.inputs()], path)
    index.save()
    checkpoint = experiment.path(experiment.config.teacher.checkpoint)
    experiment.digests.remember(checkpoint, stamp(checkpoint), hashlib.sha256(b"a teacher").hexdigest())
    experiment.digests.save()


@dataclass(frozen=True)
class ShardFiles:
    """The files of a shard: name -> (bytes of a view, bytes of a shard)."""

    sizes: dict[str, tuple[int, int]]

    @staticmethod
    def of_format() -> ShardFiles:
        """Every array of the format that a training shard has; features int8 on 8x8, pictures of 14 kB."""
        big = {layout.FEATURES: 8 * 8 * 1280 + 4, layout.PICTURE_BYTES: 14_000, layout.FEATURES_SCALE: 256}
        sizes: dict[str, tuple[int, int]] = {"zarr.json": (0, 900)}
        sizes |= {f"{group}/zarr.json": (0, 72) for group in layout.GROUPS}
        for entry in layout.ENTRIES:
            if entry.optional and entry.path not in big:
                continue
            sizes[f"{entry.path}/zarr.json"] = (0, 1100)
            sizes[f"{entry.path}/{zarr3.chunk_name(len(entry.dimensions))}"] = (big.get(entry.path, 84), 4)
        return ShardFiles(sizes)

    def record(self, input_hash: str, dataset: str, role: str, rows: int) -> ShardRecord:
        names = digests(input_hash, len(self.sizes))
        files = {
            name: FileDigest(view * rows * VIEWS + fixed, digest)
            for (name, (view, fixed)), digest in zip(self.sizes.items(), names, strict=True)
        }
        provenance = {"device": "NVIDIA H200", "torch": "2.15.0"}
        return ShardRecord(input_hash, dataset, role, rows, rows, (), provenance, files)


def write_shard(cache: CacheFolder, record: ShardRecord) -> None:
    """Stand-ins for a shard's files, and its record."""
    root = str(cache.shard_path(record.input_hash))
    for folder in sorted({parent.as_posix() for name in record.files for parent in Path(name).parents}):
        Path(root, folder).mkdir()
    for name, digest in record.files.items():
        sparse(Path(root, name), digest.bytes)
    write_record(cache.record_path(record.input_hash), record)


def write_caches(config: Path) -> None:
    """Every shard of both roles, and the snapshots."""
    files = ShardFiles.of_format()
    experiment = open_experiment(config)
    for role in ROLES:
        state = cache_state(experiment, role)
        CacheFolder.create(experiment.workdir.caches, state.identity, {HAND_MODEL: b"a hand model"})
        for dataset in state.datasets.values():
            for plan in dataset.plans:
                write_shard(state.folder, files.record(plan.input_hash, plan.dataset, role, plan.n_samples))
    experiment = open_experiment(config)
    for role in ROLES:
        publish(cache_state(experiment, role))


def publish(state: CacheState) -> None:
    """The snapshots, as the teach stage writes them."""
    write_head(
        state.root,
        {name: publish_snapshot(state.root, state.fingerprint, name, state.snapshot(name)) for name in state.datasets},
    )


def write_results(config: Path) -> None:
    """Students, their scores and the report, as far as a plan looks at them."""
    experiment = open_experiment(config)
    for student in student_states(experiment, cache_state(experiment, "train")):
        student.folder.mkdir(parents=True)
        (student.folder / "identity.json").write_bytes(canonical_json(student.identity or {}))
        (student.folder / "result.json").write_text("{}")
    for scored in evaluation_states(experiment):
        scored.folder.mkdir(parents=True)
        (scored.folder / "identity.json").write_bytes(canonical_json(scored.identity or {}))
        (scored.folder / LOGGED).write_bytes(canonical_json({"run_id": scored.digest[:32]}))
    identity = report_identity(experiment, evaluation_states(experiment))
    assert identity is not None
    experiment.workdir.report.mkdir()
    (experiment.workdir.report / "identity.json").write_bytes(canonical_json(identity))


@dataclass(frozen=True)
class Cost:
    """What one command took."""

    seconds: float
    gib: float
    """Peak resident memory of its process."""

    def better(self, other: Cost | None) -> Cost:
        return self if other is None else Cost(min(self.seconds, other.seconds), max(self.gib, other.gib))


def measure(config: Path, *command: str) -> tuple[Cost, dict[str, Any]]:
    """Run a command as a process of its own; its cost, and the document it printed."""
    arguments = [sys.executable, "-m", "pipeline.cli", *command, "--json", "-c", str(config)]
    with tempfile.TemporaryFile() as out:
        started = time.perf_counter()
        process = subprocess.Popen(arguments, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, f"{' '.join(command)} failed"
        out.seek(0)
        document: dict[str, Any] = json.load(out)
    return Cost(seconds, usage.ru_maxrss / 1024**2), document


def best(config: Path, turns: int, *command: str) -> tuple[Cost, dict[str, Any]]:
    """The shortest of several turns and the most memory of any."""
    cost: Cost | None = None
    for _ in range(turns):
        found, document = measure(config, *command)
        cost = found.better(cost)
    assert cost is not None
    return cost, document


def sizes_of(plan: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: (stage["total"], stage["todo"]) for name, stage in plan["stages"].items()}


def measure_scale(folder: Path, samples: int, turns: int) -> Iterator[tuple[str, Cost]]:
    """(what, its cost) for every command at one scale; the folder is made and left as a finished job's."""
    config = write_sources(folder, samples)
    config.write_text(config.read_text().replace("name: scale\n", f"name: scale-{samples}\n"))
    tars = sum(map(len, shares(samples).values()))
    cost, plan = best(config, turns, "plan", "ingest")
    assert sizes_of(plan)["ingest"] == (tars + 1, tars + 1)
    yield f"plan, {PLAN_STATES[0]}", cost
    write_manifests(open_experiment(config))
    cost, plan = best(config, turns, "plan")
    shards = plan["stages"]["teach"]["total"]
    assert sizes_of(plan)["teach"] == (shards, shards)
    yield f"plan, {PLAN_STATES[1]}", cost
    write_caches(config)
    write_results(config)
    cost, plan = best(config, turns, "plan")
    assert all(todo == 0 for _, todo in sizes_of(plan).values()), plan
    yield f"plan, {PLAN_STATES[2]}", cost
    cost, document = best(config, turns, "run")
    assert document["stages"]["teach"]["samples_done"] >= samples - len(DATASETS)
    yield "run, nothing to do", cost
    yield "every file of every shard looked at", Cost(look_at_every_file(folder / "work" / "cache"), 0)


def look_at_every_file(folder: Path) -> float:
    """Seconds for the system calls alone: list every folder, ask for the size of every file."""
    started = time.perf_counter()
    for place, _, names in os.walk(folder):
        for name in names:
            os.stat(f"{place}/{name}")  # noqa: PTH116 - a Path costs more than the call
    return time.perf_counter() - started


def start_seconds() -> float:
    """To start Python and import what a plan imports."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import pipeline.run"], check=True)
    return time.perf_counter() - started


def steepest(points: list[tuple[int, float]]) -> float:
    """The largest exponent between neighbouring scales: 1 is linear. Over all of them the start would hide growth."""
    return max(
        (
            math.log(late / soon) / math.log(more / few)
            for (few, soon), (more, late) in itertools.pairwise(points)
            if more > few
        ),
        default=0.0,
    )


def report(scales: list[int], turns: int, parent: Path | None) -> dict[str, Any]:
    """Measure every scale, and say it in the layout that all benchmarks share."""
    rows: list[tuple[str, float, str]] = [("python and the imports of a plan", start_seconds(), "s")]
    costs: dict[tuple[int, str], Cost] = {}
    for samples in scales:
        folder = Path(tempfile.mkdtemp(prefix="handstill-scale-", dir=parent))
        try:
            for what, cost in measure_scale(folder, samples, turns):
                print(f"{samples:>9,} samples: {what}: {cost.seconds:.2f} s, {cost.gib:.2f} GiB", file=sys.stderr)
                costs[samples, what] = cost
        finally:
            shutil.rmtree(folder)
    for (samples, what), cost in costs.items():
        rows.append((f"{samples} samples: {what}", cost.seconds, "s"))
        if cost.gib:
            rows.append((f"{samples} samples: {what}, peak memory", cost.gib, "GiB"))
    commands = [*(f"plan, {state}" for state in PLAN_STATES), "run, nothing to do"]
    last = scales[-1]
    exponents = {what: steepest([(samples, costs[samples, what].seconds) for samples in scales]) for what in commands}
    rows += [(f"steepest growth exponent: {what}", value, "") for what, value in exponents.items()]
    plans = [costs[last, what] for what in commands[:-1]]
    return {
        "name": "scale",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rows": [{"what": what, "value": round(value, 3), "unit": unit} for what, value, unit in rows],
        "ratios": {
            "plan_seconds": round(max(cost.seconds for cost in plans), 3),
            "plan_gib": round(max(cost.gib for cost in plans), 3),
            "noop_seconds": round(costs[last, commands[-1]].seconds, 3),
            "growth_exponent": round(max(exponents.values()), 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 k and 100 k samples, once")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", type=int, nargs="+", help="other scales, ascending")
    parser.add_argument("--turns", type=int, help="how often each command runs (3; quick: 1)")
    parser.add_argument("--folder", type=Path, help="where to fabricate workdirs: 3 GB and 700,000 names at full scale")
    arguments = parser.parse_args()
    scales = arguments.samples or ([10_000, 100_000] if arguments.quick else [10_000, 100_000, 1_000_000, ALL_SAMPLES])
    turns = arguments.turns or (1 if arguments.quick else 3)
    text = json.dumps(report(scales, turns, arguments.folder), indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
