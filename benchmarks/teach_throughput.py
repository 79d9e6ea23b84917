"""What the whole teach stage costs beyond the teacher's own forward passes.

    python benchmarks/teach_throughput.py [--quick] [--json FILE] [--folder FOLDER] [--device cpu|cuda]

The stage is `handstill run teach` as users run it: Ray actors, tar -> decode -> crops of three views -> picture codec
-> forward -> encode -> commit. Its rate is that of the views between the first shard's start and the last one's
commit; Ray's start and the loading of the weights, which a real job pays once in hours, are given beside it. The bare
forward is the same teacher, loaded in a process of its own with as many threads, on the pictures that the cache then
holds, batch after batch. Stage and forward take turns, and the best of their turns counts. Two teachers with random
weights: ViT-H, and one about fifty times smaller, for which the rest of the stage weighs fifty times more.
Also the input side alone, on one core: how many views a second are read, cut, encoded and decoded again.
`--quick`: the small teacher and a ViT-H of two blocks.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml

from models.hamer import Hamer, HamerConfig
from models.hand_model import OPEN_HAND, load_hand_model
from models.mano import ManoLayer
from models.sizes import DecoderSizes, VitSizes
from stages.preparation import ShardJob, TeachSettings, prepared_batches
from storage.cache import open_cache
from storage.config import CacheConfig
from storage.manifest import read_manifest
from storage.reading import PICTURES

ROOT = Path(__file__).parent.parent
VIEWS = 3
PHOTO_PX = (640, 480)
"""COCO's and HO-3D's size; FreiHAND's and InterHand's are smaller."""


@dataclass(frozen=True)
class Kind:
    """A teacher, and how much it is given to do in one turn."""

    name: str
    config: HamerConfig
    batch_size: int
    samples: int
    """In each of the two tars."""


VIT_H = HamerConfig()
SMALL = HamerConfig(
    vit=VitSizes(embed_dim=384, depth=6, num_heads=6),
    decoder=DecoderSizes(dim=256, depth=3, heads=4, dim_head=64, mlp_dim=512),
)


def kinds(quick: bool, gpu: bool) -> list[Kind]:
    """The teachers to measure. On a CPU the batches are small because one picture through ViT-H takes a second."""
    if gpu:
        return [Kind("ViT-H", VIT_H, 64, 4096), Kind("small", SMALL, 64, 4096)]
    big = Kind("ViT-H of 2 blocks", HamerConfig(vit=VitSizes(depth=2)), 8, 32) if quick else Kind("ViT-H", VIT_H, 8, 8)
    return [big, Kind("small", SMALL, 8, 128 if quick else 256)]


def write_teacher(folder: Path, config: HamerConfig) -> int:
    """A checkpoint of random weights in HaMeR's layout; the number of parameters."""
    torch.manual_seed(0)
    hand = load_hand_model(OPEN_HAND)
    network = Hamer(config, ManoLayer(hand))
    network.mano_head.start_from_mean(hand)
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("mano.")}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": state}, folder / "checkpoints" / "hamer.ckpt")
    (folder / "model_config.yaml").write_text(config.to_yaml())
    return sum(parameter.numel() for parameter in network.parameters())


def write_tar(path: Path, samples: int, seed: int) -> None:
    """Photographs of smooth noise with a hand's labels, one hand each."""
    draw = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(samples):
            members = {"jpg": _photo(draw), "data.pyd": pickle.dumps([_hand(draw)])}
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{path.stem}-{number:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _photo(draw: np.random.Generator) -> bytes:
    coarse = draw.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    pixels = cv2.resize(coarse, PHOTO_PX, interpolation=cv2.INTER_CUBIC)
    return bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1])


def _hand(draw: np.random.Generator) -> dict[str, Any]:
    f4 = np.float32
    middle = np.array(PHOTO_PX) / 2 + draw.normal(0, 40, 2)
    return {
        "keypoints_2d": np.concatenate([middle + draw.normal(0, 30, (21, 2)), np.ones((21, 1))], 1).astype(f4),
        "keypoints_3d": np.concatenate([draw.normal(0, 0.05, (21, 3)), np.ones((21, 1))], 1).astype(f4),
        "center": middle,
        "scale": np.full(2, draw.uniform(0.6, 1.2)),
        "hand_pose": draw.normal(0, 0.3, 48).astype(f4),
        "betas": draw.normal(0, 0.5, 10).astype(f4),
        "right": f4(draw.integers(2)),
        "has_hand_pose": f4(1),
        "has_betas": f4(1),
        "personid": 0,
        "extra_info": {},
    }


