"""How fast the full-size teacher looks at pictures, beside the same network with unfused attention and beside the time
that its matrix products alone take on this machine: the ceiling that no implementation passes.

    python benchmarks/teacher_forward.py [--quick] [--json FILE] [--batch N] [--device cpu|cuda] [--compile]

The weights are random: their values do not change the time. The three ways take turns, and the best of their turns
counts; on a CPU the ratios are of processor time, so that a busy machine does not change them much.
`--quick`: a ViT-H of two blocks instead of thirty-two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.hamer import Hamer, HamerConfig, hands_from_features
from models.hand_model import OPEN_HAND, load_hand_model
from models.mano import ManoLayer
from models.sizes import IMAGE_SIZE, VitSizes
from models.teacher import Precision, Teacher
from models.vit import GRID_HW
from models.weight_loading import KeyReport

TOKENS = GRID_HW[0] * GRID_HW[1]


def random_teacher(sizes: VitSizes, device: torch.device, precision: Precision) -> Teacher:
    """A teacher of the official layout with small random weights."""
    hand_model = load_hand_model(OPEN_HAND)
    mano = ManoLayer(hand_model)
    with torch.device("meta"):
        network = Hamer(HamerConfig(vit=sizes), mano)
    for part in (network.backbone, network.mano_head):
        part.to_empty(device=device)
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.02)
    network.mano_head.start_from_mean(hand_model)
    return Teacher(network.to(device), precision, KeyReport((), {}, (), ()))


def matrix_products(teacher: Teacher, batch: int) -> tuple[Callable[[], None], float]:
    """Run every product of one forward pass, with the teacher's own weights and nothing between; and its GFLOP.

    Both products of the backbone's attention are among them. The head's, on one token a picture, are left out, but for
    its look at the feature map.
    """
    network = teacher.network
    heads, first = network.config.vit.num_heads, network.backbone.blocks[0].mlp.fc1.weight
    dtype, device = first.dtype, first.device
    looks = [module for name, module in network.mano_head.named_modules() if name.endswith("to_kv")]
    linears = [module for module in network.backbone.modules() if isinstance(module, nn.Linear)] + looks
    weights_OI: list[Tensor] = [network.backbone.patch_embed.proj.weight.flatten(1)]
    weights_OI += [module.weight for module in linears]
    inputs = {width: torch.randn(batch * TOKENS, width, device=device, dtype=dtype) for width in _sizes(weights_OI, 1)}
    outputs = {width: torch.empty(batch * TOKENS, width, device=device, dtype=dtype) for width in _sizes(weights_OI, 0)}
    width = network.config.vit.embed_dim // heads
    q_NTD = torch.randn(batch * heads, TOKENS, width, device=device, dtype=dtype)
    scores_NTT = torch.empty(batch * heads, TOKENS, TOKENS, device=device, dtype=dtype)
    mixed_NTD = torch.empty_like(q_NTD)

    def run() -> None:
        for weight in weights_OI:
            torch.mm(inputs[weight.shape[1]], weight.T, out=outputs[weight.shape[0]])
        for _ in network.backbone.blocks:
            torch.bmm(q_NTD, q_NTD.mT, out=scores_NTT)
            torch.bmm(scores_NTT, q_NTD, out=mixed_NTD)

    products = 2 * batch * TOKENS * sum(weight.numel() for weight in weights_OI)
    attention = 2 * 2 * len(network.backbone.blocks) * scores_NTT.numel() * width
    return run, (products + attention) / 1e9


def _sizes(weights: list[Tensor], axis: int) -> set[int]:
    return {weight.shape[axis] for weight in weights}


@dataclass(frozen=True)
class Seconds:
    """What one turn took."""

    wall: float
    busy: float
    """Of processors' time, which other programs on the machine hardly change; on a GPU the wall's."""


def best_seconds(ways: dict[str, Callable[[], object]], turns: int, device: torch.device) -> dict[str, Seconds]:
    """The shortest of each way's turns, after one that does not count."""
    found: dict[str, list[Seconds]] = {name: [] for name in ways}
    for _ in range(turns + 1):
        for name, way in ways.items():
            wall, busy = time.perf_counter(), time.process_time()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            wall, busy = time.perf_counter() - wall, time.process_time() - busy
            found[name].append(Seconds(wall, wall if device.type == "cuda" else busy))
    return {
        name: Seconds(min(turn.wall for turn in taken[1:]), min(turn.busy for turn in taken[1:]))
        for name, taken in found.items()
    }


@torch.no_grad()
def measure(
    sizes: VitSizes, batch: int, turns: int, device: torch.device, compiled: bool
) -> tuple[dict[str, Seconds], float]:
    """Seconds a batch of each way, and the GFLOP of a batch."""
    precision: Precision = "bf16" if device.type == "cuda" else "fp32"
    teacher = random_teacher(sizes, device, precision)
    images = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    products, gflop = matrix_products(teacher, batch)

    def unfused() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            teacher(images)

    ways: dict[str, Callable[[], object]] = {"ours": lambda: teacher(images), "unfused": unfused, "products": products}
    if compiled:
        ways["compiled"] = _compiled(teacher, images)
    return best_seconds(ways, turns, device), gflop


def _compiled(teacher: Teacher, images: Tensor) -> Callable[[], object]:
    """The same weights through torch.compile, whose first call takes its minutes here."""
    backbone = torch.compile(teacher.network.backbone)
    head, mano, focal_px = teacher.network.mano_head, teacher.network.mano, teacher.network.config.focal_px

    def run() -> object:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=teacher.precision == "bf16"):
            return hands_from_features(backbone(images), head, mano, focal_px)

    run()
    return run


def report(sizes: VitSizes, batch: int, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Measure, and say it in the layout that all benchmarks share."""
    gpu = device.type == "cuda"
    seconds, gflop = measure(sizes, batch, 20 if gpu else 3, device, compiled)
    machine = torch.cuda.get_device_name(device) if gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    whats = {"ours": "the teacher", "unfused": "with unfused attention", "products": "its matrix products alone"}
    whats |= {"compiled": "through torch.compile"} if compiled else {}
    rows: list[tuple[str, float, str]] = [
        (f"{what}, batch {batch}, depth {sizes.depth}", batch / seconds[way].wall, "pictures/s")
        for way, what in whats.items()
    ]
    rows.append(("rate of the products alone", gflop / seconds["products"].wall, "GFLOP/s"))
    rows.append(("products a picture", gflop / batch, "GFLOP"))
    return {
        "name": "teacher_forward",
        "machine": f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rows": [{"what": what, "value": round(value, 3), "unit": unit} for what, value, unit in rows],
        "ratios": {
            "of_gemm_ceiling": round(seconds["products"].busy / seconds["ours"].busy, 3),
            "fused_over_unfused": round(seconds["unfused"].busy / seconds["ours"].busy, 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", type=int, help="pictures a forward pass (8 on a CPU, 64 on a GPU)")
    parser.add_argument("--compile", action="store_true", help="measure the backbone through torch.compile, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    sizes = VitSizes(depth=2) if arguments.quick else VitSizes()
    batch = arguments.batch or (64 if device.type == "cuda" else 8)
    text = json.dumps(report(sizes, batch, device, arguments.compile), indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
