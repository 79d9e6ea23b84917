"""How long a student takes for a picture: warmed up, synchronised, with what was measured said beside the numbers."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from models.preprocessing import IMAGE_SIZE
from trainer.config import LatencyConfig

MIN_ITERATIONS = 10


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward at one batch size, from normalised pictures to mesh, on the device they are on."""

    batch_size: int
    p5_ms: float
    p50_ms: float
    p95_ms: float
    iterations: int
    pictures_per_s: float
    """At the median."""


def measure(
    network: nn.Module, config: LatencyConfig, device: torch.device, *, channels_last: bool
) -> dict[str, Latency]:
    """Latency by batch size (as text, for JSON). The network is put in eval mode and moved to the device."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    network = network.to(device).eval()
    network.to(memory_format=memory_format)
    return {str(size): _measure(network, size, config, device, memory_format) for size in config.batch_sizes}


@torch.inference_mode()
def _measure(
    network: nn.Module, batch_size: int, config: LatencyConfig, device: torch.device, memory_format: torch.memory_format
) -> Latency:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    images = images.to(device).contiguous(memory_format=memory_format)

    def once() -> float:
        start = time.perf_counter()
        network(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    begin = time.perf_counter()
    for _ in range(config.warmup):
        once()
        if time.perf_counter() - begin > config.max_seconds / 2:
            break
    seconds: list[float] = []
    while len(seconds) < config.iterations:
        seconds.append(once())
        if len(seconds) >= MIN_ITERATIONS and time.perf_counter() - begin > config.max_seconds:
            break
    p5, p50, p95 = (float(ms) for ms in np.percentile(np.array(seconds) * 1e3, [5, 50, 95]))
    return Latency(batch_size, p5, p50, p95, len(seconds), batch_size / p50 * 1e3)
