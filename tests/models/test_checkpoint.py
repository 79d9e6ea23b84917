"""Checkpoints are read whole or refused; nothing that they name runs, and no tensor reaches beyond its bytes."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoint import read_checkpoint
from storage.errors import InputError
from storage.unpickling import UnsafePickleError
from tests import hostile_pickles


class _Storage:
    def __init__(self, key: str, length: Any) -> None:
        self.pid = ("storage", torch.FloatStorage, key, "cpu", length)


class _Tensor:
    """Pickles as torch pickles a tensor, with whatever numbers."""

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any) -> None:
        self.call = (storage, offset, shape, strides, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.call


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.pid if isinstance(value, _Storage) else None


def archive(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in ({"data.pkl": data, "data/0": bytes(40)} | records).items():
            file.writestr(f"archive/{name}", content)
    return path


def describe(content: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def holding(tensor: Any) -> bytes:
    return describe({"state_dict": {"x": tensor}})


def test_mapped_tensors_are_what_was_saved(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.arange(12.0).reshape(3, 4),
        "transposed": torch.arange(12.0).reshape(3, 4).T,
        "slice": torch.arange(10)[3:7],
        "half": torch.randn(5).half(),
        "bfloat16": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(True),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "a.ckpt")
    found = read_checkpoint(tmp_path / "a.ckpt")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value.detach())


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"x": torch.zeros(4)}}, path)
    before = path.read_bytes()
    read_checkpoint(path)["x"].add_(1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("wrap", [lambda state: {"model": state}, lambda state: state], ids=["model", "bare"])
def test_other_layouts_of_weights(tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap({"x": torch.ones(2)}), tmp_path / "a.pth")
    assert torch.equal(read_checkpoint(tmp_path / "a.pth")["x"], torch.ones(2))


def test_safetensors(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "a.safetensors")["x"], torch.ones(2))
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="not a readable safetensors"):
        read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("shape", [[0, 1 << 63], [0, *[3] * 99]])
def test_empty_tensors_of_endless_sides_are_refused_in_one_line(tmp_path: Path, shape: list[int]) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="not a readable safetensors") as told:
        read_checkpoint(tmp_path / "a.safetensors")
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize("name", hostile_pickles.NAMES)
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    path = archive(tmp_path / "a.ckpt", hostile_pickles.every_one(marker)[name])
    with pytest.raises(InputError, match=r"a\.ckpt"):
        read_checkpoint(path)
    assert not marker.exists()


STRAY_TENSORS = {
    "longer than its storage": _Tensor(_Storage("0", 10), 0, (11,), (1,)),
    "begins behind its storage": _Tensor(_Storage("0", 10), 10, (1,), (1,)),
    "strides beyond its storage": _Tensor(_Storage("0", 10), 0, (2, 2), (9, 2)),
    "negative offset": _Tensor(_Storage("0", 10), -1, (2,), (1,)),
    "negative stride": _Tensor(_Storage("0", 10), 5, (2,), (-1,)),
    "petabytes by a stride of 0": _Tensor(_Storage("0", 10), 0, (2**25, 2**25), (0, 0)),
    "a length beyond 64 bits": _Tensor(_Storage("0", 10), 0, (2**70,), (1,)),
    "a boolean length": _Tensor(_Storage("0", 10), 0, (True,), (1,)),
    "fewer strides than lengths": _Tensor(_Storage("0", 10), 0, (2, 2), (1,)),
    "forty dimensions": _Tensor(_Storage("0", 10), 0, (1,) * 40, (1,) * 40),
    "no storage": _Tensor("data", 0, (1,), (1,)),
    "a storage of negative length": _Tensor(_Storage("0", -1), 0, (1,), (1,)),
    "a storage of a boolean length": _Tensor(_Storage("0", 1.0), 0, (1,), (1,)),
}


@pytest.mark.parametrize("name", STRAY_TENSORS)
def test_tensors_that_are_no_tensors_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafePickleError):
        read_checkpoint(archive(tmp_path / "a.ckpt", holding(STRAY_TENSORS[name])))


def test_storage_types_and_constructors_cannot_be_altered(tmp_path: Path) -> None:
    for named in (b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n"):
        with pytest.raises(UnsafePickleError, match="alter"):
            read_checkpoint(archive(tmp_path / "a.ckpt", b"\x80\x02" + named + b"}b."))


GOOD = holding(_Tensor(_Storage("0", 10), 0, (10,), (1,)))


@pytest.mark.parametrize(
    ("data", "records", "message"),
    [
        (GOOD, {"data/0": bytes(36)}, "holds 36 bytes"),
        (holding(_Tensor(_Storage("9", 10), 0, (10,), (1,))), {}, "data/9 is missing"),
        (GOOD, {"byteorder": b"big"}, "big-endian"),
        (GOOD, {"constants.pkl": b""}, "TorchScript"),
        (describe([1, 2]), {}, "found list"),
        (describe({"state_dict": {}}), {}, "no state dictionary"),
        (describe({"state_dict": {"x": 3}}), {}, "x is no tensor"),
        (describe({"weights": "elsewhere"}), {}, "weights is no tensor"),
    ],
)
def test_other_zips_are_explained(tmp_path: Path, data: bytes, records: dict[str, bytes], message: str) -> None:
    assert read_checkpoint(archive(tmp_path / "good.ckpt", GOOD))["x"].shape == (10,)
    with pytest.raises(InputError, match=message):
        read_checkpoint(archive(tmp_path / "a.ckpt", data, **records))


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="compressed"):
        read_checkpoint(archive(tmp_path / "a.ckpt", GOOD, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_cut_short(tmp_path: Path, share: float) -> None:
    torch.save({"state_dict": {"x": torch.zeros(1000)}}, tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="not a whole checkpoint"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_format_of_before_pytorch_1_6(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(2)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"PyTorch before 1\.6"):
        read_checkpoint(tmp_path / "a.pth")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="a folder"):
        read_checkpoint(tmp_path)


def test_lightning_leftovers_do_not_matter(tmp_path: Path) -> None:
    leftovers: dict[str, Any] = {"paths": [tmp_path], "set": {1}, "dtype": torch.float32, "size": torch.Size([2])}
    optimiser: dict[str, Tensor] = {"exp_avg": torch.zeros(3)}
    torch.save(
        {"state_dict": {"x": torch.ones(1)}, "callbacks": leftovers, "optimizer": optimiser}, tmp_path / "a.ckpt"
    )
    assert list(read_checkpoint(tmp_path / "a.ckpt")) == ["x"]
