"""Read a tar from front to back once: its members, where their bytes stand, and the digest of the whole file.

Nothing is ever extracted. Python's tarfile takes a damaged header in the middle of a file for its end, and the rest is
silently gone; here a tar is read to its end marker or refused.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from storage.errors import InputError

_BLOCK = 512
_MAX_MEMBER_BYTES = 1 << 30
"""A member is held in memory while it is looked at; a picture or a label is never as large as this."""
_MAX_NAME_BYTES = 1 << 16

_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


@dataclass(frozen=True)
class TarMember:
    """A file in a tar and where its bytes stand."""

    name: str
    offset: int
    length: int

    @property
    def key(self) -> str:
        """Its name up to the first dot of the last part: members that share it belong to one sample."""
        folder, slash, last = self.name.rpartition("/")
        return folder + slash + last.partition(".")[0]

    @property
    def extension(self) -> str:
        """What follows that dot, lower case."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


class TarScan:
    """Iterates over (member, bytes); afterwards `sha256` is the digest of the tar itself.

    Raises InputError, naming the tar and the byte, for a tar that is cut off or damaged, or that holds links,
    devices or names that lead out of it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._position = 0
        self._header_at = 0

    @property
    def sha256(self) -> str:
        """Digest of the bytes read so far."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[tuple[TarMember, bytes]]:
        try:
            self._file = self._path.open("rb")
        except OSError as error:
            raise InputError(f"{self._path}: cannot be read ({error.strerror}).") from error
        with self._file:
            long_name: str | None = None
            attributes: dict[str, str] = {}
            while (header := self._header()) is not None:
                content = self._content(header, attributes)
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
                elif header.type in _PAX:
                    attributes = self._pax_attributes(content)
                elif header.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                    name = attributes.get("path", long_name if long_name is not None else header.name)
                    long_name, attributes = None, {}
                    self._check(header, name)
                    if header.type in _FILES and not name.endswith("/"):
                        yield TarMember(name, self._header_at + _BLOCK, len(content)), content

    def _refuse(self, found: str, do: str) -> InputError:
        return InputError(f"{self._path}: {found} at byte {self._header_at}. Wanted: a whole tar of plain files. {do}")

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        self._position += len(data)
        if len(data) < size:
            raise InputError(
                f"{self._path}: the tar is cut off: it ends at byte {self._position}, inside the member whose header "
                f"is at byte {self._header_at}. Fetch it again."
            )
        return data

    def _header(self) -> tarfile.TarInfo | None:
        """The next header, or None once the end marker and all behind it have been read."""
        self._header_at = self._position
        block = self._read(_BLOCK)
        if not block.strip(b"\0"):
            self._read_empty_rest()
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise self._refuse(
                f"no member's header ({error})", "Fetch it again; a compressed tar must be unpacked."
            ) from error

    def _read_empty_rest(self) -> None:
        while rest := self._file.read(1 << 20):
            self._digest.update(rest)
            if rest.strip(b"\0"):
                raise self._refuse("more data behind the end marker", "Two joined tars? Give them as two files.")

    def _content(self, header: tarfile.TarInfo, attributes: dict[str, str]) -> bytes:
        size = int(attributes["size"]) if attributes.get("size", "").isdigit() else header.size
        limit = _MAX_MEMBER_BYTES if header.type in _FILES else _MAX_NAME_BYTES
        if not 0 <= size <= limit:
            raise self._refuse(f"a member {header.name!r} of {size} bytes", "Is this a tar of pictures and labels?")
        content = self._read(size)
        self._read(-size % _BLOCK)
        return content

    def _pax_attributes(self, content: bytes) -> dict[str, str]:
        """Records "<length> <key>=<value>\\n" of an extended header."""
        attributes = {}
        while content.strip(b"\0"):
            length, _, _ = content.partition(b" ")
            if not length.isdigit() or not len(length) < int(length[:9]) <= len(content):
                raise self._refuse("a damaged extended header", "Fetch it again.")
            record = content[len(length) + 1 : int(length) - 1].decode("utf-8", "surrogateescape")
            key, _, value = record.partition("=")
            attributes[key] = value
            content = content[int(length) :]
        if any(key.startswith("GNU.sparse.") for key in attributes):
            raise self._refuse("a sparse file", "Pack the tar without sparse files.")
        return attributes

    def _check(self, header: tarfile.TarInfo, name: str) -> None:
        if header.type not in (*_FILES, tarfile.DIRTYPE):
            kind = _KINDS.get(header.type, f"an entry of type {header.type!r}")
            raise self._refuse(f"{kind} {name!r}", "Pack the files themselves.")
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise self._refuse(f"a member {name!r} that leads out of the tar", "Do not trust this file.")
        if not name.isprintable():  # ids are written one a line; surrogates from broken encodings end here too
            raise self._refuse(f"a member {name!r} with unprintable characters in its name", "Rename it.")
