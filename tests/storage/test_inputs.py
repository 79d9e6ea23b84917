"""Copies of a store's input files: where they lie, and that no object's name leads out of their folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.bucket import Bucket
from storage.errors import InputError
from storage.inputs import bring_all, copies, copy_of
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
        bring_all(["s3://hands/work/in/"])
    assert not list(tmp_path.rglob("out.tar"))


def test_only_what_changed_is_fetched_again(server: S3Server) -> None:
    bucket = Bucket("s3://hands/work")
    for name in ("1.tar", "2.tar"):
        bucket.write(name, name.encode())
    bring_all(["s3://hands/work/1.tar", "s3://hands/work/2.tar"])
    before = {name: copy_of(f"s3://hands/work/{name}").stat() for name in ("1.tar", "2.tar")}
    bucket.write("2.tar", b"new")
    bring_all(["s3://hands/work/1.tar", "s3://hands/work/2.tar"])
    assert copy_of("s3://hands/work/1.tar").stat().st_ino == before["1.tar"].st_ino
    assert copy_of("s3://hands/work/2.tar").read_bytes() == b"new"
