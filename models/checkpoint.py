"""Read the tensors of a PyTorch checkpoint, running nothing that it names.

A checkpoint is a zip: a pickle that describes the tensors, and one stored record for each tensor's bytes. Released ones
also pickle their configuration as yacs or OmegaConf objects, which `torch.load(weights_only=True)` refuses. Here the
pickle passes the restricted unpickler, those objects become inert records, and the tensors are mapped, not read: only
the ones that are used cost memory.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import Tensor

from storage.errors import InputError
from storage.unpickling import (
    NUMPY_GLOBALS,
    PLAIN_GLOBALS,
    Rebuilder,
    RestrictedUnpickler,
    UnsafePickleError,
    inert_class,
)

_ZIP_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_MAX_DESCRIPTION_BYTES = 256 * 2**20  # data.pkl of HaMeR's checkpoint with its optimisers is under 1 MB
_DEEPEST_STATE = 32  # an optimiser's is five deep

_STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}

_FOREIGN = {
    "yacs.config": ("CfgNode",),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.base": ("ContainerMetadata", "Metadata", "SCMode"),
    "omegaconf.nodes": (
        *("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode"),
        *("EnumNode", "BytesNode", "PathNode", "InterpolationResultNode"),
    ),
    "typing": ("Any",),
    "collections": ("defaultdict", "Counter"),
    "argparse": ("Namespace",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "WindowsPath"),
    "lightning_fabric.utilities.data": ("AttributeDict",),
    "lightning.fabric.utilities.data": ("AttributeDict",),
    "pytorch_lightning.utilities.parsing": ("AttributeDict",),
    "torch": ("Size", "device", *(str(dtype).removeprefix("torch.") for dtype in _STORAGES.values())),
    "builtins": ("int", "float", "str", "bool", "complex", "tuple"),
    "__builtin__": ("int", "long", "float", "str", "unicode", "bool", "complex", "tuple"),
}
"""Classes that checkpoints name beside their tensors. Their objects are stored as data and never behave."""


@dataclass(frozen=True)
class _Storage:
    """One record of the zip, as a pickle refers to it."""

    key: str
    dtype: torch.dtype
    length: int


@dataclass(frozen=True)
class _TensorRecord:
    """Where a tensor lies in a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StorageType:
    """`torch.FloatStorage` and its kin in the pickle's table."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __setstate__(self, state: object) -> None:
        raise UnsafePickleError("it tries to alter a storage type")


def _record_tensor(storage: object, offset: object, shape: object, strides: object, *_: object) -> _TensorRecord:
    """In the place of `torch._utils._rebuild_tensor_v2`."""
    sizes = (shape, strides)
    if not isinstance(storage, _Storage) or not all(isinstance(part, tuple) and len(part) <= 16 for part in sizes):
        raise UnsafePickleError("a tensor without a storage or a shape")
    assert isinstance(shape, tuple)
    assert isinstance(strides, tuple)
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        raise UnsafePickleError(f"a tensor of shape {str(shape)[:80]} and strides {str(strides)[:80]}")
    assert isinstance(offset, int)
    elements, last = 1, offset
    for length, stride in zip(shape, strides, strict=True):
        elements *= length
        last += (length - 1) * stride
    # more elements than the storage has: a stride of 0, which would be petabytes once copied
    if elements and (elements > storage.length or last >= storage.length):
        raise UnsafePickleError(f"a tensor of shape {shape} in a storage of {storage.length} elements")
    return _TensorRecord(storage, offset, shape, strides)


def _same_tensor(tensor: object, *_: object) -> object:
    """In the place of `torch._utils._rebuild_parameter`: a parameter is its tensor."""
    return tensor


_GLOBALS: Mapping[tuple[str, str], object] = (
    {(module, name): inert_class(module, name) for module, names in _FOREIGN.items() for name in names}
    | dict(NUMPY_GLOBALS)
    | dict(PLAIN_GLOBALS)
    | {("torch", f"{name}Storage"): _StorageType(dtype) for name, dtype in _STORAGES.items()}
    | {
        ("torch._utils", "_rebuild_tensor_v2"): Rebuilder("torch's tensor constructor", _record_tensor),
        ("torch._utils", "_rebuild_parameter"): Rebuilder("torch's parameter constructor", _same_tensor),
    }
)


class _DescriptionUnpickler(RestrictedUnpickler):
    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType() as kind, str() as key, str(), int() as length) if length >= 0:
                return _Storage(key, kind.dtype, length)
        raise UnsafePickleError(f"a storage described as {str(pid)[:80]}")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dictionary of a `.ckpt`, `.pth`, `.pt` (or `.safetensors`) file, as memory-mapped CPU tensors.

    Writing to a tensor does not reach the file. Takes the entry `state_dict` or `model` of the file's dictionary, or
    the dictionary itself. Raises InputError for a file that is missing, cut short, in PyTorch's format of before 1.6,
    or that names anything but tensors and plain configuration.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}. Wanted a checkpoint.")
    if path.suffix == ".safetensors":
        try:
            return load_safetensors(path)
        except (SafetensorError, RuntimeError, TypeError, ValueError, OverflowError) as error:
            # torch's own, of empty tensors whose other sides overflow: their text is a stack of frames
            why = (str(error).splitlines() or [""])[0][:200]
            raise InputError(f"{path}: not a readable safetensors file: {why}") from error
    archive = _Archive(path)
    found = archive.description()
    state = next((found[key] for key in ("state_dict", "model") if isinstance(found.get(key), dict)), found)
    strays = [str(name) for name, value in state.items() if not isinstance(value, _TensorRecord)]
    if strays or not state:
        raise InputError(
            f"{path}: found no state dictionary: {strays[0] if strays else 'it'} is "
            f"{'no tensor' if strays else 'empty'}. Wanted a Lightning checkpoint, with `state_dict` in it."
        )
    return {str(name): archive.tensor(record) for name, record in state.items()}


def read_training_state(path: Path) -> dict[Any, Any]:
    """What torch.save wrote of a training: dictionaries, lists and tuples of tensors, numbers and text.

    Its tensors are copies of their own. Raises InputError as `read_checkpoint` does.
    """
    archive = _Archive(path)
    found: dict[Any, Any] = _with_tensors(archive.description(), archive, 0)
    return found


def _with_tensors(value: Any, archive: _Archive, depth: int) -> Any:
    if depth > _DEEPEST_STATE:
        raise InputError(f"{archive.path}: values inside of values, more than {_DEEPEST_STATE} deep.")
    if isinstance(value, _TensorRecord):
        return archive.tensor(value).clone()
    if isinstance(value, dict):
        return {key: _with_tensors(item, archive, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(item, archive, depth + 1) for item in value)
    if value is None or isinstance(value, int | float | str):
        return value
    raise InputError(f"{archive.path}: holds {type(value).__name__}, wanted tensors, numbers and text.")


class _Archive:
    """The zip around a checkpoint, mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self.records = {record.filename.split("/", 1)[-1]: record for record in archive.infolist()}
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise InputError(
                f"{path}: not a whole checkpoint file: {error}. It may have been cut short on its way (fetch it again) "
                "or be of PyTorch before 1.6 (load and save it there once more)."
            ) from error
        with path.open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def description(self) -> dict[Any, Any]:
        """The unpickled dictionary, its tensors as records."""
        if "data.pkl" not in self.records or "constants.pkl" in self.records:
            raise InputError(f"{self.path}: a zip, but no checkpoint that torch.save wrote (a TorchScript file?).")
        if self.records.get("byteorder") is not None and bytes(self._stored("byteorder")) != b"little":
            raise InputError(f"{self.path}: its numbers are big-endian. Load and save it on a little-endian machine.")
        if self.records["data.pkl"].file_size > _MAX_DESCRIPTION_BYTES:
            raise InputError(f"{self.path}: a description of {self.records['data.pkl'].file_size} bytes is no model's.")
        what = f"{self.path} (data.pkl)"
        file = io.BytesIO(self._stored("data.pkl"))
        found = _DescriptionUnpickler(file, allowed=_GLOBALS, what=what, encoding="utf-8").load()
        if not isinstance(found, dict):
            raise InputError(f"{self.path}: found {type(found).__name__}, wanted a dictionary with `state_dict`.")
        return found

    def tensor(self, record: _TensorRecord) -> Tensor:
        storage = record.storage
        content = self._stored(f"data/{storage.key}")
        if len(content) < storage.length * storage.dtype.itemsize:
            raise InputError(
                f"{self.path}: data/{storage.key} holds {len(content)} bytes, "
                f"wanted {storage.length} numbers of {storage.dtype}."
            )
        if not storage.length:
            return torch.empty(record.shape, dtype=storage.dtype)
        flat = torch.frombuffer(content, dtype=storage.dtype, count=storage.length)
        return flat.as_strided(record.shape, record.strides, record.offset)

    def _stored(self, name: str) -> memoryview:
        """A record's bytes, in place."""
        info = self.records.get(name)
        if info is None:
            raise InputError(f"{self.path}: the record {name} is missing from the file.")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise InputError(f"{self.path}: the record {name} is compressed; torch.save stores plainly.")
        start = info.header_offset + _ZIP_LOCAL_HEADER.size
        header = self.bytes[info.header_offset : start]
        if len(header) < _ZIP_LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise InputError(f"{self.path}: the record {name} is not where the file's index says.")
        *_, name_length, extra_length = _ZIP_LOCAL_HEADER.unpack(header)
        start += name_length + extra_length
        if start + info.file_size > len(self.bytes):
            raise InputError(f"{self.path}: the record {name} ends beyond the file.")
        return memoryview(self.bytes)[start : start + info.file_size]
