"""Tars are read whole or refused, and what is read of them is where it says."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from storage.errors import InputError
from storage.tars import TarMember, TarScan
from tests.shared import REAL_HANDS, needs_shared
from tests.tars import write_tar

MEMBERS = {"a/0.jpg": b"j" * 700, "a/0.data.pyd": b"p" * 10, "a/1.jpg": b"", "a/1.data.pyd": b"q" * 512}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def _scan(path: Path) -> dict[str, bytes]:
    return {member.name: content for member, content in TarScan(path)}


@pytest.mark.parametrize("name", FORMATS)
def test_members_stand_where_the_scan_says(tmp_path: Path, name: str) -> None:
    members = MEMBERS | {} if name == "ustar" else MEMBERS | {"long/" + "é" * 200 + ".jpg": b"x" * 1000}
    path = write_tar(tmp_path / "0.tar", members, format=FORMATS[name])
    data, scan = path.read_bytes(), TarScan(path)
    found = {}
    for member, content in scan:
        assert data[member.offset : member.offset + member.length] == content
        found[member.name] = content
    assert found == members
    assert scan.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("set/0001.data.pyd", "set/0001", "data.pyd"),
        ("set.v2/0001.JPG", "set.v2/0001", "jpg"),
        ("0001", "0001", ""),
        ("./a/b.detection.npz", "./a/b", "detection.npz"),
    ],
)
def test_names_split_at_the_first_dot_of_the_last_part(name: str, key: str, extension: str) -> None:
    member = TarMember(name, 0, 0)
    assert (member.key, member.extension) == (key, extension)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "whole.tar", MEMBERS).read_bytes()
    end_of_last_member = 4 * 512 + 1024 + 512 + 0 + 512
    cut = tmp_path / "cut.tar"
    for length in [0, 1, 511, 512, 700, 1536, 2048, 3000, end_of_last_member - 1, end_of_last_member]:
        cut.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"cut\.tar: the tar is cut off: it ends at byte"):
            _scan(cut)
    cut.write_bytes(data[: end_of_last_member + 512])  # one block of its end marker is enough
    assert _scan(cut) == MEMBERS


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", MEMBERS)
    data = bytearray(path.read_bytes())
    second_header = 512 + 1024
    data[second_header + 3] ^= 1
    path.write_bytes(data)
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == 1  # what tarfile makes of it
    with pytest.raises(InputError, match=rf"0\.tar: .* at byte {second_header}"):
        _scan(path)


def test_joined_tars_are_refused(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "0.tar", MEMBERS).read_bytes()
    (tmp_path / "joined.tar").write_bytes(data + data)
    with pytest.raises(InputError, match="more data behind the end marker"):
        _scan(tmp_path / "joined.tar")


@pytest.mark.parametrize("content", [gzip.compress(bytes(2000)), b"<html>" + b"x" * 2000], ids=["gzip", "html"])
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(InputError, match=r"0\.tar"):
        _scan(tmp_path / "0.tar")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"S", b"Z"]
)
def test_only_plain_files_are_taken(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(InputError, match=r"0\.tar: found|0\.tar: .*'a\.jpg'"):
        _scan(path)


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "a/../../b.jpg", "a\nb.jpg", "a\x1b[2J.jpg"])
def test_names_that_lead_out_or_cannot_be_printed_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"0\.tar: a member"):
        _scan(write_tar(tmp_path / "0.tar", {name: b"x"}))


def test_folders_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        info = tarfile.TarInfo("a/0.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    assert _scan(path) == {"a/0.jpg": b"abc"}


def test_a_member_that_claims_a_terabyte_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    (tmp_path / "0.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(InputError, match="1099511627776 bytes"):
        _scan(tmp_path / "0.tar")


def test_a_missing_tar_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.tar: cannot be read"):
        _scan(tmp_path / "none.tar")


@needs_shared
def test_real_tars_as_tarfile_reads_them() -> None:
    for path in sorted(REAL_HANDS.glob("*/*.tar")):
        with tarfile.open(path) as archive:
            wanted = {member.name: (member.offset_data, member.size) for member in archive.getmembers()}
        assert {member.name: (member.offset, member.length) for member, _ in TarScan(path)} == wanted
