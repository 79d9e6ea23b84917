"""Copies of a store's input files: where they lie, and that no object's name leads out of their folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from storage import inputs
from storage.bucket import Bucket
from storage.errors import InputError
from storage.inputs import bring, bring_all, copies, copy_of, is_file, is_folder, look, version
from tests.object_store import S3Server


@pytest.fixture(autouse=True)
def _copies_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


def test_a_copy_lies_in_its_buckets_folder() -> None:
    assert copy_of("s3://hands/a/b.tar") == copies() / "hands" / "a" / "b.tar"


@pytest.mark.parametrize("key", ["/etc/cron.d/x", "a/../../../x", ".."])
def test_a_name_that_leads_out_of_the_folder_is_refused(key: str) -> None:
    with pytest.raises(InputError, match="leads out of a folder; rename it"):
        copy_of(f"s3://hands/{key}")


def test_an_object_whose_name_leads_out_is_not_copied(server: S3Server, tmp_path: Path) -> None:
    bucket = Bucket("s3://hands/work")
    bucket.write("in/1.tar", b"whole")
    bucket.write("in/../../../../out.tar", b"hostile")
    with pytest.raises(InputError, match="leads out of a folder; rename it"):
        look(["s3://hands/work/in/"])
    assert not list(tmp_path.rglob("out.tar"))


def test_looking_copies_nothing_and_knows_every_version(server: S3Server) -> None:
    bucket = Bucket("s3://hands/looked")
    bucket.write("in/1.tar", b"whole")
    look(["s3://hands/looked/in"])
    path, folder = copy_of("s3://hands/looked/in/1.tar"), copy_of("s3://hands/looked/in")
    assert (is_file(path), is_folder(folder), path.exists(), folder.exists()) == (True, True, False, False)
    seen = version(path)
    bring(path)
    assert path.read_bytes() == b"whole"
    assert (path.stat().st_size, path.stat().st_mtime_ns) == version(path) == seen
    with pytest.raises(FileNotFoundError, match="no longer on the store"):
        version(folder / "2.tar")


def test_only_what_changed_is_fetched_again(server: S3Server) -> None:
    bucket = Bucket("s3://hands/work")
    urls = ["s3://hands/work/1.tar", "s3://hands/work/2.tar"]
    for name in ("1.tar", "2.tar"):
        bucket.write(name, name.encode())
    look(urls)
    bring_all(map(copy_of, urls))
    before = copy_of(urls[0]).stat()
    bucket.write("2.tar", b"new")
    look(urls)
    bring_all(map(copy_of, urls))
    assert copy_of(urls[0]).stat().st_ino == before.st_ino
    assert copy_of(urls[1]).read_bytes() == b"new"


def test_what_is_gone_from_a_folder_is_no_longer_here(server: S3Server) -> None:
    bucket = Bucket("s3://hands/going")
    for name in ("rgb/1.jpg", "rgb/2.jpg"):
        bucket.write(name, name.encode())
    look(["s3://hands/going/rgb"])
    bring_all(copy_of(f"s3://hands/going/rgb/{n}.jpg") for n in (1, 2))
    bucket.delete(["rgb/2.jpg"])
    look(["s3://hands/going/rgb"])
    assert [path.name for path in copy_of("s3://hands/going/rgb").iterdir()] == ["1.jpg"]


def test_a_machine_that_did_not_look_gets_what_the_store_has_when_it_asks(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket("s3://hands/elsewhere")
    bucket.write("1.tar", b"old")
    path = copy_of("s3://hands/elsewhere/1.tar")
    bring(path)
    bucket.write("1.tar", b"new")
    monkeypatch.setattr(inputs, "_on_store", {})
    bring(path)
    assert path.read_bytes() == b"old"  # a process that is not told otherwise trusts what is here
    bring(path, fresh=True)
    assert path.read_bytes() == b"new"


def test_a_file_that_is_not_there_is_named_unless_it_may_be_missing(server: S3Server) -> None:
    path = copy_of("s3://hands/elsewhere/gone.tar")
    bring(path, optional=True)
    assert not path.exists()
    with pytest.raises(InputError, match=r"gone\.tar.*; bring it back, or take it out of the configuration"):
        bring(path)


def test_no_copy_is_begun_that_the_disk_has_no_room_for(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    Bucket("s3://hands/large").write("1.tar", b"whole")
    look(["s3://hands/large/1.tar"])
    monkeypatch.setattr(inputs.shutil, "disk_usage", lambda _path: SimpleNamespace(free=4))
    for copying in (bring, lambda path: bring_all([path])):
        with pytest.raises(InputError, match="make room, or point XDG_CACHE_HOME at a larger disk"):
            copying(copy_of("s3://hands/large/1.tar"))
    assert not copy_of("s3://hands/large/1.tar").exists()
