"""How fast hands come out: HaMeR and two students, by PyTorch and exported to ONNX Runtime, in one run, taking turns.

    python benchmarks/latency.py [--quick] [--json FILE] [--threads N] [--batch N] [--turns N] [--device cpu|cuda]
                                 [--int8] [--no-exported-teacher]

The students are MobileNetV3-L under the light head and ConvNeXt-L under the paper's. Two paths: the network alone, from
normalised crops to the mesh, at batch 1 and at a larger one; and the whole path of one hand, from a decoded photograph
and a box to joints and mesh (exported: as `handstill_numpy` does it, the hand model outside of the graph). Medians,
with 5th and 95th percentiles; ratios are of medians at batch 1. The weights are random: their values do not change the
time. Peak memory is that of a process of its own that loads the network and looks at one picture, libraries included.

`--quick`: a ViT-H of two blocks instead of thirty-two, a ConvNeXt-T, one turn; the ratios to it mean nothing. `--int8`:
the exported MobileNet quantised, too (calibrated on noise: for its speed only). `--no-exported-teacher` saves 12 GB of
memory. On a GPU all exports are left out: this onnxruntime is for CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from teacher_forward import random_teacher  # the benchmark beside this one
from torch import nn

from models.hand_model import OPEN_HAND, load_hand_model
from models.handstill_numpy import Box, Hands
from models.mano import ManoLayer
from models.mano_head import ManoHead
from models.onnx_graph import INPUT, hand_model_npz, write_onnx
from models.sizes import IMAGE_SIZE, VitSizes
from models.student import Student, StudentSpec
from models.vit import Vit
from storage.durable import canonical_json
from trainer.export import NETWORK
from trainer.export_files import DESCRIPTION, HAND_MODEL, describe_network
from trainer.latency import BOX_PX, PHOTO_HW, Latency, gflop, interleaved, network_alone, photograph, whole_path

TEACHER, MOBILENET, CONVNEXT = "HaMeR", "MobileNetV3-L, light head", "ConvNeXt-L, paper's head"
SHORT = {MOBILENET: "mobilenet_light", CONVNEXT: "convnext_large"}
PYTORCH, EXPORTED, INT8 = "PyTorch", "exported", "exported int8"
Way = tuple[str, str]
"""Network and runtime."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    quick: bool
    threads: int
    batch: int
    turns: int
    device: torch.device
    int8: bool
    exported_teacher: bool


# ---- networks -------------------------------------------------------------------------------------------------------


def build(name: str, *, quick: bool, device: torch.device) -> nn.Module:
    """One of the three, with random weights, in eval mode."""
    if name == TEACHER:
        return random_teacher(VitSizes(depth=2) if quick else VitSizes(), device, "fp32").network.eval()
    convnext = "convnext_tiny" if quick else "convnext_large"
    specs = {
        MOBILENET: StudentSpec(backbone="mobilenetv3_large_100", head="light"),
        CONVNEXT: StudentSpec(backbone=convnext, head="paper"),
    }
    torch.manual_seed(0)
    return Student(specs[name], load_hand_model(OPEN_HAND)).to(device).eval()


def parts(network: nn.Module) -> tuple[nn.Module, ManoHead, ManoLayer]:
    """Backbone, head and hand layer: teacher and students have the same three."""
    return cast(nn.Module, network.backbone), cast(ManoHead, network.mano_head), cast(ManoLayer, network.mano)


def export(network: nn.Module, folder: Path) -> None:
    """The part of an export that runs: `inside` with the hand model in the graph, `outside` with it beside."""
    backbone, head, mano = parts(network)
    for name, layer in (("inside", mano), ("outside", None)):
        (folder / name).mkdir(parents=True)
        write_onnx(backbone, head, layer, folder / name / NETWORK)
        inner_columns = isinstance(backbone, Vit)
        description = describe_network(with_hand_model=layer is not None, inner_columns=inner_columns)
        (folder / name / DESCRIPTION).write_bytes(canonical_json({"network": NETWORK, **description}))
        (folder / name / HAND_MODEL).write_bytes(hand_model_npz(mano.hand_model))


