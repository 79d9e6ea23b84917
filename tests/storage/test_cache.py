from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from storage.cache import CacheFolder, fingerprint, open_cache
from storage.durable import partial_path
from storage.errors import DamageError, InputError
from storage.identity import cache_document
from storage.ledger import read_withdrawal
from storage.snapshots import read_head, write_head
from storage.verification import verify_folder
from tests.tiny_cache import write_tiny_cache

IDENTITY = {"teacher": {"checkpoint_sha256": "ab" * 32}, "views": 3}


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_fingerprint_is_pinned_and_depends_on_content_alone() -> None:
    assert fingerprint(IDENTITY) == fingerprint(dict(reversed(IDENTITY.items()))) == "26ef007d4356119c"
    assert fingerprint(IDENTITY | {"views": 2}) != fingerprint(IDENTITY)


def test_creating_twice_changes_nothing(tmp_path: Path) -> None:
    first = CacheFolder.create(tmp_path, IDENTITY, {"hand_model.safetensors": b"hand"})
    before = contents(first.root)
    stamps = {path: path.stat().st_mtime_ns for path in first.root.rglob("*")}
    assert CacheFolder.create(tmp_path, IDENTITY, {"hand_model.safetensors": b"hand"}) == first
    assert contents(first.root) == before
    assert {path: path.stat().st_mtime_ns for path in first.root.rglob("*")} == stamps
    assert first.identity == IDENTITY
    assert first.fingerprint == fingerprint(IDENTITY) == first.root.name


@pytest.mark.parametrize("name", ["cache.json", "hand_model.safetensors"])
@pytest.mark.parametrize("damage", [b"", None])
def test_creating_again_mends_what_identity_gives(tmp_path: Path, name: str, damage: bytes | None) -> None:
    cache = CacheFolder.create(tmp_path, IDENTITY, {"hand_model.safetensors": b"hand"})
    before = contents(cache.root)
    (cache.root / name).unlink()
    if damage is not None:
        (cache.root / name).write_bytes(damage)
    CacheFolder.create(tmp_path, IDENTITY, {"hand_model.safetensors": b"hand"})
    assert contents(cache.root) == before


def test_another_version_of_the_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.layout.FORMAT_VERSION", 99)
    cache = CacheFolder.create(tmp_path, IDENTITY)
    assert cache_document(IDENTITY, {})["format_version"] == 99
    monkeypatch.undo()
    with pytest.raises(InputError, match="version 99"):
        cache.description()


def test_unrecorded_whole_shards_are_adopted_byte_for_byte(tmp_path: Path) -> None:
    cache = CacheFolder(write_tiny_cache(tmp_path, quarantined=2))
    before = contents(cache.root)
    hashes = sorted(cache.finished())
    for input_hash in hashes:
        cache.withdraw(input_hash)
    assert cache.finished() == {}
    assert cache.unrecorded() == hashes
    adoption = cache.adopt()
    assert [record.input_hash for record in adoption.adopted] == hashes
    assert adoption.discarded == ()
    assert contents(cache.root) == before


def test_unrecorded_damaged_shards_are_discarded(tmp_path: Path) -> None:
    cache = CacheFolder(write_tiny_cache(tmp_path))
    bad, good = sorted(cache.finished())
    cache.withdraw(bad)
    path = cache.shard_path(bad) / "teacher/cam/c.0.0.0"
    data = path.read_bytes()
    path.write_bytes(data[:5] + bytes([data[5] ^ 1]) + data[6:])
    assert cache.adopt().discarded == (bad,)
    assert not cache.shard_path(bad).exists()
    assert list(cache.finished()) == [good]


def harmed_and_withdrawn(cache: CacheFolder, why: list[str]) -> str:
    """The input hash of a shard that `verify` found damaged."""
    bad = min(cache.finished())
    path = cache.shard_path(bad) / "teacher/cam/c.0.0.0"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    cache.withdraw(bad, why)
    return bad


