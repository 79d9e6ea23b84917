"""The same for formats that hold others: pickles, npy, zips, safetensors, tars, pictures, Parquet."""

from __future__ import annotations

import io
import json
import pickletools
import re
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from random import Random

from tests.fuzz.mutation import NUMBERS, TEXTS, Mutator, bytes_changed, either, tree_changed

_BLOCK = 512


_PLAIN_OPCODES = b"012(N]})aesubR\x81\x92t\x94oQ\x85\x86\x87\x88\x8f\x90\x91\x93\x97\x98.ld"
_OPCODES = (
    *(bytes([code]) for code in _PLAIN_OPCODES),
    *(b"h\x00", b"q\xff", b"K\xff", b"J\xff\xff\xff\xff", b"r\xff\xff\xff\x0f", b"B\xff\xff\xff\x7f", b"I1e9\n"),
    *(b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8e" + b"\xff" * 7 + b"\x7f", b"\x95" + b"\0" * 7 + b"\x10"),
    *(b"cos\nsystem\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"X\x04\x00\x00\x00true"),
    *(b"(S'true'\nios\nsystem\n", b"L" + b"9" * 999 + b"L\n"),
)


@either
def pickle_changed(data: bytes, rng: Random) -> bytes:
    """Opcodes left out, doubled, exchanged, put in; arguments changed within their lengths."""
    starts = [position for _, _, position in pickletools.genops(data) if position is not None]
    parts = [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        match rng.randrange(6):
            case 0:
                parts[at] = b""
            case 1:
                parts[at] += parts[other]
            case 2:
                parts[at], parts[other] = parts[other], parts[at]
            case 3:
                parts[at] += rng.choice(_OPCODES)
            case 4:
                parts[at] = rng.choice(_OPCODES)
            case _ if len(parts[at]) > 1:
                inside = rng.randrange(1, len(parts[at]))
                parts[at] = parts[at][:inside] + bytes([rng.randrange(256)]) + parts[at][inside + 1 :]
    return b"".join(parts)


_DTYPES = [
    "<f4",
    ">f8",
    "|O",
    "<U2147483647",
    "|V999999999",
    "<f2",
    "|S0",
    "<M8[ns]",
    "|b1",
    "<c16",
    "<i8",
    "<U0",
    "f4,f8",
    "|V0",
]


@either
def npy_changed(data: bytes, rng: Random) -> bytes:
    """The header says another shape, type or order; its length and padding fit."""
    (length,) = struct.unpack("<H", data[8:10])
    header, body = data[10 : 10 + length].decode("latin1"), data[10 + length :]
    match rng.randrange(4):
        case 0:
            shape = ",".join(str(rng.choice((0, 1, 2, 48, -1, *NUMBERS))) for _ in range(rng.choice((0, 1, 2, 3, 40))))
            header = re.sub(r"'shape': \([^)]*\)", f"'shape': ({shape},)" if shape else "'shape': ()", header)
        case 1:
            header = re.sub(r"'descr': '[^']*'", f"'descr': {rng.choice(_DTYPES)!r}", header)
        case 2:
            header = bytes_changed(header.encode("latin1"), rng).decode("latin1")
        case 3 if b"O'" in data[:128]:
            body = pickle_changed(body, rng) if body.startswith(b"\x80") else body
        case _:
            body = bytes_changed(body, rng)
    padded = (header.rstrip() + " " * (-len(header.rstrip()) % 64)).encode("latin1")[:65535]
    return (
        data[:6]
        + rng.choice((b"\1\0", b"\1\0", b"\1\0", b"\2\0", b"\3\0"))
        + struct.pack("<H", len(padded))
        + padded
        + body
    )


def zip_changed(mutators: Mapping[str, Mutator]) -> Mutator:
    """mutators: ending of an entry's name -> how its content is changed; other entries are changed as plain bytes."""

    @either
    def changed(data: bytes, rng: Random) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(info.filename, archive.read(info), info.compress_type) for info in archive.infolist()]
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(entries))
            name, content, kind = entries[at]
            match rng.randrange(8):
                case 0:
                    entries.append((rng.choice((name, entries[0][0])), bytes_changed(content, rng), kind))
                case 1:
                    entries[at] = (rng.choice((*TEXTS[2:6], f"{name}x")), content, kind)
                case 2:
                    entries[at] = (
                        name,
                        content,
                        rng.choice((0, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)),
                    )
                case 3 if len(entries) > 1:
                    del entries[at]
                case _:
                    mutator = next(
                        (found for ending, found in mutators.items() if name.endswith(ending)), bytes_changed
                    )
                    entries[at] = (name, mutator(content, rng), kind)
        made = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(made, "w") as archive:
            warnings.simplefilter("ignore")  # of names that stand twice
            for name, content, kind in entries:
                archive.writestr(name, content, compress_type=kind)
        return made.getvalue()

    return changed


@either
def safetensors_changed(data: bytes, rng: Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(tree_changed(json.loads(data[8 : 8 + length]), rng)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


# ---- tars and pictures ----------------------------------------------------------------------------------------------

_FIELDS = ((0, 100), (100, 8), (124, 12), (124, 12), (156, 1), (156, 1), (157, 100), (257, 8), (345, 155))
"""Of a header: name, mode, size, type, link's target, magic, prefix."""
_TYPES = b"01234567xgLKSD\0A\xff"


def tar_changed(mutators: Mapping[str, Mutator]) -> Mutator:
    """A header's field changed with its checksum right, or a member's content by the mutator of its ending."""

    @either
    def changed(data: bytes, rng: Random) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            members = archive.getmembers()
        member = rng.choice(members)
        if rng.random() < 0.5:
            return _with_content(data, member, mutators, rng)
        header = bytearray(data[member.offset : member.offset + _BLOCK])
        start, length = rng.choice(_FIELDS)
        if length == 1:
            value = bytes([rng.choice(_TYPES)])
        elif start == 124:
            value = b"%011o\0" % (rng.choice(NUMBERS) % 8**11) if rng.random() < 0.7 else b"\x80" + rng.randbytes(11)
        else:
            value = rng.choice((*TEXTS, "x.jpg")).encode("utf-8", "surrogatepass")[:length].ljust(length, b"\0")
        header[start : start + length] = value
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
        return data[: member.offset] + bytes(header) + data[member.offset + _BLOCK :]

    return changed


def _with_content(data: bytes, member: tarfile.TarInfo, mutators: Mapping[str, Mutator], rng: Random) -> bytes:
    start = member.offset_data
    content = data[start : start + member.size]
    mutator = next((found for ending, found in mutators.items() if member.name.endswith(ending)), bytes_changed)
    content = mutator(content, rng)
    header = bytearray(data[member.offset : member.offset + _BLOCK])
    header[124:136] = b"%011o\0" % len(content)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    end = start + member.size + -member.size % _BLOCK
    return data[: member.offset] + bytes(header) + content + b"\0" * (-len(content) % _BLOCK) + data[end:]


def picture_changed(data: bytes, rng: Random) -> bytes:
    """PNG: a chunk changed with its crc right. JPEG: the content of a segment. Else: early bytes."""
    if rng.random() < 0.3:
        return bytes_changed(data, rng)
    if data.startswith(b"\x89PNG"):
        return _png_changed(data, rng)
    if data.startswith(b"\xff\xd8"):
        marks = [found.start() for found in re.finditer(rb"\xff[\xc0-\xfe]", data)]
        at = rng.choice(marks)
        return data[: at + 2] + bytes_changed(data[at + 2 : at + 40], rng) + data[at + 40 :]
    cut = rng.choice((16, 32, 64, len(data)))
    return bytes_changed(data[:cut], rng) + data[cut:]


def _png_changed(data: bytes, rng: Random) -> bytes:
    chunks, at = [], 8
    while at + 8 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += length + 12
    which = rng.randrange(len(chunks))
    kind, content = chunks[which]
    if kind == b"IDAT" and rng.random() < 0.7:
        content = zlib.compress(bytes_changed(zlib.decompress(content), rng))
    elif rng.random() < 0.2:
        kind = rng.choice((b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fdAT", b"PLTE", b"tRNS", b"IEND"))
    else:
        content = bytes_changed(content, rng)
    chunks[which] = (kind, content)
    if rng.random() < 0.1:
        bomb = zlib.compress(b"\0" * (1 << 26), 1)
        chunks.insert(
            1, rng.choice(((b"zTXt", b"a\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb), (b"iTXt", b"a\0\1\0\0\0" + bomb)))
        )
    return data[:8] + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


@either
def parquet_changed(data: bytes, rng: Random) -> bytes:
    """The footer, where all metadata stands; it has no checksum. Its length is put right."""
    (length,) = struct.unpack("<I", data[-8:-4])
    footer = bytes_changed(data[-8 - length : -8], rng)
    return data[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1"
