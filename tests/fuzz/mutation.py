"""Change valid files so that they stay plausible: lengths, digests and checksums are put right around what is changed.

Bytes changed at random seldom get past a format's first check. Here a container is taken apart, something in it is
changed, and it is put together again as its own program would; each function also changes plain bytes now and then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]

_EDGES = (7, 8, 15, 16, 24, 31, 32, 48, 63)
NUMBERS = (0, 1, 2, 3, *(2**bits + off for bits in _EDGES for off in (-1, 0)))
TEXTS = (*["\x00", "..", "../../x", "/etc/passwd", "\u202e", "�", "nan", "%s", "${x}", "~", "s3://x/y"], "", "a" * 300)


def bytes_changed(data: bytes, rng: Random) -> bytes:
    """A few plain changes: bits, numbers of all widths, pieces cut out, doubled, moved or cut off."""
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        start = rng.randrange(len(changed) or 1)
        end = min(len(changed), start + rng.choice((1, 2, 4, 8, 16, 64, 1024)))
        match rng.randrange(7):
            case 0 if changed:
                changed[start] ^= 1 << rng.randrange(8)
            case 1 if changed:
                changed[start] = rng.randrange(256)
            case 2:
                width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
                number = rng.choice(NUMBERS) % (1 << 8 * width)
                changed[start : start + width] = number.to_bytes(width, order)
            case 3:
                del changed[start:end]
            case 4:
                changed[start:start] = changed[start:end]
            case 5:
                changed[start:end] = rng.randbytes(end - start)
            case 6 if rng.random() < 0.2:
                del changed[start:]
    return bytes(changed)


def either(structured: Mutator, share: float = 0.75) -> Mutator:
    def changed(data: bytes, rng: Random) -> bytes:
        try:
            return structured(data, rng) if rng.random() < share else bytes_changed(data, rng)
        except Exception:  # what was changed cannot be written in this format
            return bytes_changed(data, rng)

    return changed


# ---- values, JSON, YAML ---------------------------------------------------------------------------------------------


def tree_changed(tree: Any, rng: Random) -> Any:
    """A JSON value in which one node is another value, is gone, doubled, renamed or stands somewhere else."""
    places = list(_places(tree))
    if not places:
        return _other_value(tree, rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        parent, key = rng.choice(places)
        try:
            value = parent[key]
        except (KeyError, IndexError):
            continue
        match rng.randrange(6):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[rng.choice((*TEXTS, f"{key}x"))] = parent.pop(key)
            case 2 if isinstance(parent, list):
                parent[key:key] = [value] * rng.choice((1, 2, 50))
            case 3:
                other, name = rng.choice(places)
                parent[key] = json.loads(json.dumps(other[name])) if name in _keys(other) else None
            case _:
                parent[key] = _other_value(value, rng)
    return tree


def _places(tree: Any) -> Any:
    for key in _keys(tree):
        yield tree, key
        yield from _places(tree[key])


def _keys(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return list(tree)
    return list(range(len(tree))) if isinstance(tree, list) else []


def _other_value(value: Any, rng: Random) -> Any:
    nested: Any = []
    for _ in range(rng.choice((1, 3, 200))):
        nested = [nested]
    number = rng.choice(NUMBERS)
    near = [value + 1, -value, value * 2] if isinstance(value, int | float) and not isinstance(value, bool) else [[]]
    if isinstance(value, str):
        near = [value + "x", value[:-1], value.upper(), value * 50]
    special = [
        None,
        True,
        False,
        number,
        -number,
        1e308,
        -0.0,
        float("nan"),
        float("inf"),
        10**400,
        nested,
        {},
        {"": 0},
    ]
    return rng.choice([*special, rng.choice(TEXTS), *near, *near])


@either
def json_changed(data: bytes, rng: Random) -> bytes:
    return json.dumps(tree_changed(json.loads(data), rng), ensure_ascii=rng.random() < 0.9).encode(
        "utf-8", "surrogatepass"
    )


_YAML = (
    '? !!python/object/apply:os.system ["true"]\n: 1\n',
    'x: !!python/object/apply:os.system ["true"]\n',
    "x: !!python/name:os.system\n",
    "x: &a [*a]\n",
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "<<: &m {a: 1}\n",
    "x: !!binary aGVsbG8=\n",
    "x: !!set {a, b}\n",
    "x: !!timestamp 2001-12-14\n",
    "x: 0x" + "f" * 5000 + "\n",
    "x: " + "[" * 3000 + "\n",
    "1: 2\n",
    "[a]: 2\n",
    "? {a: 1}\n: 2\n",
    "x: 1_0:59:59\n",
    "--- \n...\n--- \n",
    "%TAG ! tag:yaml.org,2002:\n",
)


@either
def yaml_changed(data: bytes, rng: Random) -> bytes:
    import yaml

    match rng.randrange(4):
        case 0:
            lines = data.decode().splitlines(keepends=True)
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(_YAML))
            return "".join(lines).encode()
        case 1:
            values = re.findall(rb"(?<=: )[^\n{\[]+", data)
            return data.replace(rng.choice(values), rng.choice(_YAML).partition(": ")[2].strip().encode() or b"*x", 1)
        case 2:
            return bytes_changed(data, rng)
    changed = tree_changed(yaml.safe_load(data), rng)  # lines of _YAML are put in whole files
    return yaml.safe_dump(changed, sort_keys=False).encode("utf-8", "surrogatepass")
