"""How fast shuffled records come out of a cache, beside a memory map of the same numbers, which is the limit, and
beside the ways people store such data elsewhere.

    python benchmarks/cache_reading.py [--quick] [--json FILE] [--folder FOLDER] [--grid 8x8-int8|full-float16]

One payload, written once by each way's own writer: records of features as the teacher's cache holds them, and in int8
the scales of their tokens, which memmap, LMDB and WebDataset give beside them as ours does. Every way
answers the same shuffled batches of 64 records with one array in the stored type, one thread, page cache warm; the
ways take turns, and the best of their turns counts. `ours` reads what `handstill` writes, standard sharded Zarr with a
crc32c on each record: each record is checked when it is first touched, so that rate is given beside the one after.
tensorstore, zarr and zarrs read those same files. WebDataset cannot read at random: it streams through a shuffle buffer
of 1,000. Cold: the files' pages are dropped from the page cache before the turn.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage import layout
from storage.cache import CacheFolder, CacheReader, open_cache
from storage.durable import partial_path, publish_directory, sha256_bytes
from storage.ledger import write_record
from storage.shards import ShardHeader, ShardWriter
from storage.snapshots import build_snapshot, publish_snapshot, read_head, write_head

BATCH = 64
SAMPLES_PER_SHARD, VIEWS = 512, 3

Array = NDArray[Any]
Read = Callable[[NDArray[np.int64]], Array]
"""Record numbers (B,) to records (B,h,w,c)."""


@dataclass(frozen=True)
class Payload:
    """So many records of one shape; record r is view r % VIEWS of sample r // VIEWS."""

    samples: int
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]

    @property
    def records(self) -> int:
        return self.samples * VIEWS

    @property
    def record_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Of the scales that belong to a record, float32."""
        return self.shape[:2] if self.dtype == np.int8 else (0,)

    def whole(self, record: Array) -> bytes:
        """A record with its scales, for the ways that store both as one value."""
        return record.tobytes() + np.ones(self.scale_shape, np.float32).tobytes()

    def buffers(self, records: int) -> tuple[Array, Array]:
        """Room for so many records, and for their scales."""
        return np.empty((records, *self.shape), self.dtype), np.empty((records, *self.scale_shape), np.float32)

    def split(self, value: bytes, record: Array, scale: Array) -> None:
        """What `whole` made, into the places of one record and of its scales."""
        record[...] = np.frombuffer(value, self.dtype, record.size).reshape(self.shape)
        if scale.size:
            scale[...] = np.frombuffer(value, np.float32, offset=self.record_bytes).reshape(self.scale_shape)

    def sample(self, number: int) -> Array:
        """The records (VIEWS,h,w,c) of one sample: bytes at random, which nothing can compress."""
        draw = np.random.default_rng([7, number])
        if self.dtype == np.int8:
            return draw.integers(-127, 128, (VIEWS, *self.shape), dtype=np.int8)
        return draw.standard_normal((VIEWS, *self.shape), dtype=np.float32).astype(self.dtype)


def write_cache(folder: Path, payload: Payload) -> Path:
    """Our own writer: shards of 512 samples, with zeros in all that stands beside the features."""
    features = {"grid": "8x8-paper", "encoding": payload.dtype.name}
    cache = CacheFolder.create(folder, {"kind": "benchmark", "role": "train", "features": features})
    ids = [f"bench:{number:08d}#0" for number in range(payload.samples)]
    plans, records, zeros = [], {}, _zeros()
    for start in range(0, payload.samples, SAMPLES_PER_SHARD):
        rows = range(start, min(start + SAMPLES_PER_SHARD, payload.samples))
        name = sha256_bytes(f"shard {start}".encode())
        partial = partial_path(cache.shard_path(name))
        with ShardWriter(partial) as writer:
            for row in rows:
                values = zeros | {layout.FEATURES: payload.sample(row)}
                if payload.dtype == np.int8:
                    values[layout.FEATURES_SCALE] = np.ones((VIEWS, *payload.shape[:2]), np.float32)
                writer.append(ids[row], values, [b"no picture"] * VIEWS)
            records[name] = writer.finish(ShardHeader(name, "bench", "train", len(rows), (), {}))
        publish_directory(partial, cache.shard_path(name))
        write_record(cache.record_path(name), records[name])
        plans.append(_Plan(name, rows))
    table = build_snapshot(_manifest(ids), plans, records)
    write_head(cache.root, {"bench": publish_snapshot(cache.root, cache.fingerprint, "bench", table)})
    return cache.root


_SIZES = {
    "view": VIEWS, "one": 1, "matrix_row": 3, "matrix_column": 3, "joint_15": 15, "shape": 10, "s_tx_ty": 3,
    "joint_21": 21, "xy": 2, "xyz": 3, "xy_confidence": 3, "xyz_confidence": 4, "axis_angle": 3,
    "axis_angle_45": 45, "width_height": 2, "rgb": 3, "x_y_one": 3,
}  # fmt: skip


def _zeros() -> dict[str, NDArray[Any]]:
    """What a sample must have beside its features."""
    wanted = [each for each in layout.ENTRIES if not each.optional and each.path not in layout.WRITERS_OWN]
    return {
        each.path: np.zeros([_SIZES[name] for name in each.dimensions[1:]], each.dtypes[0])
        for each in wanted
        if each.path != layout.FEATURES
    }


@dataclass(frozen=True)
class _Plan:
    input_hash: str
    rows: Sequence[int]


def _manifest(ids: Sequence[str]) -> pa.Table:
    constant = {"dataset": "bench", "source": "bench.tar", "image_sha256": "0", "labels_sha256": "0"}
    columns: dict[str, Any] = {"sample_id": ids} | {name: [value] * len(ids) for name, value in constant.items()}
    return pa.table(columns | {"reason": pa.nulls(len(ids), pa.string())})


def ours(cache: Path, payload: Payload) -> Read:
    reader = open_cache(cache)
    assert len(reader) == payload.samples

    def read(records: NDArray[np.int64]) -> Array:
        return _features(reader, records)

    return read


def _features(reader: CacheReader, records: NDArray[np.int64]) -> Array:
    rows, views = np.divmod(records, VIEWS)
    batch = reader.read(rows, views, [layout.FEATURES], decoded=False)
    found: Array = batch[layout.FEATURES]
    return found


def ours_decoded(cache: Path) -> Read:
    """The same as float32, scales applied."""
    reader = open_cache(cache)

    def read(records: NDArray[np.int64]) -> Array:
        rows, views = np.divmod(records, VIEWS)
        found: Array = reader.read(rows, views, [layout.FEATURES])[layout.FEATURES]
        return found

    return read


def memmap(folder: Path, payload: Payload, at_once: bool = False) -> Read:
    """The limit: one flat file without checksums, mapped; record by record, or a batch in one call of numpy's C."""
    path = folder / "flat.npy"
    if not path.is_file():
        with path.open("wb") as file:  # written in order: one written through its map is scattered over the disk
            header = {"descr": payload.dtype.str, "fortran_order": False, "shape": (payload.records, *payload.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for number in range(payload.samples):
                file.write(payload.sample(number).tobytes())
    mapped = np.asarray(np.load(path, mmap_mode="r"))  # memmap's own __getitem__ is slower
    scales = np.ones((payload.records, *payload.scale_shape), np.float32)

    def one_by_one(records: NDArray[np.int64]) -> Array:
        out, scale = payload.buffers(len(records))
        for item, record in enumerate(records.tolist()):
            out[item] = mapped[record]
            if scale.size:
                scale[item] = scales[record]
        return out

    def gather(records: NDArray[np.int64]) -> Array:
        np.take(scales, records, axis=0)
        return np.take(mapped, records, axis=0)

    return gather if at_once else one_by_one


def lmdb(folder: Path, payload: Payload) -> Read:
    import lmdb as library

    path = folder / "lmdb"
    size = payload.records * (payload.record_bytes + 8192) + (64 << 20)
    fresh = not path.is_dir()
    environment = library.open(str(path), map_size=size, readahead=False, readonly=not fresh, lock=False)
    if fresh:
        with environment.begin(write=True) as transaction:
            for number in range(payload.samples):
                for view, record in enumerate(payload.sample(number)):
                    transaction.put(f"{number * VIEWS + view:09d}".encode(), payload.whole(record))
    transaction = environment.begin(buffers=True)

    def read(records: NDArray[np.int64]) -> Array:
        out, scale = payload.buffers(len(records))
        for item, record in enumerate(records.tolist()):
            payload.split(transaction.get(f"{record:09d}".encode()), out[item], scale[item])
        return out

    return read


def webdataset(folder: Path, payload: Payload) -> Read:
    """Streams the tars through a shuffle buffer: the numbers asked for only say how many records to give."""
    import webdataset as wds

    paths = _tars(folder, payload)

    def stream() -> Iterator[bytes]:
        while True:
            # the payload is already in memory order: no decoding but a view of the bytes
            dataset = wds.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False)
            for sample in dataset.shuffle(1000):
                yield sample["bin"]

    records_of = stream()

    def read(records: NDArray[np.int64]) -> Array:
        out, scale = payload.buffers(len(records))
        for item in range(len(records)):
            payload.split(next(records_of), out[item], scale[item])
        return out

    return read


def _tars(folder: Path, payload: Payload) -> list[Path]:
    starts = range(0, payload.samples, SAMPLES_PER_SHARD)
    paths = [folder / f"wds-{start:08d}.tar" for start in starts]
    for start, path in zip(starts, paths, strict=True):
        if path.is_file():
            continue
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(start, min(start + SAMPLES_PER_SHARD, payload.samples)):
                for view, record in enumerate(payload.sample(number)):
                    info = tarfile.TarInfo(f"{number * VIEWS + view:09d}.bin")
                    value = payload.whole(record)
                    info.size = len(value)
                    tar.addfile(info, BytesIO(value))
    return paths


def _shard_arrays(cache: Path) -> list[Path]:
    """The features of each shard, in the order of the samples."""
    (digest,) = read_head(cache).values()
    reader = open_cache(cache, digest)
    folders = dict.fromkeys(reader.shard_path(position) for position in range(len(reader)))
    return [folder / layout.FEATURES for folder in folders]


def _by_shard(records: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """(shard, row, view) of each record."""
    rows, views = np.divmod(records, VIEWS)
    shards, inside = np.divmod(rows, SAMPLES_PER_SHARD)
    return list(zip(shards.tolist(), inside.tolist(), views.tolist(), strict=True))


def tensorstore(cache: Path) -> Read:
    """Reads of one record each, a batch of them at a time under way, as its users do it; its own cache off."""
    import tensorstore as library

    context = library.Context({"cache_pool": {"total_bytes_limit": 0}})
    opened = [
        library.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}, context=context).result()
        for path in _shard_arrays(cache)
    ]

    def read(records: NDArray[np.int64]) -> Array:
        under_way = [opened[shard][row, view].read() for shard, row, view in _by_shard(records)]
        return np.stack([future.result() for future in under_way])

    return read


