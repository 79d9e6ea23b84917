"""A workdir on a store and its copies: what is there when something was killed, and which of two writers counts."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from storage import objects
from storage.bucket import Bucket
from storage.durable import sha256_bytes
from storage.errors import WorkError
from storage.ledger import FileDigest, ShardRecord
from storage.mirror import Mirror
from tests.object_store import S3Server

URL = "s3://hands/work"
CACHE = "cache/0123456789abcdef"
STUDENT = "students/plain/seed-0/ab"


def write(mirror: Mirror, *names: str, content: str = "") -> None:
    for name in names:
        path = mirror.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content or name)


def files(mirror: Mirror) -> set[str]:
    found = (path.relative_to(mirror.root).as_posix() for path in mirror.root.rglob("*") if path.is_file())
    return {name for name in found if not name.startswith(".store/")}


def pull(mirror: Mirror, ours: bool = False) -> Mirror:
    mirror.pull(lambda: ours)
    return mirror


def test_what_one_copy_puts_another_has(server: S3Server, tmp_path: Path) -> None:
    one, two = Mirror(tmp_path / "one", URL), Mirror(tmp_path / "two", URL)
    durable = {"manifests/a/1.parquet", "report/identity.json", f"{CACHE}/cache.json", "logs/events.jsonl"}
    write(one, *durable, "lease.json", "references/users.lock", f"{CACHE}/shards/.x.zarr.0123456789abcdef.partial/f")
    one.push()
    assert set(Bucket(URL).below()) == durable
    write(two, "manifests/a/of an older run")
    assert files(pull(two)) == durable
    write(one, "report/identity.json", content="new")
    one.push()
    assert (pull(two).root / "report/identity.json").read_text() == "new"


def test_nothing_is_put_or_fetched_twice(server: S3Server, tmp_path: Path) -> None:
    one = Mirror(tmp_path / "one", URL)
    write(one, "manifests/a/1.parquet", "logs/events.jsonl")
    one.push()
    server.misbehave(("PUT", "", "500", 999), ("GET", "work/", "500", 999))  # listings go to the bucket itself
    one.push()
    pull(one, ours=True)
    pull(one)


def test_what_is_newer_here_stays_only_where_nobody_else_wrote(server: S3Server, tmp_path: Path) -> None:
    one = Mirror(tmp_path / "one", URL)
    record = f"{CACHE}/ledger/aa.json"
    write(one, "logs/events.jsonl", record, content="old")
    one.push()
    write(one, "logs/events.jsonl", content="newer")
    write(one, "students/a/seed-0/b/checkpoint.pt")
    Bucket(URL).delete([record])
    pull(one, ours=True)
    assert (one.root / "logs/events.jsonl").read_text() == "newer"
    assert files(one) == {"logs/events.jsonl", "students/a/seed-0/b/checkpoint.pt"}  # a record is the store's to say
    pull(one)
    assert (one.root / "logs/events.jsonl").read_text() == "old"
    assert files(one) == {"logs/events.jsonl"}


@pytest.mark.parametrize("fails", ["student/weights.safetensors", "result.json"])
def test_a_student_that_was_killed_between_its_files_and_its_result_is_not_taken_for_whole(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    monkeypatch.setattr(objects, "ATTEMPTS", 2)
    one, two = Mirror(tmp_path / "one", URL), Mirror(tmp_path / "two", URL)
    write(one, f"{STUDENT}/checkpoint.pt", f"{STUDENT}/best-2/weights.safetensors")
    one.push()
    (one.root / STUDENT / "checkpoint.pt").unlink()
    (one.root / STUDENT / "best-2").rename(one.root / STUDENT / "student")
    write(one, f"{STUDENT}/result.json")
    server.misbehave(("PUT", fails, "500", 2))
    with pytest.raises(WorkError, match=f"{fails}: write"):
        one.push()
    resumable = {f"{STUDENT}/checkpoint.pt", f"{STUDENT}/best-2/weights.safetensors"}
    assert files(pull(two)) == resumable
    assert [name.endswith("student/weights.safetensors") for name in two.orphans()] == [True] * (fails == "result.json")
    one.push()
    whole = {f"{STUDENT}/result.json", f"{STUDENT}/student/weights.safetensors"}
    assert files(pull(two)) == whole
    assert set(Bucket(URL).below()) == whole
    assert two.orphans() == []


def shard(folder: Path, text: str) -> ShardRecord:
    """A made-up shard of three files in a folder, and its record."""
    contents = {"zarr.json": f"{text} group", "a/zarr.json": f"{text} array", "a/c/0": text}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    digests = {name: FileDigest(len(data), sha256_bytes(data.encode())) for name, data in contents.items()}
    return ShardRecord("aa", "alpha", "train", 1, 1, (), {"by": text}, digests)


def stands(record: ShardRecord) -> bool:
    """Whether the objects are those that a record names."""
    found = {name: Bucket(URL).read(name)[0] for name in Bucket(URL).below(f"{CACHE}/shards/aa.zarr/")}
    return {name.rpartition(".zarr/")[2]: sha256_bytes(data) for name, data in found.items()} == {
        name: digest.sha256 for name, digest in record.files.items()
    }


def test_a_shard_is_committed_objects_first(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "ATTEMPTS", 2)
    one = Mirror(tmp_path / "one", URL)
    record = shard(tmp_path / "shard", "x")
    for part in ("aa.zarr/zarr.json", "ledger/aa.json"):
        server.misbehave(("PUT", part, "500", 2))
        with pytest.raises(WorkError, match=f"{part}: write"):
            one.commit_shard(one.root / CACHE, tmp_path / "shard", record)
        assert one.record(one.root / CACHE, "aa") is None
        assert files(pull(one)) == set()
        assert one.orphans() == [f"{CACHE}/shards/aa.zarr"]
    monkeypatch.setattr(objects, "ATTEMPTS", 8)
    server.misbehave(("PUT", "", "lost", 3))  # done, and not answered: it must come to the same
    assert one.commit_shard(one.root / CACHE, tmp_path / "shard", record) == record
    assert stands(record)
    assert one.orphans() == []
    assert files(pull(Mirror(tmp_path / "two", URL))) == {f"{CACHE}/ledger/aa.json"}
    assert pull(one).shards("0123456789abcdef") == {"aa"}
    one.remove(one.root / CACHE / "shards" / "aa.zarr")
    assert Bucket(URL).below() == {}
    assert files(one) == set()


@pytest.mark.parametrize("turn", range(2))
def test_of_two_workers_on_one_shard_the_record_names_the_bytes_that_stand(
    server: S3Server, tmp_path: Path, turn: int
) -> None:
    records = {name: shard(tmp_path / name, name * (turn + 1)) for name in ("x", "y")}
    told: dict[str, ShardRecord] = {}

    def commit(name: str) -> None:
        mirror = Mirror(tmp_path / f"of {name}", URL)
        told[name] = mirror.commit_shard(mirror.root / CACHE, tmp_path / name, records[name])

    threads = [threading.Thread(target=commit, args=(name,)) for name in records]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mirror = Mirror(tmp_path / "reader", URL)
    found = mirror.record(mirror.root / CACHE, "aa")
    assert found is not None
    assert found in records.values()
    assert stands(found)
    assert found in told.values()


def test_a_late_worker_whose_record_comes_second_leaves_a_sound_shard(server: S3Server, tmp_path: Path) -> None:
    first, late = (Mirror(tmp_path / name, URL) for name in ("first", "late"))
    records = {name: shard(tmp_path / f"shard {name}", name) for name in ("first", "late")}
    first.commit_shard(first.root / CACHE, tmp_path / "shard first", records["first"])
    late.commit_shard(
        late.root / CACHE, tmp_path / "shard late", records["late"]
    )  # a worker that was given up for dead
    found = first.record(first.root / CACHE, "aa")
    assert found is not None
    assert stands(found)
