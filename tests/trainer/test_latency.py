"""What speed is measured by: every way in every turn, percentiles of all calls, operations counted as they are."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.vit import GRID_HW, VitSizes
from tests.tiny_networks import TINY_HAMER, tiny_student
from trainer.config import LatencyConfig
from trainer.latency import (
    BOX_PX,
    PHOTO_HW,
    Latency,
    gflop,
    interleaved,
    measure_whole_path,
    peak_memory_mb,
    photograph,
    whole_path,
)

CPU = torch.device("cpu")


def test_percentiles_are_of_all_calls() -> None:
    latency = Latency.of(4, [0.01, 0.02, 0.03])
    assert (latency.p5_ms, latency.p50_ms, latency.p95_ms) == pytest.approx((11, 20, 29))
    assert latency.iterations == 3
    assert latency.pictures_per_s == pytest.approx(200)


def test_ways_take_turns_and_the_first_call_of_a_turn_does_not_count() -> None:
    calls: list[str] = []

    def way(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    ways = {"fast": lambda: way("fast", 0.02), "slow": lambda: way("slow", 0.2)}
    found = interleaved(ways, turns=2, device=CPU, seconds_a_turn=0.1)
    assert len(found["slow"]) == 2
    assert 4 <= len(found["fast"]) <= 10
    assert len(calls) == len(found["fast"]) + len(found["slow"]) + 4
    order = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert order == ["fast", "slow", "fast", "slow"]
    assert min(found["slow"]) >= 0.2


def test_operations_are_counted_attention_too() -> None:
    sizes = TINY_HAMER.vit or VitSizes()
    tokens, width = GRID_HW[0] * GRID_HW[1], sizes.embed_dim
    a_block = 12 * width * width * tokens + 2 * tokens * tokens * width
    patches = 3 * 16 * 16 * width * tokens
    student = tiny_student()
    backbone = 2 * (patches + sizes.depth * a_block) / 1e9
    assert gflop(nn.Sequential(student.backbone), CPU) == pytest.approx(backbone)
    assert backbone < gflop(student, CPU) < 1.5 * backbone


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process its own peak")
def test_a_peak_is_seen_after_it_is_gone() -> None:
    idle = peak_memory_mb(lambda: None, CPU)
    busy = peak_memory_mb(lambda: np.ones(200_000_000, np.uint8).sum(), CPU)
    after = peak_memory_mb(lambda: None, CPU)
    assert idle is not None
    assert busy is not None
    assert after is not None
    assert 150 < busy - idle < 400
    assert busy - after > 150


def test_the_whole_path_ends_with_a_mesh_in_memory() -> None:
    student = tiny_student().eval()
    said = whole_path(student, CPU, torch.contiguous_format)()
    assert isinstance(said, dict)
    assert {name: value.shape for name, value in said.items()} == {
        "keypoints_3d": (1, 21, 3), "keypoints_2d": (1, 21, 2), "vertices": (1, 750, 3),
    }  # fmt: skip
    assert photograph().shape == (*PHOTO_HW, 3)
    assert min(PHOTO_HW) > BOX_PX
    config = LatencyConfig(batch_sizes=[4], warmup=0, iterations=2)
    latency = measure_whole_path(student, config, CPU, channels_last=False)
    assert (latency.batch_size, latency.iterations) == (1, 2)