def test_why_a_record_was_withdrawn_is_kept_until_the_shard_is_whole_again(tmp_path: Path) -> None:
    cache = CacheFolder(write_tiny_cache(tmp_path))
    before = contents(cache.root)
    why = ["shards/x.zarr/teacher/cam/c.0.0.0: has other bytes than were written"]
    bad = harmed_and_withdrawn(cache, why)
    assert read_withdrawal(cache.withdrawal_path(bad)) == why
    assert cache.unrecorded() == [bad]
    with pytest.raises(DamageError, match=r"teacher/cam/c\.0\.0\.0: has other bytes.*handstill run"):
        open_cache(cache.root).read(list(range(12)), [0] * 12)
    found = [str(damage) for damage in verify_folder(cache)]
    assert any("record was withdrawn: shards/x.zarr/teacher/cam" in line for line in found)
    whole = write_tiny_cache(tmp_path / "again")  # someone brings the shard back from elsewhere
    shutil.copytree(whole / "shards" / f"{bad}.zarr", cache.shard_path(bad), dirs_exist_ok=True)
    assert [record.input_hash for record in cache.adopt().adopted] == [bad]
    assert contents(cache.root) == before


def test_a_note_goes_with_its_shard(tmp_path: Path) -> None:
    cache = CacheFolder(write_tiny_cache(tmp_path))
    bad = harmed_and_withdrawn(cache, ["it"])
    assert cache.adopt().discarded == (bad,)
    assert not cache.withdrawal_path(bad).exists()
    other = harmed_and_withdrawn(cache, ["it"])
    shutil.rmtree(cache.shard_path(other))
    assert [damage.path for damage in verify_folder(cache)] == [cache.withdrawal_path(other)]
    cache.adopt()
    assert not cache.withdrawal_path(other).exists()


def test_a_damaged_note_hides_nothing(tmp_path: Path) -> None:
    cache = CacheFolder(write_tiny_cache(tmp_path))
    bad = harmed_and_withdrawn(cache, ["it"] * 30)
    note = cache.withdrawal_path(bad)
    assert read_withdrawal(note) == [*["it"] * 20, "and 10 more"]
    note.write_bytes(note.read_bytes().replace(b"it", b"at"))
    assert {damage.path for damage in verify_folder(cache)} == {note, cache.shard_path(bad)}
    with pytest.raises(DamageError, match="withdrawn"):
        open_cache(cache.root).read(list(range(12)), [0] * 12)
    note.unlink()
    assert [damage.path for damage in verify_folder(cache)] == [cache.shard_path(bad)]


def test_a_damaged_record_counts_for_nothing_and_is_written_again(tmp_path: Path) -> None:
    cache = CacheFolder(write_tiny_cache(tmp_path))
    before = contents(cache.root)
    first, second = sorted(cache.finished())
    cache.record_path(first).write_bytes(b"{}")
    assert list(cache.finished()) == [second]
    assert cache.finished_record(first) is None
    cache.adopt()
    assert contents(cache.root) == before


def test_sweeping_leaves_a_cache_as_it_was(tmp_path: Path) -> None:
    cache = CacheFolder(write_tiny_cache(tmp_path))
    before = contents(cache.root)
    leftovers = [cache.shard_path("ab" * 32), cache.record_path("ab" * 32), cache.snapshots_dir / "x", cache.root / "y"]
    for final in leftovers:
        partial_path(final).mkdir()
    assert cache.sweep_temporary() == 4
    assert contents(cache.root) == before


def test_a_damaged_head_is_said_and_can_be_written_again(tmp_path: Path) -> None:
    root = write_tiny_cache(tmp_path)
    head = read_head(root)
    data = (root / "HEAD.json").read_bytes()
    (root / "HEAD.json").write_bytes(data.replace(b"tiny", b"tony"))
    with pytest.raises(DamageError, match=r"HEAD\.json"):
        read_head(root)
    write_head(root, head)
    assert (root / "HEAD.json").read_bytes() == data
