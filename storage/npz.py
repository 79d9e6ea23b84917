"""Read numpy's `.npz` without trusting it: object arrays go through the restricted unpickler."""

from __future__ import annotations

import io
import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from storage.errors import InputError
from storage.unpickling import NUMPY_GLOBALS, load_restricted

_MALFORMED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    ValueError,
    EOFError,
    MemoryError,
    OverflowError,
    SyntaxError,  # this and the next two: of a header that is no dictionary of Python's
    TypeError,
    tokenize.TokenError,
    RuntimeError,  # an encrypted entry; also NotImplementedError and RecursionError
)
"""What zipfile and numpy raise over damaged bytes."""
_MAX_ENTRY_BYTES = 4 << 30
"""Unpacked size of one array. HaMeR's largest evaluation set has 20,137 rows of a few hundred bytes."""


def read_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Those of `names` that the file holds. Raises InputError for what is no npz or holds pickles that run things."""
    try:
        with zipfile.ZipFile(path) as archive:
            present = {info.filename: info for info in archive.infolist()}
            return {
                name: _array(archive, present[f"{name}.npy"], f"{path}, array {name}")
                for name in names
                if f"{name}.npy" in present
            }
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except _MALFORMED as error:
        raise InputError(f"{path}: not a readable npz ({error}). Wanted: a file as numpy.savez writes it.") from error


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, what: str) -> np.ndarray[Any, Any]:
    if info.file_size > _MAX_ENTRY_BYTES:
        raise InputError(f"{what}: {info.file_size} bytes unpacked; wanted at most {_MAX_ENTRY_BYTES}.")
    content = io.BytesIO(archive.read(info))
    version = np.lib.format.read_magic(content)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(content)
    if not dtype.hasobject:
        if int(np.prod(shape, dtype=np.float64)) * dtype.itemsize > info.file_size:
            raise InputError(f"{what}: announces shape {shape} in {info.file_size} bytes.")
        content.seek(0)
        return cast("np.ndarray[Any, Any]", np.lib.format.read_array(content, allow_pickle=False))
    return _object_array(content, shape, what)


def _object_array(content: BinaryIO, shape: tuple[int, ...], what: str) -> np.ndarray[Any, Any]:
    loaded = load_restricted(content.read(), allowed=NUMPY_GLOBALS, what=what, encoding="latin1")
    if not isinstance(loaded, np.ndarray) or loaded.shape != shape:
        raise InputError(f"{what}: an array of other shape than its header says ({shape}).")
    return np.array(loaded, subok=False)
