from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from storage.durable import (
    canonical_json,
    partial_path,
    publish_directory,
    read_sealed_json,
    sealed_json,
    sweep_partial,
    write_bytes_atomic,
)
from storage.errors import DamageError

PAYLOAD = {"name": "mão", "numbers": [1, 2.5], "nested": {"b": None, "a": True}}


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_json({"b": 1, "a": 2}) == canonical_json({"a": 2, "b": 1}) == b'{\n  "a": 2,\n  "b": 1\n}\n'


def test_nan_is_no_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


def test_sealed_document_comes_back(tmp_path: Path) -> None:
    write_bytes_atomic(tmp_path / "a.json", sealed_json(PAYLOAD))
    assert read_sealed_json(tmp_path / "a.json") == PAYLOAD


def test_every_flipped_bit_and_every_cut_of_a_sealed_document_is_found(tmp_path: Path) -> None:
    data = sealed_json(PAYLOAD)
    path = tmp_path / "a.json"
    damaged = [data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :] for at in range(len(data)) for bit in (0, 5)]
    for wrong in [*damaged, *(data[:length] for length in range(len(data))), data + b"\n", b"\n" + data]:
        path.write_bytes(wrong)
        with pytest.raises(DamageError, match=re.escape(str(path))):
            read_sealed_json(path)


def test_a_failed_write_leaves_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_bytes_atomic(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [left.name for left in tmp_path.iterdir()] == ["a"]


def test_the_first_publication_stays(tmp_path: Path) -> None:
    final = tmp_path / "shard"
    for content, is_first in ((b"first", True), (b"second", False)):
        partial = partial_path(final)
        partial.mkdir()
        (partial / "file").write_bytes(content)
        assert publish_directory(partial, final) is is_first
    assert (final / "file").read_bytes() == b"first"
    assert [left.name for left in tmp_path.iterdir()] == ["shard"]


def test_every_byte_is_forced_to_the_disk_before_the_name_and_the_name_before_we_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        order.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def note_rename(path: Path, target: Path) -> None:
        order.append(f"rename to {target.name}")
        os.replace(path, target)  # noqa: PTH105  the method itself is patched

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(Path, "replace", note_rename)
    partial = partial_path(tmp_path / "shard")
    (partial / "group").mkdir(parents=True)
    for name in ("a", "group/b"):
        (partial / name).write_bytes(b"")
    publish_directory(partial, tmp_path / "shard")
    assert order == ["a", partial.name, "b", "group", "rename to shard", tmp_path.name]
    order.clear()
    write_bytes_atomic(tmp_path / "record", b"")
    assert [order[0][:8], *order[1:]] == [".record.", "rename to record", tmp_path.name]


def test_sweeping_touches_only_partial_names(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_bytes(b"")
    (tmp_path / "notes.partial").write_bytes(b"")
    partial_path(tmp_path / "x").write_bytes(b"")
    partial_path(tmp_path / "folder").mkdir()
    assert sweep_partial(tmp_path) == 2
    assert sorted(left.name for left in tmp_path.iterdir()) == [".hidden", "notes.partial"]
