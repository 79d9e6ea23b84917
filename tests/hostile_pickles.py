"""Pickles made to run code, to corrupt memory or to exhaust it, for every reader of foreign pickles to refuse.

Each of those that run something would create the marker file: a test that finds none has proof that nothing ran.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np


class _Calls:
    """Pickles as a call of whatever it is given."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def _named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _call(module: str, name: str, *arguments: str) -> bytes:
    return b"\x80\x02" + _named(module, name) + b"(" + b"".join(map(_text, arguments)) + b"tR."


def _array(shape: bytes, dtype: bytes, content: bytes) -> bytes:
    """An array as numpy writes it, with whatever shape, type and content."""
    made = _named("numpy.core.multiarray", "_reconstruct") + _named("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
    return b"\x80\x03" + made + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb."


def _dtype(
    spelling: str, state: bytes = b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
) -> bytes:
    return _named("numpy", "dtype") + _text(spelling) + b"\x89\x88\x87R" + state


_FLOAT = _dtype("f8")
_OBJECT = _dtype("O8", b"(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb")
_REAL_LINES = b"(K\x03X\x01\x00\x00\x00<N"


def running(marker: Path) -> dict[str, bytes]:
    """Pickles that would write the marker file."""
    import builtins
    import os
    import subprocess

    touch, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    inst = f"(S'{touch}'\nios\nsystem\n.".encode()
    obj = b"(" + _named("os", "system") + _text(touch) + b"o."
    extend = b"\x80\x02]" + b"(" + _named("os", "system") + b"(" + _text(touch) + b"tRe."
    stack_global = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(touch)]) + touch.encode() + b"\x85R."
    dotted = b"\x80\x04\x8c\x05numpy\x8c\x0ecompat.os.popen\x93" + _text(touch) + b"\x85R."
    new = b"\x80\x02" + _named("subprocess", "Popen") + _text(touch) + b"\x85\x81."
    new_ex = b"\x80\x04" + _named("subprocess", "Popen") + _text(touch) + b"\x85}\x92."
    build = b"\x80\x02" + _named("os", "environ") + b"}" + _text("X") + _text("Y") + b"sb."
    through_dtype = b"\x80\x02" + _named("numpy", "dtype") + b"(" + _named("os", "system") + b"tR."
    in_object_array = _array(b"K\x01\x85", _OBJECT, b"](" + _named("os", "system") + _text(touch) + b"\x85Re")
    encoded = b"\x80\x02" + _named("_codecs", "encode") + _text("x") + _text("rot13") + b"\x86R."
    return {
        "os.system": pickle.dumps(_Calls(os.system, touch)),
        "os.popen": pickle.dumps(_Calls(os.popen, touch)),
        "subprocess.run": pickle.dumps(_Calls(subprocess.run, ["touch", str(marker)])),
        "eval": pickle.dumps(_Calls(builtins.eval, code)),
        "exec, protocol 0": pickle.dumps(_Calls(builtins.exec, code), protocol=0),
        "exec in a list": pickle.dumps([{"a": 1}, _Calls(builtins.exec, code)]),
        "exec in a value": pickle.dumps([{"center": _Calls(builtins.exec, code)}]),
        "exec as a key": pickle.dumps([{_Calls(builtins.exec, code): 1}]),
        "getattr": _call("builtins", "getattr", "x", "join"),
        "__import__": _call("builtins", "__import__", "os"),
        "INST": inst,
        "OBJ": obj,
        "inside APPENDS": extend,
        "STACK_GLOBAL": stack_global,
        "dotted name below numpy": dotted,
        "NEWOBJ": new,
        "NEWOBJ_EX": new_ex,
        "BUILD on os.environ": build,
        "numpy.load": _call("numpy", "load", str(marker)),
        "numpy f2py exec_command": _call("numpy.distutils.exec_command", "exec_command", touch),
        "numpy.testing runstring": _call("numpy.testing._private.utils", "runstring", code, "x"),
        "operator.attrgetter": _call("operator", "attrgetter", "system"),
        "functools.partial": b"\x80\x02" + _named("functools", "partial") + _named("os", "system") + b"\x85R.",
        "pickle.loads within": b"\x80\x03" + _named("pickle", "loads") + b"C\x01." + b"\x85R.",
        "torch.load within": _call("torch.serialization", "load", str(marker)),
        "dtype of a function": through_dtype,
        "object array of calls": in_object_array,
        "another codec": encoded,
        "persistent id": b"\x80\x02" + _text(str(marker)) + b"Q.",
        "extension registry": b"\x80\x02\x82\x01.",
    }


