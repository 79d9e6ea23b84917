"""Files and folders that are either whole under their final name, or not there at all.

Everything that stays is first written under a partial name (`.<name>.<random>.partial`), forced to the disk, renamed,
and the rename itself forced to the disk. A process killed at any moment leaves whole files and partial ones, never a
half-written file with a final name; `sweep_partial` removes what it left.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from storage.errors import DamageError, InputError

READ_SIZE_BYTES = 1 << 20
"""Files are hashed in pieces of this size, so that hashing takes no memory to speak of."""

_SEAL = re.compile(rb',\n  "seal": "([0-9a-f]{64})"\n\}\n\Z')
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.partial\Z")


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """The one way we write a JSON document: sorted keys, two spaces, UTF-8, a final newline, no NaN."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256_bytes(data: bytes) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_SIZE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def partial_path(final: Path) -> Path:
    """A name beside `final` that no other attempt at writing it uses."""
    return final.with_name(f".{final.name}.{secrets.token_hex(8)}.partial")


def is_partial(path: Path) -> bool:
    """Whether the name is one of `partial_path`'s: being written, or left by a writer that died."""
    return _PARTIAL.match(path.name) is not None


def sweep_partial(folder: Path) -> int:
    """Remove what writers that died left in `folder`; returns how many. Only while nothing else writes there."""
    leftovers = [path for path in folder.iterdir() if is_partial(path)]
    for path in leftovers:
        remove_tree(path)
    return len(leftovers)


def remove_tree(path: Path) -> None:
    """Remove a file or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `path`, replacing what stood there, so that a reader sees the old bytes or the new ones."""
    partial = partial_path(path)
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:  # a full disk, above all: what was written takes room that others need
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def publish_directory(partial: Path, final: Path) -> bool:
    """Make a finished folder durable and give it its final name.

    Returns False when another attempt published `final` first; ours is then removed: what is published is never
    replaced.
    """
    for folder, _, files in os.walk(partial):
        for name in files:
            _sync(Path(folder) / name)
        sync_directory(Path(folder))
    try:
        partial.rename(final)  # refuses a folder that is there and not empty
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        remove_tree(partial)
        return False
    sync_directory(final.parent)
    return True


def sync_directory(folder: Path) -> None:
    """Force the names in `folder` to the disk."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sealed_json(payload: Mapping[str, Any]) -> bytes:
    """A JSON document that ends with `seal`: the sha256 of the same document written without it."""
    assert payload
    assert "seal" not in payload
    body = canonical_json(payload)
    return body.removesuffix(b"\n}\n") + f',\n  "seal": "{sha256_bytes(body)}"\n}}\n'.encode()


def file_stamp(file: Path | int) -> list[int]:
    """[size in bytes, mtime in ns, inode] of a file by its path or descriptor; empty where it is not there."""
    try:
        status = os.stat(file)  # noqa: PTH116 (a Path takes no descriptor)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Read a sealed document and check every byte of it; DamageError when one is not as written."""
    return parse_sealed_json(path.read_bytes(), str(path))


@contextmanager
def of_this_format(name: str) -> Iterator[None]:
    """Whatever fails here over a document whose bytes are sealed and whose content is not ours, as a DamageError."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, AssertionError) as error:
        raise DamageError(
            f"{name} is damaged: its content is not of this format ({type(error).__name__}: {str(error)[:120]}); "
            "run `handstill verify`, then `handstill run`"
        ) from error


def parse_sealed_json(data: bytes, name: str) -> dict[str, Any]:
    """The document in `data`, every byte checked; DamageError, naming `name`, when one is not as written."""
    found = _SEAL.search(data)
    if found is None:
        raise DamageError(f"{name} is damaged: it does not end with its seal; run `handstill verify`")
    body = data[: found.start()] + b"\n}\n"
    if sha256_bytes(body) != found.group(1).decode():
        raise DamageError(f"{name} is damaged: its bytes are not those that were sealed; run `handstill verify`")
    try:
        document: dict[str, Any] = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{name} is damaged: it is sealed and no JSON ({error}); run `handstill verify`") from error
    return document