def zarr_python(cache: Path, pipeline: str | None = None) -> Read:
    """zarr-python's own random path; with zarrs' codec pipeline where that is named."""
    import zarr

    settings: dict[str, Any] = {} if pipeline is None else {"codec_pipeline.path": pipeline}
    with zarr.config.set(settings):
        opened = [zarr.open_array(store=path, mode="r") for path in _shard_arrays(cache)]

    def read(records: NDArray[np.int64]) -> Array:
        return np.stack([np.asarray(opened[shard][row, view]) for shard, row, view in _by_shard(records)])

    return read


def zarrs(cache: Path) -> Read:
    import zarrs as _  # noqa: F401 - registers its pipeline

    return zarr_python(cache, "zarrs.ZarrsCodecPipeline")


def check(read: Read, payload: Payload) -> None:
    """The way gives the numbers that were written."""
    records = np.random.default_rng(3).integers(payload.records, size=5)
    for record, found in zip(records.tolist(), read(records), strict=True):
        number, view = divmod(record, VIEWS)
        assert np.array_equal(found, payload.sample(number)[view]), record


def seconds_for(read: Read, batches: Sequence[NDArray[np.int64]]) -> float:
    gc.collect()
    start = time.perf_counter()
    for records in batches:
        read(records)
    return time.perf_counter() - start