def write_experiment(folder: Path, kind: Kind) -> Path:
    """Two tars, a teacher, and the configuration that teaches the one to the other."""
    document = {
        "schema_version": 1,
        "name": "throughput",
        "workdir": "work",
        "datasets": {"photos": {"format": "hamer_tar", "path": "tars/photos-{000000..000001}.tar"}},
        "teacher": {
            "checkpoint": "teacher/checkpoints/hamer.ckpt",
            "mano_model": OPEN_HAND,
            "batch_size": kind.batch_size,
        },
        "cache": {"views": VIEWS, "samples_per_shard": max(8, kind.samples // 2)},
        "train": {"on": ["photos"]},
        "students": {"unused": {"backbone": "mobilenetv3_small_050"}},
        "evaluate": {"on": ["photos"]},
    }
    config = folder / "pipeline.yaml"
    config.write_text(yaml.safe_dump(document, sort_keys=False))
    return config


@dataclass(frozen=True)
class Turn:
    """One run of the stage."""

    views_per_s: float
    overhead_s: float
    """From the command's start to the first shard's, and from the last commit to the command's end."""


def run_stage(config: Path) -> Turn:
    """Ingest, then teach into an empty cache, by the command itself."""
    work = config.parent / "work"
    shutil.rmtree(work, ignore_errors=True)
    command = [sys.executable, "-m", "pipeline.cli", "-c", str(config), "run"]
    for stage in ("ingest", "teach"):
        started = time.time()
        subprocess.run([*command, stage], check=True, capture_output=True, cwd=ROOT)
    ended = time.time()
    events = [json.loads(line) for line in (work / "logs" / "events.jsonl").read_text().splitlines()]
    at = [event["time"] for event in events if event["event"] in ("shard_started", "shard_committed")]
    views = sum(event["views"] for event in events if event["event"] == "teach_batch")
    return Turn(views / (max(at) - min(at)), (min(at) - started) + (ended - max(at)))


FORWARD = """
import json, sys, time
import numpy as np
from models.teacher import load_teacher
from stages.teach import teacher_forward
checkpoint, pictures, batch, device, precision = sys.argv[1:]
pictures, batch = np.load(pictures), int(batch)
forward = teacher_forward(load_teacher(checkpoint, "open-hand", device, precision), device)
forward(pictures[:batch], "8x8-paper")
start = time.perf_counter()
for at in range(0, len(pictures), batch):
    forward(pictures[at : at + batch], "8x8-paper")
print(json.dumps(len(pictures) / (time.perf_counter() - start)))
"""


def bare_forward(config: Path, kind: Kind, device: str) -> float:
    """Views a second of nothing but forward passes, in a process of its own, on pictures that are in memory."""
    root = next(path.parent for path in (config.parent / "work" / "cache").glob("*/HEAD.json"))
    reader = open_cache(root)
    whole = min(len(reader), kind.samples) // kind.batch_size * kind.batch_size
    pictures = reader.read(range(whole), [0] * whole, [PICTURES])[PICTURES]
    path = config.parent / "pictures.npy"
    np.save(path, pictures)
    checkpoint = config.parent / "teacher" / "checkpoints" / "hamer.ckpt"
    precision = "bf16" if device == "cuda" else "fp32"
    command = [sys.executable, "-c", FORWARD, str(checkpoint), str(path), str(kind.batch_size), device, precision]
    done = subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return float(json.loads(done.stdout))


def input_side(config: Path, kind: Kind) -> float:
    """Views a second that one core reads, cuts, encodes and decodes again."""
    manifest = next((config.parent / "work" / "manifests").rglob("*.parquet"))
    settings = TeachSettings.of("train", CacheConfig(views=VIEWS), kind.batch_size, seed=0)
    rows = read_manifest(manifest).slice(0, 64)
    job = ShardJob("photos", "0" * 64, rows, settings, config.parent, config.parent)
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        start, views = time.process_time(), 0
        for batch in prepared_batches(job):
            views += len(batch.views)
        return views / (time.process_time() - start)
    finally:
        cv2.setNumThreads(before)


def measure(kind: Kind, folder: Path, device: str, turns: int) -> tuple[list[tuple[str, float, str]], float]:
    """Rows about one teacher, and its stage's rate over its bare forward's."""
    parameters = write_teacher(folder / "teacher", kind.config)
    for number in range(2):
        write_tar(folder / "tars" / f"photos-{number:06d}.tar", kind.samples, number)
    config = write_experiment(folder, kind)
    stages, forwards = [], []
    for _ in range(turns):
        stages.append(run_stage(config))
        forwards.append(bare_forward(config, kind, device))
    stage, forward = max(turn.views_per_s for turn in stages), max(forwards)
    rows = [
        (f"{kind.name}: parameters", parameters / 1e6, "M"),
        (f"{kind.name}: the whole stage, batch {kind.batch_size}", stage, "views/s"),
        (f"{kind.name}: bare forward, batch {kind.batch_size}", forward, "views/s"),
        (f"{kind.name}: before and after the shards", min(turn.overhead_s for turn in stages), "s"),
        (f"{kind.name}: input side alone, one core", input_side(config, kind), "views/s"),
    ]
    return rows, stage / forward


def report(quick: bool, folder: Path, device: str, only: str | None) -> dict[str, Any]:
    chosen = [kind for kind in kinds(quick, device == "cuda") if only in (None, kind.name)]
    rows, ratios = [], {}
    for kind in chosen:
        found, ratio = measure(kind, folder / kind.name.replace(" ", "-"), device, turns=2)
        rows += found
        ratios["small_teacher_stage_over_forward" if kind.name == "small" else "stage_over_forward"] = round(ratio, 3)
    machine = torch.cuda.get_device_name(device) if device == "cuda" else platform.machine()
    return {
        "name": "teach_throughput",
        "machine": f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rows": [{"what": what, "value": round(value, 3), "unit": unit} for what, value, unit in rows],
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where everything is written, and removed (a temporary folder)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="one of the teachers by its name, such as small")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="teach_throughput-", dir=arguments.folder))
    try:
        found = report(arguments.quick, folder, arguments.device, arguments.only)
    finally:
        shutil.rmtree(folder)
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
