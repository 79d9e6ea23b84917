"""Input files on an object store (tars, pictures, checkpoints): copied whole to this machine before they are opened.

A copy's path follows from its URL, so that a process on another machine, which is given the path, knows where to fetch
it: <user's cache folder>/inputs/<bucket>/<key>. Whether a copy is still what the store has is told by its ETag.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from storage.bucket import Bucket, Found
from storage.disk_cache import default_folder
from storage.durable import file_stamp, sha256_bytes, write_bytes_atomic
from storage.errors import InputError
from storage.objects import parsed_url

log = logging.getLogger("handstill")

_INDEX = ".etags.json"


def copies() -> Path:
    """The folder of all copies on this machine."""
    return (default_folder() / "inputs").absolute()


def copy_of(url: str) -> Path:
    """Where the copy of a file or folder lies, or will. InputError where the URL is none of s3://."""
    scheme, bucket, key = parsed_url(url)
    if scheme != "s3":
        raise InputError(f"{url}: input files are read from s3:// only; for other stores give their S3 interface")
    return _place(copies() / bucket, key)


def _place(folder: Path, key: str) -> Path:
    if key.startswith("/") or ".." in key.split("/"):
        raise InputError(f"s3://{folder.name}/{key}: the object's name leads out of a folder; rename it")
    return folder / key


def is_copy(path: Path) -> bool:
    """Whether a path is where an object's copy lies, or would. Such a file's time follows from the object's ETag, so
    that size and time tell a version on every machine, where inodes do not."""
    return path.is_relative_to(copies())


def _time_ns(etag: str) -> int:
    return int(sha256_bytes(etag.encode())[:15], 16)


def bring(path: Path | None, *, optional: bool = False) -> None:
    """Have one copy here, in a process that was given its path; nothing where it is here, or is no copy.

    optional: it need not be on the store. Raises InputError or WorkError, which name the object.
    """
    if path is None or path.is_file() or not is_copy(path):
        return
    bucket, _, key = path.relative_to(copies()).as_posix().partition("/")
    try:
        Bucket.whole(bucket).fetch(key, path, _time_ns)
    except FileNotFoundError as error:
        if optional:
            return
        raise InputError(f"{error}; bring it back, or take it out of the configuration") from None


def bring_all(urls: Iterable[str], optional: Collection[str] = ()) -> None:
    """Have every file that a URL names, and all files below one that names a folder, as the store has them now.

    Raises:
        InputError: something is not on the store (what is optional may be missing), or there is no room for it.
        WorkError: the store does not answer.
    """
    by_bucket: dict[str, set[str]] = {}
    for url in [*urls, *optional]:
        _, place, key = parsed_url(url)
        by_bucket.setdefault(place, set()).add(key)
    free_to_miss = {parsed_url(url)[1:] for url in optional}
    for name, keys in by_bucket.items():
        bucket = Bucket.whole(name)
        found = _found(bucket, keys)
        missing = sorted(
            key for key in keys if key not in found and not any(each.startswith(f"{key}/") for each in found)
        )
        wanted = [f"s3://{name}/{key}" for key in missing if (name, key) not in free_to_miss]
        if wanted:
            more = f" and {len(wanted) - 3} more" if len(wanted) > 3 else ""
            raise InputError(f"not on the object store: {', '.join(wanted[:3])}{more}; bring them, or correct the path")
        _bring(bucket, copies() / name, found)


def _found(bucket: Bucket, keys: Collection[str]) -> dict[str, Found]:
    """The objects that are named, and those below a folder that is named; a listing a folder, not a request a file."""
    found: dict[str, Found] = {}
    parents = sorted({"" if "/" not in key else f"{key.rpartition('/')[0]}/" for key in keys})
    for files, folders in bucket.at_once(bucket.inside, parents):
        found |= {key: each for key, each in files.items() if key in keys}
        for folder in folders:
            if folder.rstrip("/") in keys:
                found |= bucket.below(folder)
    return found


def _bring(bucket: Bucket, folder: Path, found: dict[str, Found]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        known = _known(folder)
        todo = [key for key, each in found.items() if known.get(key) != [each.etag, *_stamp(folder / key)]]
        wanted = sum(found[key].bytes for key in todo)
        free = shutil.disk_usage(folder).free
        if wanted > free:
            raise InputError(
                f"{folder}: {wanted / 1e9:.3g} GB of input files are to be copied here, {free / 1e9:.3g} GB are free; "
                "make room, or point XDG_CACHE_HOME at a larger disk"
            )
        if todo:
            log.info("copying %d input files (%.3g GB) from %s", len(todo), wanted / 1e9, bucket.url)

        def fetch(key: str) -> None:
            etag = bucket.fetch(key, _place(folder, key), _time_ns)
            known[key] = [etag, *_stamp(folder / key)]

        try:
            bucket.at_once(fetch, todo)
        finally:
            write_bytes_atomic(folder / _INDEX, json.dumps(known, sort_keys=True).encode())


def _known(folder: Path) -> dict[str, list[Any]]:
    try:
        known: dict[str, list[Any]] = json.loads((folder / _INDEX).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}  # only a memory: without it everything is copied again
    return known


def _stamp(path: Path) -> list[int]:
    """Without the inode: a cache folder that was moved or restored keeps its copies."""
    return file_stamp(path)[:2]
