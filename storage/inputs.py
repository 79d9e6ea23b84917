"""Input files on an object store (tars, pictures, checkpoints): copied whole to a machine when it first opens them.

A copy's path follows from its URL, so that a process on another machine, which is given the path, knows where to fetch
it: <user's cache folder>/inputs/<bucket>/<key>. Its time follows from the object's ETag, so that size and time tell on
every machine whether a copy is what the store has, and a plan can be made from a listing, with nothing copied.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from storage.bucket import AT_ONCE, Bucket, Found
from storage.disk_cache import default_folder
from storage.durable import is_partial, sha256_bytes
from storage.errors import InputError
from storage.objects import parsed_url

Version = tuple[int, int]
"""(size in bytes, time in ns) of a copy: its object's size, and a time that stands for its ETag."""

_on_store: dict[Path, Version] = {}
"""What this process has seen on stores: which version of a copy is the right one."""
_listed: set[Path] = set()
"""Folders of copies whose every object is in `_on_store`."""


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
    """Whether a path is where an object's copy lies, or would."""
    return path.is_relative_to(copies())


def version(path: Path) -> Version:
    """Which version of an object a copy's path stands for, whether or not the copy is here.

    It is the store's as this process last saw it, else that of the copy. Raises FileNotFoundError: there is neither.
    """
    seen = _on_store.get(path)
    if seen is None and any(folder in _listed for folder in path.parents):
        raise FileNotFoundError(f"{path}: no longer on the store")
    return seen or _version_here(path)


def is_file(path: Path) -> bool:
    """Whether there is such a file: here, or on the store that it would be copied from."""
    return path in _on_store or path.is_file()


def is_folder(path: Path) -> bool:
    """The same of a folder."""
    return path in _listed or path.is_dir()


def look(urls: Iterable[str], optional: Collection[str] = ()) -> None:
    """Learn what the store has now of the files that URLs name and below the folders that they name; copies nothing.

    Copies of other versions, and of what is gone, are deleted, so that nothing on this machine takes them for right.

    Raises:
        InputError: something is not on the store (what is optional may be missing).
        WorkError: the store does not answer.
    """
    by_bucket: dict[str, set[str]] = {}
    for url in [*urls, *optional]:
        _, place, key = parsed_url(url)
        by_bucket.setdefault(place, set()).add(key)
    free_to_miss = {parsed_url(url)[1:] for url in optional}
    for name, keys in by_bucket.items():
        found, folders = _found(Bucket.whole(name), keys)
        missing = sorted(keys - found.keys() - folders)
        wanted = [f"s3://{name}/{key}" for key in missing if (name, key) not in free_to_miss]
        if wanted:
            more = f" and {len(wanted) - 3} more" if len(wanted) > 3 else ""
            raise InputError(f"not on the object store: {', '.join(wanted[:3])}{more}; bring them, or correct the path")
        _take_in(copies() / name, found, keys - found.keys(), folders)


def _found(bucket: Bucket, keys: Collection[str]) -> tuple[dict[str, Found], set[str]]:
    """The objects that are named and those below a folder that is named, and the names that are folders.

    A listing a folder, not a request a file.
    """
    found: dict[str, Found] = {}
    named = set()
    parents = sorted({"" if "/" not in key else f"{key.rpartition('/')[0]}/" for key in keys})
    for files, folders in bucket.at_once(bucket.inside, parents):
        found |= {key: each for key, each in files.items() if key in keys}
        for folder in folders:
            if folder.rstrip("/") in keys:
                named.add(folder.rstrip("/"))
                found |= bucket.below(folder)
    return found, named


def _take_in(root: Path, found: dict[str, Found], gone: Iterable[str], folders: Iterable[str]) -> None:
    known = {_place(root, key): (each.bytes, _time_ns(each.etag)) for key, each in found.items()}
    listed = [_place(root, key) for key in folders]
    here = [*known, *(_place(root, key) for key in gone), *(path for folder in listed for path in folder.rglob("*"))]
    for path in here:
        if path.is_file() and not is_partial(path) and _version_here(path) != known.get(path):
            path.unlink(missing_ok=True)
    _on_store.update(known)
    _listed.update(listed)


def _time_ns(etag: str) -> int:
    return int(sha256_bytes(etag.encode())[:15], 16)


def bring(path: Path | None, *, optional: bool = False, fresh: bool = False) -> None:
    """Have one copy here; nothing where it is here, or is no copy. Any process may call it that was given the path.

    Args:
        optional: it need not be on the store.
        fresh: ask the store whether it has another version by now.

    Raises:
        InputError: it is not on the store, or there is no room for it.
        WorkError: the store does not answer.
    """
    if path is None or not is_copy(path):
        return
    if not fresh and path.is_file() and _on_store.get(path) in (None, _version_here(path)):
        return
    name, _, key = path.relative_to(copies()).as_posix().partition("/")
    bucket = Bucket.whole(name)
    try:
        if fresh:
            now = bucket.look(key)
            _on_store[path] = (now.bytes, _time_ns(now.etag))
            if path.is_file() and _version_here(path) == _on_store[path]:
                return
        if path in _on_store:
            _check_room(path.parent, _on_store[path][0])
        bucket.fetch(key, path, _time_ns)
    except FileNotFoundError as error:
        if optional:
            return
        raise InputError(f"{error}; bring it back, or take it out of the configuration") from None
    _on_store[path] = _version_here(path)  # what came, were it written anew meanwhile


def bring_all(paths: Iterable[Path], *, optional: bool = False) -> None:
    """The same for many, side by side. Raises what `bring` raises."""
    wanted = [path for path in paths if is_copy(path)]
    if not wanted:
        return
    bytes_wanted = sum(_on_store[path][0] for path in wanted if path in _on_store and not path.is_file())
    _check_room(copies(), bytes_wanted)
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="inputs") as pool:
        list(pool.map(partial(bring, optional=optional), wanted))


def _check_room(folder: Path, wanted: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise InputError(
            f"{folder}: {wanted / 1e9:.3g} GB of input files are to be copied here, {free / 1e9:.3g} GB are free; "
            "make room, or point XDG_CACHE_HOME at a larger disk"
        )


def _version_here(path: Path) -> Version:
    """Without the inode: a cache folder that was moved or restored keeps its copies."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