def corrupting() -> dict[str, bytes]:
    """Pickles that crash numpy or the interpreter, or alter what they may only call."""
    pointers = _dtype("f8", b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb")
    defaults = b"N}" + _text("__defaults__") + b"N\x85s\x86b"
    return {
        "object array with too few objects": _array(b"M\xe8\x03\x85", _OBJECT, b"]K\x01a"),
        "number array with too few bytes": _array(b"M\xe8\x03\x85", _FLOAT, b"C\x08aaaaaaaa"),
        "numbers declared to be pointers": _array(b"K\x01\x85", pointers, b"]K\x01a"),
        "negative length": _array(b"J\xff\xff\xff\xff\x85", _FLOAT, b"C\x08aaaaaaaa"),
        "array made with a shape": b"\x80\x03"
        + _named("numpy.core.multiarray", "_reconstruct")
        + _named("numpy", "ndarray")
        + b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85C\x01b\x87R.",
        "ndarray called": b"\x80\x02" + _named("numpy", "ndarray") + b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
        "ndarray by NEWOBJ": b"\x80\x02" + _named("numpy", "ndarray") + b"K\x01\x85\x85\x81.",
        "a billion-byte type": _array(b"K\x00\x85", _dtype("V999999999"), b"C\x00"),
        "structured type": _array(
            b"K\x00\x85", _dtype("f8", _REAL_LINES + _text("a") + b"\x85}JJ\xff\xff\xff\xffK\x00tb"), b"C\x00"
        ),
        "altering a constructor": b"\x80\x02" + _named("numpy.core.multiarray", "scalar") + defaults + b".",
        "scalar of an object": b"\x80\x03"
        + _named("numpy.core.multiarray", "scalar")
        + _OBJECT
        + b"C\x08aaaaaaaa\x86R.",
    }


def exhausting() -> dict[str, bytes]:
    """Pickles of a few bytes that ask for gigabytes or for endless recursion, and ones that are cut off."""
    whole = pickle.dumps([{"center": np.zeros(2), "name": "x" * 300}], protocol=4)
    shared = b"".join(b"q%c0h%ch%c\x86" % (level, level, level) for level in range(60))
    return {
        "memo slot in the billions": b"\x80\x02Nr\xff\xff\xff\xff.",
        "memo slot in decimals": b"Np99999999999\n.",
        "memo read before written": b"\x80\x02h\x07.",
        "string of 4 GB": b"\x80\x02X\xff\xff\xff\xffabc.",
        "bytes of 2^62": b"\x80\x04\x8e\x00\x00\x00\x00\x00\x00\x00\x40abc.",
        "bytearray of 2^62": b"\x80\x05\x96\x00\x00\x00\x00\x00\x00\x00\x40abc.",
        "negative length": b"\x80\x02T\xff\xff\xff\xffabc.",
        "tuples nested a million deep, hashed": b"\x80\x02}N" + b"\x85" * 1_000_000 + b"Ns.",
        "a tuple of itself sixty times over, hashed": b"\x80\x02}N\x85" + shared + b"Ns.",
        "unknown opcode": b"\x80\x02\xff.",
        "empty stack": b"\x80\x02R.",
        "empty": b"",
        "no STOP": whole[:-1],
        "cut off": whole[: len(whole) // 2],
        "a later protocol": b"\x80\x63N.",
        "text": b"<html>not found</html>",
        "zeros": bytes(100),
    }


def every_one(marker: Path) -> dict[str, bytes]:
    return running(marker) | corrupting() | exhausting()


NAMES = sorted(every_one(Path("marker")))
