"""Read YAML that others wrote: plain values only, no tags that name types, aliases that cannot blow up.

PyYAML's safe loader builds nothing but plain values, and shares what aliases repeat; whoever then walks or prints such
a value meets every repetition: nine lines can stand for a billion. They are counted here before anything is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from storage.errors import InputError

_LARGEST_FILE = 1 << 19
"""Bytes. HaMeR's model_config.yaml has three thousand; PyYAML takes up to a thousand times a file's size."""
_MOST_VALUES = 1 << 20
_LONGEST_NUMBER = 100
_MALFORMED = (
    yaml.YAMLError,
    RecursionError,
    ValueError,
    TypeError,  # a key that is a list
    AttributeError,  # PyYAML's own, over !!timestamp and !!int of other text
    KeyError,  # PyYAML's own, over !!bool
    IndexError,  # PyYAML's own, over !!int without digits
    OverflowError,
)


class BoundedLoader(yaml.SafeLoader):
    """A SafeLoader that refuses documents which stand for more than a million values, or for endless ones, and
    numbers of more than a hundred digits, over which what comes later (messages, pydantic) stumbles."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _LONGEST_NUMBER:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value):,} digits", node.start_mark
            )
        return int(super().construct_yaml_int(node))


BoundedLoader.add_constructor("tag:yaml.org,2002:int", BoundedLoader.construct_yaml_int)


def read_yaml(path: Path, loader: type[BoundedLoader] = BoundedLoader) -> Any:
    """The one document of a file.

    Raises:
        OSError: it cannot be read.
        InputError: it is no YAML, or not plain and bounded.
    """
    with path.open("rb") as file:
        data = file.read(_LARGEST_FILE + 1)
    if len(data) > _LARGEST_FILE:
        raise InputError(f"{path} has more than {_LARGEST_FILE:,} bytes: no configuration is as large")
    try:
        return yaml.load(data.decode("utf-8"), Loader=loader)  # noqa: S506 - a SafeLoader
    except _MALFORMED as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error


def shown(value: object, most: int = 80) -> str:
    """A value in an error message, cut to `most` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= most else text[: most - 3] + "..."


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, every alias counted as what it repeats."""
    if id(node) in known:
        if known[id(node)] < 0:
            raise yaml.composer.ComposerError(None, None, "an alias stands inside what it names", node.start_mark)
        return known[id(node)]
    known[id(node)] = -1
    children = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
    total = 1 + sum(_count(child, known) for child in children) if isinstance(node, yaml.CollectionNode) else 1
    if total > _MOST_VALUES:
        raise yaml.composer.ComposerError(None, None, f"more than {_MOST_VALUES:,} values", node.start_mark)
    known[id(node)] = total
    return total
