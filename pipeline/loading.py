"""Read pipeline.yaml: every mistake at once, each by its dotted path, with what was found and what was wanted."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.config import PipelineConfig, did_you_mean, disagreements
from storage.errors import InputError
from storage.safe_yaml import BoundedLoader, read_yaml, shown

_REPLACED = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")


FORMATS = ("hamer_tar", "hamer_npz")
_TYPES = ("int", "float", "str")


class _Loader(BoundedLoader):
    """Safe YAML with the scalars of YAML 1.2, in which a key given twice is an error.

    PyYAML reads YAML 1.1, where the key `on` is the boolean true and `1e-4` is text.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way to set them
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"line {line}: a key that is no word")
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"line {line}: key {key_node.value!r} stands twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def load_config(path: Path) -> PipelineConfig:
    """The configuration in a file.

    Raises:
        InputError: the file is missing, is no YAML mapping, or says something wrong; the message lists all of it.
    """
    return parse_config(read_document(path), str(path))


def read_document(path: Path) -> dict[str, Any]:
    """The file as plain values, not looked at yet. Raises InputError where it is missing or no YAML mapping."""
    try:
        document = read_yaml(path, _Loader)
    except OSError as error:
        raise InputError(
            f"cannot read the configuration {path}: {error.strerror or error}\n"
            "Give another with -c FILE, or change into its folder."
        ) from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: found {type(document).__name__}, want a mapping that starts with schema_version: 1")
    return document


def parse_config(document: dict[str, Any], where: str) -> PipelineConfig:
    """The configuration in a mapping; `where` names its origin in messages."""
    try:
        return PipelineConfig.model_validate(document)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _explain(item)]
        lines = list(dict.fromkeys([*lines, *disagreements(document)]))
        count = f"{len(lines)} problem{'s' if len(lines) != 1 else ''}"
        raise InputError(f"{where}: {count}\n" + "\n".join(f"  {line}" for line in lines)) from None


def json_schema() -> dict[str, Any]:
    """The JSON schema of pipeline.yaml, for editors; `docs/pipeline.schema.json` is this."""
    return PipelineConfig.model_json_schema()


def _explain(item: ErrorDetails) -> list[str]:
    location = _without_union_members(item["loc"])
    dotted = ".".join(str(part) for part in location) or "the file"
    if item["type"] == "references":
        return str(item["msg"]).splitlines()
    if item["type"] == "extra_forbidden":
        return [f"{dotted}: unknown key{did_you_mean(str(location[-1]), _known_keys(location[:-1]))}"]
    if item["type"] == "invalid_key" and item["input"] is True:
        return [
            f"{'.'.join(map(str, location[:-1]))}: found the key true, which PyYAML writes for on; want 'on' in quotes"
        ]
    if item["type"] == "missing":
        return [f"{dotted}: missing; it has to be given"]
    if item["type"] == "value_error":
        return [f"{dotted}: {item['ctx']['error']}"]
    if item["type"] == "union_tag_not_found":
        return [f"{dotted}.format: missing; want {' or '.join(FORMATS)}"]
    if item["type"] == "union_tag_invalid":
        found = item["ctx"]["tag"]
        return [f"{dotted}.format: found {found!r}, want {' or '.join(FORMATS)}{did_you_mean(found, FORMATS)}"]
    if item["type"] in ("dict_type", "model_type", "model_attributes_type"):
        return [f"{dotted}: want a mapping of keys to values; found {shown(item['input'])}"]
    return [f"{dotted}: {item['msg']}; found {shown(item['input'])}{_near_choice(item)}"]


def _near_choice(item: ErrorDetails) -> str:
    """`; did you mean 'x'?` where what was found is nearly one of the words that may stand there."""
    if item["type"] != "literal_error" or not isinstance(item["input"], str):
        return ""
    hint = did_you_mean(item["input"], re.findall("'([^']*)'", item["ctx"]["expected"]))
    return hint if "did you mean" in hint else ""


def _without_union_members(location: Sequence[int | str]) -> list[int | str]:
    """A location as the file has it, without what pydantic adds: which member of a union it tried, `[key]`."""
    parts = list(location)
    if len(parts) > 2 and parts[0] == "datasets" and parts[2] in FORMATS:
        del parts[2]
    if len(parts) > 1 and (parts[-1] in _TYPES or str(parts[-1]).startswith(("literal[", "list[", "[key]"))):
        del parts[-1]
    return parts


def _known_keys(location: Sequence[int | str]) -> list[str]:
    """The keys that may stand at a place of the file, read off its JSON schema."""
    schema = json_schema()
    nodes: list[dict[str, Any]] = [schema]
    for part in location:
        nodes = [child for node in nodes for child in _children(node, part, schema)]
    return list(
        dict.fromkeys(
            key for node in nodes for member in _members(node, schema) for key in member.get("properties", {})
        )
    )


def _children(node: dict[str, Any], part: int | str, schema: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for member in _members(node, schema):
        if part in member.get("properties", {}):
            found.append(member["properties"][part])
        elif isinstance(member.get("additionalProperties"), dict):
            found.append(member["additionalProperties"])
        found += member.get("patternProperties", {}).values()
    return found


def _members(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A schema node with its reference followed and its unions opened."""
    if "$ref" in node:
        return _members(schema["$defs"][node["$ref"].rsplit("/", 1)[1]], schema)
    inner = node.get("anyOf", []) + node.get("oneOf", [])
    return [node, *(member for item in inner for member in _members(item, schema))]
