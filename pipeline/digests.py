"""Content digests of big files, remembered by size, time and inode so that a plan need not read them again.

The memory only permits skipping: losing it costs a rehash and changes no answer (`plan --rehash` ignores it).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from storage.durable import sha256_bytes, sha256_file, write_bytes_atomic
from storage.errors import InputError
from storage.inputs import bring, is_copy, version

Stamp = tuple[int, int, int]


def digest_of(value: Any) -> str:
    """sha256 of a JSON value, written the one canonical way."""
    return sha256_bytes(json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False).encode())


def stamp(path: Path) -> Stamp:
    """(size in bytes, mtime in ns, inode) of a file. Of an object's copy, which is another file on each machine and may
    be missing on this one: the version that the store has, and no inode."""
    if is_copy(path):
        return (*version(path), 0)
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


class DigestMemory:
    """sha256 by path, valid while the file's stamp stays what it was."""

    def __init__(self, path: Path, *, rehash: bool = False) -> None:
        self._path = path
        self._rehash = rehash
        self._entries: dict[str, tuple[Stamp, str]] = {}
        self._changed = False
        if path.is_file() and not rehash:
            self._entries = _read_entries(path)

    def known(self, path: Path) -> str | None:
        """The digest, if it is known for the file as it is now."""
        entry = self._entries.get(str(path))
        return entry[1] if entry is not None and entry[0] == stamp(path) else None

    def sha256(self, path: Path) -> str:
        """The digest, computed where it is not known.

        Raises:
            InputError: the file is missing or cannot be read.
        """
        try:
            found = self.known(path)
            if found is None:
                bring(path)
                before = stamp(path)
                found = sha256_file(path)
                self.remember(path, before, found)
            return found
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}. Correct the path, or bring the file.") from None

    def remember(self, path: Path, when: Stamp, digest: str) -> None:
        self._entries[str(path)] = (when, digest)
        self._changed = True

    def save(self) -> None:
        """Write what was learnt; a plan never calls this."""
        if self._changed:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(self._path, json.dumps(self._entries, sort_keys=True).encode())
            self._changed = False


def _read_entries(path: Path) -> dict[str, tuple[Stamp, str]]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {name: ((int(a), int(b), int(c)), str(digest)) for name, ((a, b, c), digest) in raw.items()}
    except (ValueError, TypeError, AttributeError):
        return {}  # only a memory: a torn one costs a rehash