def drop_pages(folder: Path) -> None:
    """Ask the kernel to forget the files' pages; written ones are forced to the disk first."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


SLOW = ("zarr", "zarr with zarrs")
"""They read under a hundredth as fast as the others and get fewer records to read."""


def measure(folder: Path, payload: Payload, turns: int) -> tuple[dict[str, float], dict[str, float]]:
    """Records a second of each way: warm (the best turn), and cold; `ours, first touch` among both."""
    cache = write_cache(folder / "cache", payload)
    ways: dict[str, Callable[[], Read]] = {
        "numpy memmap": lambda: memmap(folder, payload),
        "numpy memmap, a batch in one call": lambda: memmap(folder, payload, at_once=True),
        "ours": lambda: ours(cache, payload),
        "LMDB": lambda: lmdb(folder, payload),
        "WebDataset, streaming": lambda: webdataset(folder, payload),
        "tensorstore": lambda: tensorstore(cache),
        "zarr": lambda: zarr_python(cache),
        "zarr with zarrs": lambda: zarrs(cache),
    }
    opened = {name: make() for name, make in ways.items()}
    for name, read in opened.items():
        if name != "WebDataset, streaming":
            check(read, payload)
    opened["ours, as float32"] = ours_decoded(cache)
    draw = np.random.default_rng(11)
    everything = draw.permutation(payload.records)
    batches = [everything[start : start + BATCH] for start in range(0, payload.records - BATCH + 1, BATCH)]
    warm: dict[str, list[float]] = {name: [] for name in [*opened, "ours, first touch"]}
    for _ in range(turns + 1):
        for name, read in opened.items():
            mine = batches[: 4 if name in SLOW else len(batches)]
            warm[name].append(len(mine) * BATCH / seconds_for(read, mine))
        fresh = ours(cache, payload)
        fresh(everything[:1])  # opening the shards' files is not reading
        for shard in range(0, payload.samples, SAMPLES_PER_SHARD):
            fresh(np.array([shard * VIEWS]))
        warm["ours, first touch"].append(len(batches) * BATCH / seconds_for(fresh, batches))
    best = {name: max(rates[1:]) for name, rates in warm.items()}
    cold = {}
    opened.clear()  # maps keep their pages
    del read, fresh
    for name in ("numpy memmap", "ours", "LMDB", "tensorstore"):
        read = ways[name]()
        read(everything[:1])
        drop_pages(folder)
        few = batches[: max(4, len(batches) // 8)]
        cold[name] = len(few) * BATCH / seconds_for(read, few)
        del read
    return best, cold


def report(payload: Payload, folder: Path, turns: int) -> dict[str, Any]:
    warm, cold = measure(folder, payload, turns)
    rows = [{"what": f"{name}, warm", "value": round(rate), "unit": "records/s"} for name, rate in warm.items()]
    rows += [{"what": f"{name}, cold", "value": round(rate), "unit": "records/s"} for name, rate in cold.items()]
    gib = payload.records * payload.record_bytes / 2**30
    rows += [
        {"what": "a record", "value": payload.record_bytes, "unit": "bytes"},
        {"what": "all records", "value": round(gib, 3), "unit": "GiB"},
        {"what": "our rate in bytes", "value": round(warm["ours"] * payload.record_bytes / 2**30, 2), "unit": "GiB/s"},
        {"what": "peak memory, maps included", "value": _peak_gib(), "unit": "GiB"},
    ]
    over = {
        "over_memmap": "numpy memmap",
        "over_memmap_at_once": "numpy memmap, a batch in one call",
        "over_tensorstore": "tensorstore",
        "over_zarr_random": "zarr",
        "over_zarrs_random": "zarr with zarrs",
        "over_lmdb": "LMDB",
        "over_webdataset": "WebDataset, streaming",
    }
    ratios = {name: round(warm["ours"] / warm[other], 3) for name, other in over.items()}
    ratios["first_touch_over_memmap"] = round(warm["ours, first touch"] / warm["numpy memmap"], 3)
    ratios["cold_over_memmap"] = round(cold["ours"] / cold["numpy memmap"], 3)
    return {
        "name": "cache_reading",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rows": rows,
        "ratios": ratios,
    }


def _peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


PAYLOADS: Mapping[str, tuple[tuple[int, int, int], str]] = {
    "8x8-int8": ((8, 8, 1280), "int8"),
    "full-float16": ((16, 12, 1280), "float16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the payload")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the payload is written, and removed (a temporary folder)")
    parser.add_argument("--grid", choices=PAYLOADS, default="8x8-int8")
    arguments = parser.parse_args()
    shape, dtype = PAYLOADS[arguments.grid]
    record = int(np.prod(shape)) * np.dtype(dtype).itemsize
    samples = (10**8 if arguments.quick else 10**9) // (record * VIEWS)
    folder = Path(tempfile.mkdtemp(prefix="cache_reading-", dir=arguments.folder))
    try:
        found = report(Payload(samples, shape, np.dtype(dtype)), folder, turns=3 if arguments.quick else 5)
    finally:
        shutil.rmtree(folder)
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
