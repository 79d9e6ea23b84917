"""What a training step costs: from the cache with and without distillation, and with the teacher in the loop.

    python benchmarks/train_step.py [--quick] [--json FILE] [--folder FOLDER] [--device cpu|cuda]

The student is the paper's MobileNetV3-L with its full head; batch 8, as the paper. `cached` runs the trainer's own
loop (`trainer.loop.train`) on a cache of the real shapes (256-pixel JPEGs, int8 8x8x1280 features): reading,
decoding, losses, optimizer and all. `online` is the same student and the same losses with ViT-H (random weights) in
each step: `best` looks at the batch once, without gradients, with fused attention; `as published` twice, as Fast-
HaMeR's `full` does, with unfused attention. Every measurement is a process of its own, so that its peak memory is its
own; they take turns, and the best turn of each counts. The first steps of each, with their warming up, do not count.
`--quick`: a ViT-H of two blocks and fewer steps; the ratios to it mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BATCH = 8
TEACHER_DIM = 1280
STRATEGIES: dict[str, dict[str, float]] = {"plain": {}, "distilled": {"outputs": 0.3, "features": 1.8}}
WAYS = ("plain", "distilled", "online best", "online as published")


def write_inputs(folder: Path) -> None:
    """A cache of 512 samples of real shapes, and the hand model."""
    from models.hand_model import OPEN_HAND, load_hand_model, save_hand_model

    sys.path.insert(0, str(ROOT))  # the writer of tests' caches
    from tests.tiny_cache import write_tiny_cache

    write_tiny_cache(folder / "cache", n=512, views=3, channels=TEACHER_DIM, samples_per_shard=128, alike=True)
    save_hand_model(load_hand_model(OPEN_HAND), folder / "hand_model.safetensors")


def measure(way: str, folder: Path, steps: int, depth: int, device: str) -> dict[str, float]:
    """Seconds a step, share of it spent waiting for data, peak memory; in this process."""
    if way in STRATEGIES:
        found = cached(way, folder, steps, device)
    else:
        found = online(folder, published=way == "online as published", depth=depth, device=device)
    return found | {"peak_gib": peak_gib(device)}


def peak_gib(device: str) -> float:
    """Of this process; on a GPU, of its memory."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def cached(way: str, folder: Path, steps: int, device: str) -> dict[str, float]:
    """The trainer's own loop; the second half of its steps counts."""
    from storage.snapshots import read_head
    from trainer.config import StudentRecipe
    from trainer.job import Silent, TrainJob
    from trainer.loop import train

    class Reports(Silent):
        """Keeps what the loop says of its speed."""

        def __init__(self) -> None:
            self.reports: list[Mapping[str, float]] = []

        def on_step(self, step: int, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
            self.reports.append(metrics)

    (cache,) = (folder / "cache").iterdir()
    recipe = {
        "on": ["tiny"],
        "backbone": "mobilenetv3_large_100",
        "distill": STRATEGIES[way],
        "steps": steps,
        "batch_size": BATCH,
        "validation_fraction": 0,
        "log_every": steps // 2,
        "checkpoint_every": steps,
        "validate_every": steps,
    }
    job = TrainJob(
        name=way,
        seed=0,
        recipe=StudentRecipe.model_validate(recipe),
        snapshots=tuple((name, cache, digest, 1.0) for name, digest in read_head(cache).items()),
        hand_model=folder / "hand_model.safetensors",
        out_dir=folder / f"out-{time.time_ns()}",
        identity=way,
        device=device,
    )
    reports = Reports()
    train(job, reports)
    last = reports.reports[-1]
    return {"step_s": BATCH / last["pictures_per_s"], "wait_share": last["loader_wait_share"]}


def online(folder: Path, *, published: bool, depth: int, device: str) -> dict[str, float]:
    """The same student and losses with the teacher in each step, on batches that are in memory already."""
    import torch
    from teacher_forward import random_teacher
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from models.preprocessing import normalise
    from models.sizes import VitSizes
    from models.student import Student, StudentSpec
    from storage.cache import open_cache
    from storage.encodings import PAPER_SIZE
    from trainer.config import DistillConfig, StudentRecipe
    from trainer.data import PICTURES
    from trainer.learner import StudentUnderTraining, keys_for

    distill = STRATEGIES["distilled"]
    recipe = StudentRecipe.model_validate({"on": ["tiny"], "backbone": "mobilenetv3_large_100", "distill": distill})
    at = torch.device(device)
    precision = "bf16" if device == "cuda" else "fp32"
    teacher = random_teacher(VitSizes(depth=depth), at, precision)  # type: ignore[arg-type]
    student = Student(StudentSpec(backbone=recipe.backbone), teacher.hand_model)
    module = StudentUnderTraining(student, recipe, "8x8-paper", TEACHER_DIM).to(at).train()
    module.to(memory_format=module.memory_format)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    (cache,) = (folder / "cache").iterdir()
    read = open_cache(cache).read(range(BATCH), [0] * BATCH, keys_for(DistillConfig()))
    batch = {name: torch.from_numpy(value).to(at) for name, value in read.items() if name != "sample_id"}

    def look() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return dict(teacher(normalise(batch[PICTURES])))

    def step() -> None:
        said = look()
        features = look()["features"] if published else said["features"]
        resized = torch.nn.functional.interpolate(features, size=(PAPER_SIZE, PAPER_SIZE), mode="bilinear")
        taught = {f"teacher/{name}": value for name, value in said.items()}
        taught["teacher/features"] = resized.permute(0, 2, 3, 1)
        loss, _, _ = module.losses(batch | taught)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def timed() -> float:
        start = time.perf_counter()
        step()
        if at.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with sdpa_kernel(SDPBackend.MATH) if published else _nothing():
        timed()
        return {"step_s": min(timed() for _ in range(20 if device == "cuda" else 2))}


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def in_a_process(way: str, folder: Path, steps: int, depth: int, device: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__)), "--one", way, "--folder", str(folder), "--device", device]
    done = subprocess.run([*command, "--steps", str(steps), "--depth", str(depth)], check=True, capture_output=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def report(quick: bool, folder: Path, device: str) -> dict[str, Any]:
    write_inputs(folder)
    steps, depth = (8, 2) if quick else (400 if device == "cuda" else 40, 32)
    turns = {way: 1 if quick or (way.startswith("online") and device == "cpu") else 3 for way in WAYS}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(max(turns.values())):
        for way in WAYS:
            if turn < turns[way]:
                found[way].append(in_a_process(way, folder, steps, depth, device))
    best = {way: min(each, key=lambda one: one["step_s"]) for way, each in found.items()}
    rows = [(f"{way}: a step of {BATCH} pictures", one["step_s"], "s") for way, one in best.items()]
    rows += [(f"{way}: peak memory of the process", one["peak_gib"], "GiB") for way, one in best.items()]
    waits = [one["wait_share"] for way in STRATEGIES for one in found[way]]
    return {
        "name": "train_step",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rows": [{"what": what, "value": round(value, 4), "unit": unit} for what, value, unit in rows],
        "ratios": {
            "distill_over_plain": round(best["distilled"]["step_s"] / best["plain"]["step_s"], 3),
            "online_full_over_cached": round(best["online as published"]["step_s"] / best["distilled"]["step_s"], 2),
            "online_best_over_cached": round(best["online best"]["step_s"] / best["distilled"]["step_s"], 2),
            "loader_wait_share": round(min(waits), 4),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where everything is written, and removed (a temporary folder)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=int, help=argparse.SUPPRESS)
    arguments: Any = parser.parse_args()
    if arguments.one:
        one: Callable[..., dict[str, float]] = measure
        found = one(arguments.one, arguments.folder, arguments.steps, arguments.depth, arguments.device)
        print(json.dumps(found))
        return
    folder = Path(tempfile.mkdtemp(prefix="train_step-", dir=arguments.folder))
    try:
        document = report(arguments.quick, folder, arguments.device or _best_device())
    finally:
        shutil.rmtree(folder)
    text = json.dumps(document, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
