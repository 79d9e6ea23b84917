"""How fast `handstill audit` goes through a cache, beside reading the same bytes and doing nothing with them; how much
memory it takes of caches that grow; and Dask's threads beside Dask's processes and Dask on Ray.

    python benchmarks/audit.py [--quick] [--json FILE] [--gib X]

The caches are synthetic: int8 features of 8x8 tokens of 1280 channels, 128 samples of 3 views a shard. Files are in the
page cache: both the audit and the plain read (a megabyte at a time, on every core) take them from there, so their ratio
is what the audit costs beyond the bytes. Peaks of memory are of a fresh process each (VmHWM). The ways take turns, and
the best of their turns counts. `--quick`: caches of up to 0.15 GiB instead of 2 GiB.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SAMPLES_A_SHARD, VIEWS, TOKENS, CHANNELS = 128, 3, 64, 1280
SAMPLE_BYTES = VIEWS * (TOKENS * (CHANNELS + 4) + 4)
READ_BYTES = 1 << 20


def write_cache(parent: Path, gib: float) -> Path:
    """A cache with about so many GiB of features."""
    sys.path.insert(0, str(ROOT))  # the writer of tests' caches
    from tests.tiny_cache import write_tiny_cache

    shards = max(1, round(gib * 2**30 / SAMPLE_BYTES / SAMPLES_A_SHARD))
    return write_tiny_cache(
        parent,
        n=shards * SAMPLES_A_SHARD,
        views=VIEWS,
        channels=CHANNELS,
        samples_per_shard=SAMPLES_A_SHARD,
        alike=True,
    )


def files_read(cache: Path) -> list[Path]:
    """What an audit reads of a cache: everything in the shards but the pictures."""
    return [
        path for path in sorted(cache.glob("shards/*/**/*")) if path.is_file() and "pictures/bytes" not in str(path)
    ]


def read_plainly(files: Sequence[Path]) -> None:
    """Every byte into a buffer, on every core, and nothing else."""

    def read(path: Path) -> None:
        buffer = bytearray(READ_BYTES)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(read, files))


def read_with_checksums(files: Sequence[Path]) -> None:
    """The same, and the crc32c of every megabyte: what any checked read costs."""
    import google_crc32c

    def read(path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            while data := file.read(READ_BYTES):
                google_crc32c.value(data)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(read, files))


def counted(cache: Path, compute: Any) -> Any:
    """The audit's statistics of a cache, by one scheduler."""
    from stages.audit import AuditedCache, shard_jobs, tally_of
    from storage.snapshots import read_head

    audited = AuditedCache("train", cache, read_head(cache))
    return [tally_of(jobs, compute) for jobs in shard_jobs(audited, worst=100).values()]


def by_processes(graphs: Sequence[Any]) -> Any:
    """Dask's scheduler of processes."""
    import dask

    return dask.compute(*graphs, scheduler="processes", num_workers=os.cpu_count())


def best_seconds(ways: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """The shortest of each way's turns, after one that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - start)
    return {name: min(seconds[1:]) for name, seconds in taken.items()}


def peak_mib(cache: Path, memory_gib: float) -> tuple[float, float]:
    """(peak of a fresh process that audits a cache, peak of one that only imports what it needs), both MiB."""
    peaks = []
    for what in ("count", "import"):
        line = [sys.executable, __file__, "--peak", what, str(cache), "--gib", str(memory_gib)]
        done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT)
        peaks.append(float(done.stdout))
    return peaks[0], peaks[1]


def own_peak(what: str, cache: Path, memory_gib: float) -> float:
    """In the fresh process: MiB at the highest."""
    import dask.delayed
    import dask.threaded  # noqa: F401 - what a graph needs, so that both processes have it

    from stages.audit import AuditedCache, computed_by_threads, partition_bytes, partitions_at_once, resident_bytes
    from storage.snapshots import read_head

    if what == "count":
        audited = AuditedCache("train", cache, read_head(cache))
        one = partition_bytes(audited)
        workers = partitions_at_once(int(memory_gib * 2**30), resident_bytes(), one, os.cpu_count() or 1)
        counted(cache, computed_by_threads(workers))
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def report(sizes_gib: Sequence[float], memory_gib: float, turns: int) -> dict[str, Any]:
    """Measure, and say it in the layout that all benchmarks share."""
    import ray

    from pipeline.auditing import computed_on_ray
    from pipeline.config import ClusterConfig
    from pipeline.workers import ray_session
    from stages.audit import computed_by_threads

    cores = os.cpu_count() or 1
    rows: list[tuple[str, float, str]] = []
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for gib in sizes_gib:
            cache = write_cache(Path(folder) / f"{gib:g}", gib)
            peaks[gib], base = peak_mib(cache, memory_gib)
            rows.append((f"peak memory, cache of {gib:g} GiB, {memory_gib:g} GiB allowed", peaks[gib], "MiB"))
        rows.append(("of it Python and its libraries", base, "MiB"))
        files = files_read(cache)
        size_gb = sum(path.stat().st_size for path in files) / 1e9
        with ray_session(ClusterConfig()):
            ways: dict[str, Callable[[], object]] = {
                "plain read": lambda: read_plainly(files),
                "read with crc32c": lambda: read_with_checksums(files),
                "audit, threads": lambda: counted(cache, computed_by_threads(cores)),
                "audit, one thread": lambda: counted(cache, computed_by_threads(1)),
                "audit, processes": lambda: counted(cache, by_processes),
                "audit, on Ray": lambda: counted(cache, computed_on_ray(1)),
            }
            seconds = best_seconds(ways, turns)
    rows += [(name, size_gb / taken, "GB/s") for name, taken in seconds.items()]
    return {
        "name": "audit",
        "machine": f"{platform.machine()}, {cores} cores, ray {ray.__version__}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rows": [{"what": what, "value": round(value, 3), "unit": unit} for what, value, unit in rows],
        "ratios": {
            "over_plain_read": round(seconds["plain read"] / seconds["audit, threads"], 3),
            "over_checked_read": round(seconds["read with crc32c"] / seconds["audit, threads"], 3),
            "ray_over_threads": round(seconds["audit, threads"] / seconds["audit, on Ray"], 3),
            "processes_over_threads": round(seconds["audit, threads"] / seconds["audit, processes"], 3),
            "peak_growth": round(peaks[sizes_gib[-1]] / peaks[sizes_gib[0]], 3),
            "cache_growth": round(sizes_gib[-1] / sizes_gib[0], 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--gib", type=float, help="memory allowed (0.5; 0.4 with --quick)")
    parser.add_argument("--peak", nargs=2, metavar=("WHAT", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    memory_gib = arguments.gib or (0.4 if arguments.quick else 0.5)
    if arguments.peak:
        print(own_peak(arguments.peak[0], Path(arguments.peak[1]), memory_gib))
        return
    sizes = [0.04, 0.15] if arguments.quick else [0.25, 0.5, 1.0, 2.0]
    text = json.dumps(report(sizes, memory_gib, turns=1 if arguments.quick else 3), indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
