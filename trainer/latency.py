"""How long networks take, what they take it for, and what they weigh: warmed up, synchronised, said with the numbers.

Two paths are timed. The network alone: normalised crops on the device to the mesh there. The whole path, of one hand:
from a decoded photograph and a box to joints and mesh in memory, cropping and both transfers included.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.crops import crop
from models.preprocessing import normalise
from models.sizes import IMAGE_SIZE
from trainer.config import LatencyConfig

MIN_ITERATIONS = 10
PHOTO_HW = (720, 1280)
BOX_PX = 300.0
"""The photograph and the box of the whole path."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward at one batch size, on the device that the network is on."""

    batch_size: int
    p5_ms: float
    p50_ms: float
    p95_ms: float
    iterations: int
    pictures_per_s: float
    """At the median."""

    @classmethod
    def of(cls, batch_size: int, seconds: list[float]) -> Latency:
        """From how long each forward took."""
        p5, p50, p95 = (float(ms) for ms in np.percentile(np.array(seconds) * 1e3, [5, 50, 95]))
        return cls(batch_size, p5, p50, p95, len(seconds), batch_size / p50 * 1e3)


def measure(
    network: nn.Module, config: LatencyConfig, device: torch.device, *, channels_last: bool
) -> dict[str, Latency]:
    """Of the network alone, by batch size (as text, for JSON). It is put in eval mode and moved to the device."""
    memory_format = _prepare(network, device, channels_last)
    return {
        str(size): _measure(network_alone(network, size, device, memory_format), size, config, device)
        for size in config.batch_sizes
    }


def measure_whole_path(
    network: nn.Module, config: LatencyConfig, device: torch.device, *, channels_last: bool
) -> Latency:
    """Of the whole path, one hand."""
    memory_format = _prepare(network, device, channels_last)
    return _measure(whole_path(network, device, memory_format), 1, config, device)


def _prepare(network: nn.Module, device: torch.device, channels_last: bool) -> torch.memory_format:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    network.to(device).eval()
    network.to(memory_format=memory_format)
    return memory_format


def network_alone(
    network: nn.Module, batch_size: int, device: torch.device, memory_format: torch.memory_format
) -> Callable[[], object]:
    """One forward of random crops that are on the device already."""
    images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    images = images.to(device).contiguous(memory_format=memory_format)

    @torch.inference_mode()
    def run() -> object:
        return network(images)

    return run


def photograph() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Noise of PHOTO_HW, RGB."""
    return np.random.default_rng(0).integers(0, 256, (*PHOTO_HW, 3), dtype=np.uint8)


def whole_path(network: nn.Module, device: torch.device, memory_format: torch.memory_format) -> Callable[[], object]:
    """One hand of a photograph: crop, normalise, forward, joints and mesh back in memory."""
    photo, center = photograph(), (PHOTO_HW[1] / 2, PHOTO_HW[0] / 2)

    @torch.inference_mode()
    def run() -> object:
        picture = torch.from_numpy(crop(photo, center, BOX_PX, right=True, antialias=True).picture[None]).to(device)
        said = network(normalise(picture).contiguous(memory_format=memory_format))
        return {name: said[name].float().cpu().numpy() for name in ("keypoints_3d", "keypoints_2d", "vertices")}

    return run


def timed(way: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device has finished it."""
    start = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _measure(way: Callable[[], object], batch_size: int, config: LatencyConfig, device: torch.device) -> Latency:
    begin = time.perf_counter()
    for _ in range(config.warmup):
        timed(way, device)
        if time.perf_counter() - begin > config.max_seconds / 2:
            break
    seconds: list[float] = []
    while len(seconds) < config.iterations:
        seconds.append(timed(way, device))
        if len(seconds) >= MIN_ITERATIONS and time.perf_counter() - begin > config.max_seconds:
            break
    return Latency.of(batch_size, seconds)


def interleaved(
    ways: Mapping[str, Callable[[], object]], turns: int, device: torch.device, seconds_a_turn: float = 0.3
) -> dict[str, list[float]]:
    """Seconds of each call of several ways that take turns, so that what disturbs the machine disturbs all.

    In a turn a way runs once uncounted, because the one before it left the caches and its threads spinning, then for
    `seconds_a_turn` and once at least.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            timed(way, device)
            begin = time.perf_counter()
            found[name].append(timed(way, device))
            while time.perf_counter() - begin < seconds_a_turn:
                found[name].append(timed(way, device))
    return found


# ---- what a forward is ----------------------------------------------------------------------------------------------


def gflop(network: nn.Module, device: torch.device) -> float:
    """Billions of floating-point operations of a picture, two a multiply-add: convolutions and matrix products."""
    images = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    # The fused attention of some devices is not in the counter's list; its products are.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(images)
    return float(counter.get_total_flops()) / 1e9


def peak_memory_mb(way: Callable[[], object], device: torch.device) -> float | None:
    """The most memory that was in use while `way` ran, MB of 10^6 bytes: the device's allocations on a GPU, else all of
    this process, its libraries and whatever else it holds included. None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        way()
        return torch.cuda.max_memory_allocated(device) / 1e6
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts from what is resident now
        way()
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return None
