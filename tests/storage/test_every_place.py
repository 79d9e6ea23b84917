"""Every kind of file of a cache, harmed in every way, one place at a time: `verify` names it, no reader believes it.

A place is one file and one harm. What a reader gives in spite of it must be exactly what was written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from storage import layout
from storage.cache import HAND_MODEL, CacheFolder
from storage.codecs import CODEC_FILE
from storage.config import FeatureEncoding
from storage.errors import DamageError
from storage.identity import sound_attachment
from storage.reading import Batch, open_cache
from storage.verification import Damage, verify_folder, verify_joins, verify_shard
from tests.tiny_cache import write_tiny_cache
from trainer.data import FEATURES, LABELS, PICTURES, TEACHER_OUTPUTS, Source, TrainMix

N, VIEWS = 3, 2
SHARD_FILES = {
    "zarr.json",
    *(f"{group}/zarr.json" for group in layout.GROUPS),
    *(f"{entry.path}/{name}" for entry in layout.ENTRIES for name in ("zarr.json", "chunk")),
}
"""Every file of a shard whose arrays are all there."""
FOLDER_FILES = {"cache.json", HAND_MODEL, "HEAD.json", "ledger/*.json", "snapshots/*.parquet", "snapshots/*.json"}


def flip(at: Callable[[int], int]) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at(len(data))] ^= 0x10
        path.write_bytes(data)

    return harm


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def harms(rng: np.random.Generator) -> dict[str, Callable[[Path], None]]:
    return {
        "first byte": flip(lambda size: 0),
        "middle byte": flip(lambda size: size // 2),
        "last byte": flip(lambda size: size - 1),
        "random byte": flip(lambda size: int(rng.integers(size))),
        "cut": cut,
        "emptied": empty,
        "appended": append,
        "deleted": Path.unlink,
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheFolder:
    """One shard with every array there is, one sample left out, an attachment. Each test leaves it as it was."""
    parent = tmp_path_factory.mktemp("cache")
    root = write_tiny_cache(parent, n=N, views=VIEWS, channels=3, truth_vertices=4, quarantined=1)
    return CacheFolder.create(parent, CacheFolder(root).identity, {HAND_MODEL: b"a hand model"})


def places(cache: CacheFolder, pattern: str = "*") -> Iterator[tuple[Path, str]]:
    """Each (file, harm) with the harm done; it is undone afterwards."""
    rng = np.random.default_rng(0)
    for path in sorted(path for path in cache.root.rglob(pattern) if path.is_file()):
        whole = path.read_bytes()
        for name, harm in harms(rng).items():
            harm(path)
            try:
                yield path, name
            finally:
                path.write_bytes(whole)


def kind(cache: CacheFolder, path: Path) -> str:
    """What a file is, whatever its digests: an entry of SHARD_FILES or FOLDER_FILES."""
    *folders, name = path.relative_to(cache.root).parts
    if folders[:1] == ["shards"]:
        return "/".join([*folders[2:], name if name == "zarr.json" else "chunk"])
    return "/".join([*folders, f"*{path.suffix}"]) if folders else name


def verify(cache: CacheFolder) -> list[Damage]:
    in_shards = [damage for record in cache.finished().values() for damage in verify_shard(cache, record)]
    return [*verify_folder(cache), *in_shards, *(verify_joins(cache) if not in_shards else ())]


def everything(cache: CacheFolder) -> list[Batch]:
    """All that a student's training and its validation would see, and all the rest of the cache beside."""
    sound_attachment(cache.root / HAND_MODEL)
    reader = open_cache(cache.root)
    rows, views = np.divmod(np.arange(N * VIEWS), VIEWS)
    keys = (*LABELS, *TEACHER_OUTPUTS, FEATURES, PICTURES)
    mix = TrainMix([Source("tiny", reader, 1.0)], batch_size=4, seed=0, keys=keys, validation_fraction=0.4)
    return [
        reader.read(rows.tolist(), views.tolist()),
        *mix.batches(0, 4, workers=0),
        *mix.validation_batches(),
    ]


def equal(found: list[Batch], wanted: list[Batch]) -> bool:
    return len(found) == len(wanted) and all(
        one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)
        for one, other in zip(found, wanted, strict=True)
    )


def test_verify_finds_every_harm_and_names_the_file(cache: CacheFolder) -> None:
    assert verify(cache) == []
    kinds: dict[str, int] = {}
    for path, harm in places(cache):
        found = verify(cache)
        assert any(str(path) in str(damage) for damage in found), (path, harm, found)
        kinds[kind(cache, path)] = kinds.get(kind(cache, path), 0) + 1
    assert kinds.keys() == SHARD_FILES | FOLDER_FILES
    assert min(kinds.values()) >= 8
    assert sum(kinds.values()) >= 600
    assert verify(cache) == []


def test_a_reader_gives_what_was_written_or_stops_and_names_the_file(cache: CacheFolder) -> None:
    true = everything(cache)
    stopped: set[str] = set()
    for path, harm in places(cache):
        told = ""
        try:
            assert equal(everything(cache), true), (path, harm)
        except DamageError as error:
            told = str(error)
            stopped.add(kind(cache, path))
        assert not told or (str(path) in told and "`handstill " in told), (path, harm, told)
    never_read = {"zarr.json", *(f"{group}/zarr.json" for group in layout.GROUPS)}
    assert stopped == (SHARD_FILES | FOLDER_FILES) - never_read
    assert equal(everything(cache), true)


@pytest.mark.parametrize("encoding", ["float16", "pca2-int8", "codes2"])
def test_features_and_codec_of_every_encoding_are_covered(tmp_path: Path, encoding: FeatureEncoding) -> None:
    """The other encodings store other features, and the fitted ones a codec that decodes them."""
    cache = CacheFolder(write_tiny_cache(tmp_path, n=2, views=1, channels=4, encoding=encoding))
    reader = open_cache(cache.root)
    true = [reader.read([0, 1], [0, 0])]
    found = 0
    for pattern in (CODEC_FILE, "teacher/features*/*"):
        for path, harm in places(cache, pattern):
            found += 1
            assert any(str(path) in str(damage) for damage in verify(cache)), (path, harm)
            with pytest.raises(DamageError, match=re.escape(str(path))):
                open_cache(cache.root).read([0, 1], [0, 0])
    assert found >= (16 if encoding == "float16" else 24)
    assert equal([open_cache(cache.root).read([0, 1], [0, 0])], true)
