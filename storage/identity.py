"""cache.json: what decides a cache's answers, spelled out, and the fingerprint that names its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage import layout
from storage.durable import canonical_json, of_this_format, read_sealed_json, sha256_bytes, sha256_file
from storage.errors import DamageError, InputError

CACHE_JSON = "cache.json"


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Sixteen hex digits over everything that decides the stored answers."""
    return sha256_bytes(canonical_json(identity))[:16]


def cache_document(identity: Mapping[str, Any], attachments: Mapping[str, bytes]) -> dict[str, Any]:
    """What cache.json says: the identity, and the digests of the small files that stand beside it."""
    return {
        "format": "handstill-cache",
        "format_version": layout.FORMAT_VERSION,
        "fingerprint": fingerprint(identity),
        "identity": dict(identity),
        "attachments": {
            name: {"bytes": len(data), "sha256": sha256_bytes(data)} for name, data in sorted(attachments.items())
        },
    }


def stored_identity(root: Path) -> dict[str, Any] | None:
    """The identity of a cache of any version of the format, to compare with; None where it is not there or damaged."""
    try:
        with of_this_format(CACHE_JSON):
            return dict(read_sealed_json(root / CACHE_JSON)["identity"])
    except (OSError, DamageError):
        return None


def read_description(root: Path) -> dict[str, Any]:
    """cache.json of a cache folder, checked; InputError when it is no cache or of another version of the format."""
    path = root / CACHE_JSON
    if not path.is_file():
        if (root / "ledger").is_dir():
            raise DamageError(f"{path} is gone; run `handstill run`, which writes it again")
        raise InputError(
            f"{root} is not a cache: it has no {CACHE_JSON}. Give a folder that `handstill run teach` made."
        )
    document = read_sealed_json(path)
    with of_this_format(str(path)):
        _check_description(root, document)
    return document


def _check_description(root: Path, document: dict[str, Any]) -> None:
    if document["format_version"] != layout.FORMAT_VERSION:
        raise InputError(
            f"{root} is in version {document['format_version']} of the cache format; "
            f"this handstill reads version {layout.FORMAT_VERSION}: run `handstill run` to make a new cache"
        )
    if fingerprint(document["identity"]) != document["fingerprint"] or document["fingerprint"] != root.name:
        raise DamageError(f"{root / CACHE_JSON} is damaged or was moved: its identity does not give its folder's name")


def sound_attachment(path: Path) -> Path:
    """`path` itself, once its bytes are those that the cache.json beside it lists. A file of no cache is taken as is.

    Raises:
        DamageError: it is gone, or has other bytes than were written.
    """
    if not (path.parent / CACHE_JSON).is_file():
        return path
    listed = read_description(path.parent)["attachments"].get(path.name)
    if listed is None or not path.is_file() or sha256_file(path) != listed["sha256"]:
        raise DamageError(f"{path} is damaged: it is gone or has other bytes than were written; run `handstill run`")
    return path