def quantised(source: Path, folder: Path) -> None:
    """An int8 copy of an export, for its speed: its numbers are calibrated on noise."""
    from trainer.quantise import quantise_on

    pictures = np.random.default_rng(0).integers(0, 256, (8, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for name in ("inside", "outside"):
        (folder / name).mkdir(parents=True)
        quantise_on([pictures], source / name / NETWORK, folder / name / NETWORK)
        for other in (DESCRIPTION, HAND_MODEL):
            (folder / name / other).write_bytes((source / name / other).read_bytes())


# ---- ways -----------------------------------------------------------------------------------------------------------


def exported_alone(hands: Hands, batch: int) -> Callable[[], object]:
    images = np.random.default_rng(0).standard_normal((batch, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    return lambda: hands.session.run(None, {INPUT: images})


def exported_whole(hands: Hands) -> Callable[[], object]:
    photo, (height, width) = photograph(), PHOTO_HW
    side = BOX_PX / 2  # the crop is twice the tight box
    box = Box((width - side) / 2, (height - side) / 2, side, side, right=True)
    return lambda: hands.in_photo(photo, [box])


def ways_of(networks: dict[str, nn.Module], exports: dict[Way, Path], settings: Settings) -> dict[str, dict[Way, Any]]:
    """Every path's ways."""
    device = settings.device
    formats = {name: torch.contiguous_format if name == TEACHER else torch.channels_last for name in networks}
    for name, network in networks.items():
        network.to(memory_format=formats[name])
    inside = {way: Hands(folder / "inside", threads=settings.threads) for way, folder in exports.items()}
    found: dict[str, dict[Way, Any]] = {}
    for path, batch in ((f"network, batch {size}", size) for size in dict.fromkeys((1, settings.batch))):
        found[path] = {
            (name, PYTORCH): network_alone(network, batch, device, formats[name]) for name, network in networks.items()
        }
        found[path] |= {way: exported_alone(hands, batch) for way, hands in inside.items()}
    found["whole path"] = {
        (name, PYTORCH): whole_path(network, device, formats[name]) for name, network in networks.items()
    }
    for way, folder in exports.items():
        found["whole path"][way] = exported_whole(Hands(folder / "outside", threads=settings.threads))
    return found


# ---- peak memory ----------------------------------------------------------------------------------------------------

_EXPORT_ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
from handstill_numpy import Hands
import numpy as np
Hands(sys.argv[2], threads=int(sys.argv[3]))(np.zeros((1, 256, 256, 3), np.uint8))
"""
_PEAK = """
from pathlib import Path
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(int(peak.split()[1]) * 1024 / 1e6)
"""
"""Not getrusage's, which begins with the memory of whoever started the process."""


def peak_mb_of_export(folder: Path, threads: int) -> float:
    """Of a process that has numpy, Pillow and onnxruntime only."""
    models = str(Path(__file__).parents[1] / "models")
    return _peak_mb(["-I", "-c", _EXPORT_ALONE + _PEAK, models, str(folder / "outside"), str(threads)])


def peak_mb_of_pytorch(name: str, settings: Settings) -> float:
    """Of a process that builds the network, whose weights are random, and runs it once."""
    program = (
        "import sys, torch\nsys.path.insert(0, sys.argv[4])\n"
        "from latency import build\ntorch.set_num_threads(int(sys.argv[3]))\n"
        "network = build(sys.argv[1], quick=sys.argv[2] == 'True', device=torch.device('cpu'))\n"
        "with torch.inference_mode():\n    network(torch.zeros(1, 3, 256, 256))\n"
    )
    here = str(Path(__file__).parent)
    return _peak_mb(["-c", program + _PEAK, name, str(settings.quick), str(settings.threads), here])


def _peak_mb(arguments: list[str]) -> float:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


# ---- the report -----------------------------------------------------------------------------------------------------


def measure(settings: Settings, folder: Path) -> tuple[list[tuple[str, float, str]], dict[str, float]]:
    """Rows and ratios."""
    names = (TEACHER, MOBILENET, CONVNEXT)
    _tell("building the networks")
    networks = {name: build(name, quick=settings.quick, device=settings.device) for name in names}
    gpu = settings.device.type == "cuda"
    exported = () if gpu else names if settings.exported_teacher else names[1:]
    exports: dict[Way, Path] = {(name, EXPORTED): folder / str(i) for i, name in enumerate(exported)}
    for (name, _), place in exports.items():
        _tell(f"exporting {name}")
        export(networks[name], place)
    if settings.int8 and not gpu:
        quantised(exports[MOBILENET, EXPORTED], folder / "int8")
        exports[MOBILENET, INT8] = folder / "int8"
    rows: list[tuple[str, float, str]] = []
    for name, network in networks.items():
        rows.append((f"{name}: operations a picture", gflop(network, settings.device), "GFLOP"))
        rows.append((f"{name}: parameters", sum(p.numel() for p in network.parameters()) / 1e6, "M"))
    medians: dict[str, dict[Way, Latency]] = {}
    for path, ways in ways_of(networks, exports, settings).items():
        batch = int(path.rpartition(" ")[2]) if path.startswith("network") else 1
        turns = settings.turns if batch == 1 else max(1, settings.turns // 4)
        _tell(f"{path}: {len(ways)} ways, {turns} turns each")
        named = {" / ".join(way): run for way, run in ways.items()}
        seconds = interleaved(named, turns, settings.device)
        medians[path] = {way: Latency.of(batch, seconds[" / ".join(way)]) for way in ways}
        rows += [row for way, latency in medians[path].items() for row in _rows(way, path, latency)]
    if not gpu and Path("/proc/self/status").exists():
        _tell("peak memory of a process a way")
        peaks = {(name, PYTORCH): peak_mb_of_pytorch(name, settings) for name in names}
        peaks |= {way: peak_mb_of_export(place, settings.threads) for way, place in exports.items()}
        rows += [(f"{', '.join(way)}: peak memory of a process", peak, "MB") for way, peak in peaks.items()]
    return rows, ratios(medians)


def _tell(what: str) -> None:
    """What is going on, for whoever waits: minutes for some of it."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def _rows(way: Way, path: str, latency: Latency) -> list[tuple[str, float, str]]:
    name = f"{way[0]}, {way[1]}: {path}"
    return [
        (f"{name}, median of {latency.iterations}", latency.p50_ms, "ms"),
        (f"{name}, 5th percentile", latency.p5_ms, "ms"),
        (f"{name}, 95th percentile", latency.p95_ms, "ms"),
        (name, latency.pictures_per_s, "hands/s"),
    ]


def ratios(medians: dict[str, dict[Way, Latency]]) -> dict[str, float]:
    """Frames a second of each student over the teacher's: the teacher with PyTorch, and both exported."""
    found: dict[str, float] = {}
    for path, ways in medians.items():
        suffix = {"network, batch 1": "", "whole path": "_whole_path"}.get(path, f"_batch_{path.rpartition(' ')[2]}")
        for (name, runtime), latency in ways.items():
            if name == TEACHER:
                continue
            way = {PYTORCH: "", EXPORTED: "_exported", INT8: "_int8"}[runtime]
            key = f"{SHORT[name]}{way}_over_teacher_fps{suffix}"
            found[key] = latency.pictures_per_s / ways[TEACHER, PYTORCH].pictures_per_s
            if (TEACHER, EXPORTED) in ways and runtime == EXPORTED:
                key = f"{SHORT[name]}{way}_over_exported_teacher_fps{suffix}"
                found[key] = latency.pictures_per_s / ways[TEACHER, EXPORTED].pictures_per_s
    return {key: round(value, 2) for key, value in found.items()}


def report(settings: Settings) -> dict[str, Any]:
    """Measure, and say it in the layout that all benchmarks share."""
    import onnxruntime

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows, found = measure(settings, Path(folder))
    gpu = settings.device.type == "cuda"
    machine = torch.cuda.get_device_name(settings.device) if gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, fp32"
    return {
        "name": "latency",
        "machine": f"{machine}, {settings.threads} threads, {versions}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rows": [{"what": what, "value": round(value, 3), "unit": unit} for what, value, unit in rows]
        + [{"what": "the whole benchmark", "value": round(time.perf_counter() - begin), "unit": "s"}],
        "ratios": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch and of ONNX Runtime")
    parser.add_argument("--batch", type=int, help="the larger batch (8 on a CPU, 64 on a GPU)")
    parser.add_argument("--turns", type=int, help="of every way (20; quick: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--no-exported-teacher", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    settings = Settings(
        quick=arguments.quick,
        threads=arguments.threads,
        batch=arguments.batch or (64 if device.type == "cuda" else 8),
        turns=arguments.turns or (1 if arguments.quick else 20),
        device=device,
        int8=arguments.int8,
        exported_teacher=not arguments.no_exported_teacher,
    )
    text = json.dumps(report(settings), indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
