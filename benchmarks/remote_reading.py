"""How fast training batches come from a cache on an object store: shards already on the disk, shards fetched a window
ahead, a request a record; beside one sequential GET of the same bytes, the most that one stream of the store gives.

    python benchmarks/remote_reading.py [--quick] [--json FILE]

The store is moto's S3 server on loopback, a Python process: its rate of requests, not a network's, bounds all but the
first row, so that the ratios say more than the rates. `--quick`: a sixteenth of the samples.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from storage.cache import open_cache
from storage.ledger import ShardRecord, read_record
from storage.objects import ObjectStore
from storage.reading import CacheReader
from storage.upload import upload_cache
from tests.object_store import BUCKET, s3_server
from tests.tiny_cache import write_tiny_cache
from trainer.data import FEATURES, PICTURES, Source, TrainMix

VIEWS = 3
BATCH = 32
KEYS = (PICTURES, FEATURES)
ROOM = 10**12
LARGE = ("teacher/features/c.0.0.0.0.0", "pictures/bytes/c.0")


def epoch(reader: CacheReader, window_shards: int) -> int:
    """Read one epoch as training does; how many records that was."""
    mix = TrainMix(
        [Source("tiny", reader, 1.0)], batch_size=BATCH, seed=0, keys=KEYS, shuffle="window",
        window_shards=window_shards,
    )  # fmt: skip
    return sum(len(batch[PICTURES]) for batch in mix.batches(0, len(reader) // BATCH, 1))


def records_one_by_one(reader: CacheReader, store: ObjectStore, count: int) -> int:
    """Two ranged GETs a record, its features and its picture, in random order; checks and decoding left out."""
    rng = np.random.default_rng(0)
    for position in rng.integers(len(reader), size=count).tolist():
        shard, row = reader.shard_path(position).name, int(reader._row_of[position])
        opened = reader._shard(position)
        features_bytes = int(np.prod(opened.feature_shape)) * opened.feature_dtype.itemsize + 4
        store.read_range(f"shards/{shard}/{LARGE[0]}", row * VIEWS * features_bytes, features_bytes)
        start, length = (int(opened.small[f"pictures/{name}"][row, 0]) for name in ("offset", "length"))
        store.read_range(f"shards/{shard}/{LARGE[1]}", start, length)
    return count


def sequential(store: ObjectStore, records: list[ShardRecord]) -> int:
    """The large objects of all shards, each in one GET, one after the other; bytes."""
    return sum(len(store.read(f"shards/{record.input_hash}.zarr/{name}")) for record in records for name in LARGE)


def timed(way: Callable[[], int]) -> float:
    """What comes out a second."""
    started = time.perf_counter()
    count = way()
    return count / (time.perf_counter() - started)


def folders(parent: Path) -> Iterator[Path]:
    for number in range(1000):
        yield parent / f"disk-{number}"


def measure(parent: Path, shards: int, samples_per_shard: int, turns: int) -> dict[str, float]:
    """Best of the turns of each way, taken in turn."""
    folder = write_tiny_cache(
        parent / "cache", n=shards * samples_per_shard, views=VIEWS, channels=1280, samples_per_shard=samples_per_shard
    )
    records = [read_record(path) for path in sorted((folder / "ledger").glob("*.json"))]
    url = upload_cache(folder, f"s3://{BUCKET}/bench").url
    here, store, fresh = open_cache(folder), ObjectStore(url), folders(parent)
    warm = open_cache(url, local=parent / "warm", limit_bytes=ROOM)
    window = max(shards // 4, 1)
    epoch(warm, window)
    ways: dict[str, Callable[[], int]] = {
        "local": lambda: epoch(here, window),
        "warm": lambda: epoch(warm, window),
        "cold": lambda: epoch(open_cache(url, local=next(fresh), limit_bytes=ROOM), window),
        "naive": lambda: records_one_by_one(here, store, 2 * BATCH),
        "sequential": lambda: sequential(store, records),
    }
    best = dict.fromkeys(ways, 0.0)
    for _ in range(turns):
        for name, way in ways.items():
            best[name] = max(best[name], timed(way))
    large = sum(record.files[name].bytes for record in records for name in LARGE)
    # an epoch shows one view of each sample, but its shards' bytes hold all of them
    best["limit"] = best["sequential"] / large * shards * samples_per_shard
    best["megabytes_a_record"] = large / (shards * samples_per_shard) / 1e6
    return best


def report(quick: bool) -> dict[str, Any]:
    """Measure, and say it in the layout that all benchmarks share."""
    with tempfile.TemporaryDirectory() as parent, s3_server():
        best = measure(Path(parent), shards=4 if quick else 16, samples_per_shard=32 if quick else 128, turns=2)
    rows = [
        ("an epoch from a local cache, one view a sample", best["local"], "records/s"),
        ("the same from the store, all shards on the disk already", best["warm"], "records/s"),
        ("the same from the store, nothing on the disk: a window ahead", best["cold"], "records/s"),
        ("two ranged GETs a record", best["naive"], "records/s"),
        ("one sequential GET of the same objects", best["sequential"] / 1e6, "MB/s"),
        ("that stream, as samples of an epoch with all their views", best["limit"], "records/s"),
        ("bytes a sample with all its views", best["megabytes_a_record"], "MB"),
    ]
    return {
        "name": "remote_reading",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rows": [{"what": what, "value": round(value, 3), "unit": unit} for what, value, unit in rows],
        "ratios": {
            "warm_over_local": round(best["warm"] / best["local"], 3),
            "cold_over_naive": round(best["cold"] / best["naive"], 3),
            "cold_over_one_stream": round(best["cold"] / best["limit"], 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(report(arguments.quick), indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
