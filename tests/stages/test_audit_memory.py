"""An audit of a cache that is larger than the memory it is allowed, in a process whose peak is looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_cache import write_tiny_cache

ROOT = Path(__file__).parents[2]
ALLOWED_MIB = 240
"""Python with numpy, pyarrow and Dask takes about 150 of it, a partition at most 35."""

PROGRAM = """
import sys
from pathlib import Path
from stages.audit import AuditedCache, computed_by_threads, partition_bytes, partitions_at_once, resident_bytes
from stages.audit import shard_jobs, tally_of
from storage.snapshots import read_head

root = Path(sys.argv[1])
cache = AuditedCache("train", root, read_head(root))
jobs = shard_jobs(cache, 100)["tiny"]
workers = partitions_at_once(int(sys.argv[2]) << 20, resident_bytes(), partition_bytes(cache), cores=2)
tally = tally_of(jobs, computed_by_threads(workers))
peak_mib = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
print(tally.counts["samples"], len(jobs), workers, peak_mib)
"""


def test_a_cache_larger_than_the_memory_is_audited_within_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # no power is cut here
    root = write_tiny_cache(tmp_path, n=1056, views=3, grid="full", channels=640, samples_per_shard=352, alike=True)
    largest_mib = max(path.stat().st_size for path in root.glob("shards/*/teacher/features/c.*")) >> 20
    total_mib = sum(path.stat().st_size for path in root.glob("shards/**/*") if path.is_file()) >> 20
    line = [sys.executable, "-c", PROGRAM, str(root), str(ALLOWED_MIB)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    samples, shards, workers, peak_mib = map(int, done.stdout.split())
    assert (samples, shards, workers) == (1056, 3, 2)
    assert total_mib > 1.5 * ALLOWED_MIB
    assert 2 * largest_mib > ALLOWED_MIB, "two shards at a time would not fit, if they stayed in memory"
    assert peak_mib < ALLOWED_MIB
