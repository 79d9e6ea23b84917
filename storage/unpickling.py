"""Read pickles written by other programs, running nothing that they name.

A pickle is a program: it names functions to call. Here each name is looked up in a table, and the table holds only
stand-ins of our own: number arrays are rebuilt by code that checks sizes first, foreign objects become inert records
of what was stored. Whatever else is named ends in `UnsafePickleError`, before anything is called.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np

from storage.errors import InputError
from storage.pickle_scan import MalformedPickleError, check_pickle

_MAX_NUMBER_BYTES = 16  # long double, the widest number numpy stores
_MAX_STRING_BYTES = 4 * 65536


class UnsafePickleError(InputError):
    """The pickle names something that is not in the reader's table; nothing was run."""


class Rebuilder:
    """A function in a pickle's table. Being an object without a `__dict__`, it cannot be altered by a BUILD opcode."""

    __slots__ = ("_function", "_name")

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name = name
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise UnsafePickleError(f"it tries to alter {self._name}")

    def __repr__(self) -> str:
        return f"<{self._name}>"


class Inert:
    """What a pickle stored for an object of a class that is not installed here: data, no behaviour.

    `arguments`: what it was constructed with; `state`: what was set on it (a dict for most Python objects, else None);
    `entries`, `elements`: its items if it was a kind of dict or list.
    """

    origin = "object"
    """Module and name in the pickle."""

    arguments: tuple[Any, ...]
    state: Any
    entries: dict[Any, Any]
    elements: list[Any]

    def __new__(cls, *arguments: Any) -> Inert:
        made = object.__new__(cls)
        made.arguments, made.state, made.entries, made.elements = arguments, None, {}, []
        return made

    def __init__(self, *arguments: Any) -> None:
        """All is kept by `__new__`: pickles construct objects with and without this call."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, element: Any) -> None:
        self.elements.append(element)

    def extend(self, elements: Iterable[Any]) -> None:
        self.elements.extend(elements)

    def __repr__(self) -> str:
        return f"<inert {self.origin}>"


def inert_class(module: str, name: str) -> type[Inert]:
    """A class that stands in for `module.name` in a pickle: it stores what it is given and runs nothing."""
    return type(name, (Inert,), {"origin": f"{module}.{name}", "__module__": __name__})


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles with a table of allowed names, and nothing but the table.

    `allowed` maps (module, name), as the pickle spells them, to the stand-in. Use `Rebuilder` for functions and
    `inert_class` for classes: plain functions and Python classes could be altered by the pickle. `what` names the file
    in errors. The file is read to its end and checked by `storage.pickle_scan` before the first object is built.
    Subclasses may override `persistent_load`; here every persistent id is refused.
    """

    def __init__(
        self, file: BinaryIO, *, allowed: Mapping[tuple[str, str], object], what: str, encoding: str = "ASCII"
    ) -> None:
        data = file.read()
        check_pickle(data, what)
        super().__init__(io.BytesIO(data), encoding=encoding)
        self._allowed = allowed
        self._what = what

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise UnsafePickleError(
                f"{self._what}: the pickle asks for {module}.{name}, which is not among the {len(self._allowed)} names "
                "that such a file may use. Nothing was run. If the file is yours, save it as plain numpy arrays; if it "
                "is not, do not trust it."
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError(f"{self._what}: the pickle refers to outside data ({str(pid)[:80]}); nothing was run.")

    def load(self) -> Any:
        """The pickle's object. Raises UnsafePickleError or MalformedPickleError, both InputError, and nothing else."""
        try:
            return super().load()
        except UnsafePickleError as error:
            if str(error).startswith(self._what):
                raise
            raise UnsafePickleError(f"{self._what}: refused: {error}. Nothing was run.") from error
        except Exception as error:  # a hostile pickle can end in any exception: each is the file's fault
            raise MalformedPickleError(
                f"{self._what}: not a readable pickle: {type(error).__name__}: {str(error)[:200]}. "
                "Wanted: a whole pickle as its program wrote it. Fetch or write the file again."
            ) from error


class _DtypeRecord:
    """A pickled numpy dtype: numbers, strings, bytes or objects; never a structure."""

    __slots__ = ("dtype",)

    def __init__(self, spelling: object, _align: object = False, _copy: object = True) -> None:
        if not isinstance(spelling, str | bytes):
            raise UnsafePickleError("an array of a type that is not spelt out")
        text = spelling.decode("ascii") if isinstance(spelling, bytes) else spelling
        dtype = np.dtype(text.lstrip("<>=|"))
        limit = _MAX_STRING_BYTES if dtype.kind in "SU" else _MAX_NUMBER_BYTES
        if dtype.kind not in "biufcSUO" or not 0 < dtype.itemsize <= limit:
            raise UnsafePickleError(f"an array of type {text[:80]!r}")
        self.dtype = dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # (version, byte order, subarray, names, fields, item size, alignment, flags, ...). The item size is in the
        # spelling already, and the flags are not believed: they could declare numbers to be pointers.
        byte_order, structure = state[1], state[2:5]
        if any(structure) or byte_order not in ("<", ">", "|", "=", b"<", b">", b"|", b"="):
            raise UnsafePickleError("an array with a structured type")
        self.dtype = self.dtype.newbyteorder(">" if byte_order in (">", b">") else "<")


class _CheckedArray(np.ndarray[Any, Any]):
    """An array whose contents a pickle sets after it was made: only in amounts that are really there."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, record, fortran, content = state[-4:]
        dtype = _known_dtype(record)
        count = _item_count(shape)
        if dtype.hasobject:
            fits = isinstance(content, list) and len(content) == count
        else:
            content = content.encode("latin1") if isinstance(content, str) else content
            fits = isinstance(content, bytes) and len(content) == count * dtype.itemsize
        if not fits:
            raise UnsafePickleError(f"an array of shape {str(shape)[:80]} whose content is of another size")
        checked: Any = (1, shape, dtype, bool(fortran), content)
        super().__setstate__(checked)


def _known_dtype(record: object) -> np.dtype[Any]:
    if not isinstance(record, _DtypeRecord):
        raise UnsafePickleError("an array without a type")
    return record.dtype


def _item_count(shape: object) -> int:
    if not isinstance(shape, tuple) or len(shape) > 32:
        raise UnsafePickleError("an array without a shape")
    count = 1
    for length in shape:
        if type(length) is not int or length < 0:
            raise UnsafePickleError(f"an array of shape {str(shape)[:80]}")
        count *= length
    return count


def _empty_array(_kind: object, shape: object, _dtype: object) -> _CheckedArray:
    if shape != (0,):  # what numpy writes; any other would be allocated before its content is seen
        raise UnsafePickleError(f"an array made with shape {str(shape)[:80]}")
    return np.zeros(0, np.uint8).view(_CheckedArray)


def _array_of_buffer(content: object, record: object, shape: object, order: object = "C") -> np.ndarray[Any, Any]:
    """Protocol 5's arrays."""
    dtype = _known_dtype(record)
    if not isinstance(content, bytes | bytearray) or dtype.hasobject or order not in ("C", "F"):
        raise UnsafePickleError("an array whose content is not bytes")
    if len(content) != _item_count(shape) * dtype.itemsize:
        raise UnsafePickleError(f"an array of shape {str(shape)[:80]} whose content is of another size")
    assert isinstance(shape, tuple)
    return np.frombuffer(bytes(content), dtype).reshape(shape, order="C" if order == "C" else "F")


def _scalar(record: object, content: object = b"") -> Any:
    dtype = _known_dtype(record)
    content = content.encode("latin1") if isinstance(content, str) else content
    if dtype.hasobject or not isinstance(content, bytes) or len(content) != dtype.itemsize:
        raise UnsafePickleError("a number whose content is of another size")
    return np.frombuffer(content, dtype)[0]


def _latin1_bytes(text: object, codec: object) -> bytes:
    """How Python 3 writes bytes in protocols 0 to 2."""
    if not isinstance(text, str) or codec != "latin1":
        raise UnsafePickleError(f"encoding with {str(codec)[:80]!r}")
    return text.encode("latin1")


def _bytes(*arguments: object) -> bytes:
    """How Python 3 writes b"" in protocols 0 to 2."""
    if arguments:
        raise UnsafePickleError("bytes of a given size")
    return b""


def _reconstructed(kind: object, _base: object, _state: object) -> Inert:
    """Protocols 0 and 1 construct every object through this call."""
    if not isinstance(kind, type) or not issubclass(kind, Inert):
        raise UnsafePickleError(f"an object of {kind!r}")
    return kind()


def _collection(kind: type[Any], *contents: object) -> Any:
    if len(contents) > 1 or not all(isinstance(content, list | tuple | dict) for content in contents):
        raise UnsafePickleError(f"a {kind.__name__} of something else")
    return kind(*contents)


_ARRAY_FUNCTIONS = {
    "multiarray._reconstruct": Rebuilder("numpy's array constructor", _empty_array),
    "multiarray.scalar": Rebuilder("numpy's scalar constructor", _scalar),
    "numeric._frombuffer": Rebuilder("numpy's buffer constructor", _array_of_buffer),
}

NUMPY_GLOBALS: Mapping[tuple[str, str], object] = MappingProxyType(
    {
        (f"{package}.{path.split('.')[0]}", path.split(".")[1]): function
        for package in ("numpy.core", "numpy._core")  # numpy 1 and numpy 2
        for path, function in _ARRAY_FUNCTIONS.items()
    }
    | {
        ("numpy", "ndarray"): Rebuilder("numpy.ndarray", _empty_array),
        ("numpy", "dtype"): Rebuilder("numpy.dtype", _DtypeRecord),
        ("_codecs", "encode"): Rebuilder("latin1 encoding", _latin1_bytes),
        ("__builtin__", "bytes"): Rebuilder("bytes", _bytes),
        ("builtins", "bytes"): Rebuilder("bytes", _bytes),
    }
)
"""What pickles of numpy arrays and numbers name, with numpy 1's and numpy 2's paths. Arrays arrive as a private
subclass of ndarray: take `numpy.array(..., subok=False)` or `plain`."""

PLAIN_GLOBALS: Mapping[tuple[str, str], object] = MappingProxyType(
    {("collections", "OrderedDict"): Rebuilder("an OrderedDict", lambda *items: _collection(OrderedDict, *items))}
    | {
        (module, kind.__name__): Rebuilder(f"a {kind.__name__}", lambda *items, kind=kind: _collection(kind, *items))
        for module in ("builtins", "__builtin__")
        for kind in (dict, list, set, frozenset)
    }
    | {
        (module, "_reconstructor"): Rebuilder("the object constructor", _reconstructed)
        for module in ("copyreg", "copy_reg")
    }
    | {(module, "object"): Rebuilder("object", lambda: Inert()) for module in ("builtins", "__builtin__")}
)
"""Containers, and how protocols 0 and 1 construct objects (only `inert_class` ones here)."""


def plain(value: Any) -> Any:
    """The value with its arrays as ordinary numpy arrays, inside dictionaries, lists and tuples too."""
    if isinstance(value, np.ndarray):
        return np.array(value, subok=False)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return value


def load_restricted(
    data: bytes, *, allowed: Mapping[tuple[str, str], object], what: str, encoding: str = "ASCII"
) -> Any:
    """`RestrictedUnpickler` over bytes."""
    return RestrictedUnpickler(io.BytesIO(data), allowed=allowed, what=what, encoding=encoding).load()


def load_annotations(data: bytes, what: str) -> list[dict[str, Any]]:
    """A HaMeR `.data.pyd` member: one dictionary a hand, its values still to be checked.

    Only numpy arrays and numbers, strings, and plain containers may be in it. Top-level arrays are ordinary ones.
    Raises UnsafePickleError, MalformedPickleError, or InputError when it is no list of dictionaries.
    """
    hands = load_restricted(data, allowed=NUMPY_GLOBALS, what=what, encoding="latin1")
    if not isinstance(hands, list) or not all(isinstance(hand, dict) for hand in hands):
        raise InputError(f"{what}: found {_kind_of(hands)}, wanted a list of dictionaries, one a hand.")
    return [{str(key): _plain_array(value) for key, value in hand.items()} for hand in hands]


def _plain_array(value: Any) -> Any:
    return np.array(value, subok=False) if isinstance(value, np.ndarray) else value


def _kind_of(value: object) -> str:
    if isinstance(value, list):
        return "a list that also holds " + next(type(item).__name__ for item in value if not isinstance(item, dict))
    return type(value).__name__
