"""What the machine does while a student trains, under the names of MLflow's own monitor, which shows them apart.

MLflow's monitor writes to the store from a thread of its own and gives up when the store does not answer; these go
through the spool like all else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import torch

from pipeline.run_log import RunLog

MEGABYTE = 1e6
"""As MLflow counts them."""


@contextmanager
def measuring(run: RunLog, every_s: float) -> Iterator[None]:
    """Log the machine's state now and then, the first time at once, and once more at the end."""
    ended = threading.Event()
    process = psutil.Process()
    psutil.cpu_percent()  # the first answer is of no interval
    process.cpu_percent()

    def measure() -> None:
        seconds = 0.0
        while not ended.wait(seconds):
            run.metrics(machine_state(process), run.age_s)
            seconds = every_s
        run.metrics(machine_state(process), run.age_s)

    thread = threading.Thread(target=measure, name="system metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def machine_state(process: psutil.Process) -> dict[str, float]:
    """CPU (of all cores; the process's own, in cores), memory, and the GPU that this process uses, if it does."""
    memory = psutil.virtual_memory()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": memory.used / memory.total * 100,
        "process_cpu_cores": process.cpu_percent() / 100,
        "process_memory_megabytes": process.memory_info().rss / MEGABYTE,
        **_gpu_state(),
    }
    return {f"system/{name}": round(value, 2) for name, value in found.items()}


def _gpu_state() -> dict[str, float]:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch ships it untyped; asking more would use it
        return {}
    free, total = torch.cuda.mem_get_info()
    found = {
        "gpu_0_memory_usage_megabytes": (total - free) / MEGABYTE,
        "gpu_0_memory_usage_percentage": (total - free) / total * 100,
        "process_gpu_memory_peak_megabytes": torch.cuda.max_memory_allocated() / MEGABYTE,
    }
    with suppress(ModuleNotFoundError, RuntimeError):  # nvidia-ml-py is not there, or the driver does not say
        found["gpu_0_utilization_percentage"] = float(torch.cuda.utilization())
    return found
