"""Any flipped byte, cut, deletion or addition anywhere in a cache folder is found, and named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from storage.cache import CacheFolder
from storage.durable import partial_path, sealed_json
from storage.ledger import record_document
from storage.verification import Damage, quick_check, verify_folder, verify_shard
from tests.tiny_cache import write_tiny_cache


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of one small shard, with an attachment."""
    parent = tmp_path_factory.mktemp("cache")
    root = write_tiny_cache(parent, n=3, views=2, channels=3, truth_vertices=4, quarantined=1)
    identity = CacheFolder(root).identity
    CacheFolder.create(parent, identity, {"hand_model.safetensors": b"a hand model"})
    return root


@pytest.fixture
def cache(template: Path, tmp_path: Path) -> CacheFolder:
    return CacheFolder(Path(shutil.copytree(template, tmp_path / template.name)))


def verify(cache: CacheFolder) -> list[Damage]:
    return [
        *verify_folder(cache),
        *(damage for record in cache.finished().values() for damage in verify_shard(cache, record)),
    ]


def test_a_whole_cache_has_no_damage(cache: CacheFolder) -> None:
    assert verify(cache) == []
    (record,) = cache.finished().values()
    assert quick_check(cache, record) == []
    on_disk = sum(path.stat().st_size for path in cache.shards_dir.rglob("*") if path.is_file())
    assert record.bytes == on_disk


@pytest.mark.parametrize(
    "where",
    ["stray", "shards/stray", "ledger/stray", "snapshots/stray", "snapshots/stray.json", "shards/{}.zarr/stray"],
)
def test_what_does_not_belong_is_found(cache: CacheFolder, where: str) -> None:
    (input_hash,) = cache.finished()
    path = cache.root / where.format(input_hash)
    path.write_bytes(b"")
    assert [damage.path for damage in verify(cache)] == [path]
    path.unlink()
    path.mkdir()
    assert [damage.path for damage in verify(cache)] == [path]


def test_what_is_being_written_is_no_damage(cache: CacheFolder) -> None:
    for folder in (cache.root, cache.shards_dir, cache.ledger_dir, cache.snapshots_dir):
        partial_path(folder / "x").mkdir()
    assert verify(cache) == []


def test_quick_check_finds_deletions_and_cuts(cache: CacheFolder) -> None:
    (record,) = cache.finished().values()
    shard = cache.shard_path(record.input_hash)
    (shard / "teacher/cam/c.0.0.0").unlink()
    (shard / "labels/betas/c.0.0.0").write_bytes(b"")
    assert {damage.path.parent.name for damage in quick_check(cache, record)} == {"cam", "betas"}
    shutil.rmtree(shard)
    assert [str(damage) for damage in quick_check(cache, record)] == [f"{shard}: is gone"]


def test_a_record_that_lies_about_its_shard_is_found(cache: CacheFolder) -> None:
    (record,) = cache.finished().values()
    document = record_document(record) | {"provenance": {"device": "another"}}
    cache.record_path(record.input_hash).write_bytes(sealed_json(document))
    (lied,) = cache.finished().values()
    assert [damage.path for damage in verify_shard(cache, lied)] == [cache.record_path(record.input_hash)]
