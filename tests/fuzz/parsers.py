"""Every parser of outside data: valid files to start from, how they are changed, how they are read, what may be raised.

`PARSERS[name](folder)` writes what stands around the file and returns a maker of cases: files to write, a call to make.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from safetensors.torch import save as save_tensors

from models.checkpoint import read_checkpoint
from models.fast_hamer import describe_checkpoint
from models.hamer import HamerConfig
from models.hand_detector import _SHA256, load_hand_detector
from models.hand_model import load_hand_model, save_hand_model
from models.student import Student
from pipeline.box_files import read_boxes
from pipeline.events import EventTail
from pipeline.loading import load_config
from stages.annotations import UnusableError, read_annotation
from stages.config import HamerNpzDataset, HamerTarDataset
from stages.ingest import scan_source
from stages.open_hand import write_mano_pkl
from stages.photos import Photo, look_at_video, read_photo, video_frames
from stages.pictures import decode, look_at
from storage import zarr3
from storage.codecs import codec_bytes, read_codec
from storage.durable import parse_sealed_json, sealed_json, sha256_bytes
from storage.encodings import decode_picture, encode_picture
from storage.errors import DamageError, InputError, WorkError
from storage.manifest import read_manifest, read_plan_columns, write_manifest
from storage.reading import open_cache
from storage.unpickling import load_annotations
from tests.fuzz import containers, mutation
from tests.fuzz.mutation import Mutator
from tests.tars import annotation, picture, sample, write_tar
from tests.tiny_cache import tiny_codec, write_tiny_cache
from tests.tiny_experiment import CONFIG
from tests.tiny_networks import tiny_hand_model, tiny_student, write_tiny_teacher
from trainer.cases import read_table, write_table
from trainer.loop import _read_checkpoint as read_training_checkpoint
from trainer.prior import read_mocap

USER = (InputError,)
OWN = (InputError, DamageError)


@dataclass(frozen=True)
class Case:
    """One input and the call that reads it."""

    files: Mapping[Path, bytes]
    read: Callable[[], object]
    allowed: tuple[type[Exception], ...]
    """What the reader's documentation says that it raises."""


Maker = Callable[[Random], Case]


@dataclass(frozen=True)
class OneFile:
    """A maker whose cases differ in one file; the coverage-guided run (tests/fuzz/guided.py) takes it apart."""

    path: Path
    seeds: Sequence[bytes]
    mutator: Mutator
    read: Callable[[Path], object]
    allowed: tuple[type[Exception], ...]

    def __call__(self, rng: Random) -> Case:
        return self.of(self.mutator(rng.choice(self.seeds), rng))

    def of(self, data: bytes) -> Case:
        """The case of these bytes."""
        return Case({self.path: data}, lambda: self.read(self.path), self.allowed)


def _one_file(
    path: Path,
    seeds: list[bytes],
    mutator: Mutator,
    read: Callable[[Path], object],
    allowed: tuple[type[Exception], ...] = USER,
) -> Maker:
    return OneFile(path, seeds, mutator, read, allowed)


# ---- data sets ------------------------------------------------------------------------------------------------------

_RICH = annotation(extra_info={"fitting_loss": np.array({"reprojection_loss": np.float32(0.1)}, object)})


def _labels(folder: Path) -> Maker:
    def read(path: Path) -> None:
        for hand in load_annotations(path.read_bytes(), path.name):
            with contextlib.suppress(UnusableError):
                read_annotation(hand)

    seeds = [pickle.dumps([annotation(), _RICH], protocol=protocol) for protocol in (0, 2, 3, 4, 5)]
    return _one_file(folder / "a.data.pyd", seeds, containers.pickle_changed, read)


def _tar(folder: Path) -> Maker:
    small = {"a.jpg": picture(16, 16, kind="PNG"), "b.jpg": picture(16, 16, 1)}
    long = sample("x" * 120 + "/y") | {"x" * 120 + "/y.jpg": picture(8, 8)}
    seeds = [
        write_tar(folder / "seed.tar", sample("a") | sample("b", annotation(right=0)) | small).read_bytes(),
        write_tar(folder / "seed.tar", long, format=1).read_bytes(),
        write_tar(folder / "seed.tar", long, format=2).read_bytes(),
    ]
    config = HamerTarDataset(format="hamer_tar", path="0.tar")
    mutators = {".pyd": containers.pickle_changed, ".jpg": containers.picture_changed}
    read = lambda path: scan_source("set", config, path, folder)  # noqa: E731
    return _one_file(folder / "0.tar", seeds, containers.tar_changed(mutators), read)


def _evaluation_npz(folder: Path) -> Maker:
    (folder / "0.jpg").write_bytes(picture(16, 16))
    arrays: dict[str, Any] = {
        "imgname": np.array(["0.jpg", "0.jpg"], object),
        "center": np.full((2, 2), 8.0),
        "scale": np.full((2, 2), 9.0),
        "right": np.ones(2),
        "hand_keypoints_2d": np.ones((2, 21, 3), np.float32),
        "extra_info": np.array([{}, {"fitting_loss": {"reprojection_loss": 1.0}}], object),
    }
    config = HamerNpzDataset(format="hamer_npz", path="0.npz", image_dir=".")
    mutator = containers.zip_changed({".npy": containers.npy_changed})
    read = lambda path: scan_source("val", config, path, folder)  # noqa: E731
    return _one_file(folder / "0.npz", _npz(arrays), mutator, read)


def _npz(arrays: Mapping[str, Any]) -> list[bytes]:
    made = []
    for save in (np.savez, np.savez_compressed):
        save(stored := io.BytesIO(), **arrays)
        made.append(stored.getvalue())
    return made


def _truth(folder: Path) -> Maker:
    (folder / "0.jpg").write_bytes(picture(16, 16))
    boxes = {"center": np.full((2, 2), 8.0), "scale": np.full((2, 2), 9.0)}
    np.savez(folder / "0.npz", imgname=np.array(["0.jpg"] * 2), **boxes)
    config = HamerNpzDataset(format="hamer_npz", path="0.npz", image_dir=".", truth_xyz="xyz.json")
    seed = json.dumps(np.ones((2, 21, 3)).tolist()).encode()
    read = lambda path: scan_source("val", config, folder / "0.npz", folder)  # noqa: E731
    return _one_file(folder / "xyz.json", [seed], mutation.json_changed, read)


def _mocap(folder: Path) -> Maker:
    seeds = _npz({"hand_pose": np.zeros((3, 48), np.float32), "betas": np.zeros((3, 10))})
    return _one_file(folder / "m.npz", seeds, containers.zip_changed({".npy": containers.npy_changed}), read_mocap)


def _pictures() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    made = []
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, options in (
        ("JPEG", {"exif": exif}),
        ("JPEG", {"progressive": True, "comment": b"x"}),
        ("PNG", {"exif": exif}),
        ("WEBP", {"lossless": True, "exif": exif}),
        ("WEBP", {}),
        ("BMP", {}),
    ):
        Image.fromarray(pixels).save(stored := io.BytesIO(), kind, **options)
        made.append(stored.getvalue())
    for mode in ("P", "L", "RGBA", "1", "I;16", "LA"):
        image = (
            Image.fromarray(pixels[..., 0].astype(np.uint16))
            if mode == "I;16"
            else Image.fromarray(pixels).convert(mode)
        )
        image.save(stored := io.BytesIO(), "PNG")
        made.append(stored.getvalue())
    return made


def _picture(folder: Path) -> Maker:
    def read(path: Path) -> None:
        content = path.read_bytes()
        if look_at(content, path.name).problem is None:
            decode(content)
        read_photo(path)

    return _one_file(folder / "photo.jpg", _pictures(), containers.picture_changed, read)


def _video(folder: Path) -> Maker:
    seeds = []
    for name, code in (("a.avi", "MJPG"), ("a.mp4", "mp4v")):
        writer = cv2.VideoWriter(str(folder / name), cv2.VideoWriter.fourcc(*code), 10, (32, 32))
        for frame in np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8):
            writer.write(frame)
        writer.release()
        seeds.append((folder / name).read_bytes())

    def read(path: Path) -> None:
        look_at_video(path)
        for number, _ in enumerate(video_frames(path)):
            if number > 50:
                break

    return _one_file(folder / "video.mp4", seeds, mutation.bytes_changed, read)


# ---- networks -------------------------------------------------------------------------------------------------------


def _checkpoint(folder: Path) -> Maker:
    path, _ = write_tiny_teacher(folder)
    torch.save({"state_dict": {"x": torch.ones(3, 4), "y": torch.ones(2).half()}, "epoch": 1}, stored := io.BytesIO())
    mutator = containers.zip_changed({"data.pkl": containers.pickle_changed})

    def read(path: Path) -> None:
        for tensor in read_checkpoint(path).values():
            tensor.clone()
        describe_checkpoint(path)

    return _one_file(path, [path.read_bytes(), stored.getvalue(), stored.getvalue()], mutator, read)


def _training_checkpoint(folder: Path) -> Maker:
    state = {"step": 3, "model": {"x": torch.ones(3, 4)}, "order": [1, 2], "rng": torch.zeros(16, dtype=torch.uint8)}
    torch.save(state, stored := io.BytesIO())
    mutator = containers.zip_changed({"data.pkl": containers.pickle_changed})
    return _one_file(folder / "checkpoint.pt", [stored.getvalue()], mutator, read_training_checkpoint, OWN)


def _weights(folder: Path) -> Maker:
    def read(path: Path) -> None:
        for tensor in read_checkpoint(path).values():
            tensor.clone()

    seed = save_tensors({"x": torch.ones(3, 4), "y": torch.ones(2).half(), "z": torch.ones(0, 2)})
    return _one_file(folder / "w.safetensors", [seed], containers.safetensors_changed, read)


def _hand_model(suffix: str, mutator: Mutator) -> Callable[[Path], Maker]:
    def prepare(folder: Path) -> Maker:
        hand, path = tiny_hand_model(), folder / f"MANO_RIGHT{suffix}"
        if suffix == ".pkl":
            write_mano_pkl(hand, path)
            seeds = [path.read_bytes()]
        elif suffix == ".npz":
            seeds = _npz({name: getattr(hand, name) for name in hand.__dataclass_fields__})
        else:
            save_hand_model(hand, path)
            seeds = [path.read_bytes()]
        return _one_file(path, seeds, mutator, load_hand_model)

    return prepare


def _model_config(folder: Path) -> Maker:
    write_tiny_teacher(folder)
    path = folder / "model_config.yaml"
    return _one_file(path, [path.read_bytes()], mutation.yaml_changed, HamerConfig.from_yaml)


def _student(folder: Path) -> Maker:
    tiny_student().save(folder / "student")
    whole = {path: path.read_bytes() for path in sorted((folder / "student").iterdir())}
    mutators: dict[str, Mutator] = {".json": mutation.json_changed, ".safetensors": containers.safetensors_changed}

    def case(rng: Random) -> Case:
        path = rng.choice(sorted(whole))
        return Case(
            whole | {path: mutators[path.suffix](whole[path], rng)}, lambda: Student.load(folder / "student"), OWN
        )

    return case


def _wheel(folder: Path) -> Maker:
    with zipfile.ZipFile(stored := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name in _SHA256:
            archive.writestr(f"mediapipe/modules/{name}", b"TFL3" + bytes(4000))
    return _one_file(folder / "mediapipe.whl", [stored.getvalue()], containers.zip_changed({}), load_hand_detector)


# ---- what a person writes -------------------------------------------------------------------------------------------


def _pipeline_yaml(folder: Path) -> Maker:
    import yaml

    seeds = [yaml.safe_dump(CONFIG, sort_keys=False).encode(), Path("pipeline.yaml").read_bytes()]
    return _one_file(folder / "pipeline.yaml", seeds, mutation.yaml_changed, load_config)


def _boxes(folder: Path) -> Maker:
    photo = Photo(folder / "photo.jpg", "photo.jpg")
    seed = json.dumps({"photo.jpg": [{"box": [1, 2, 30, 40.5], "side": "left"}, {"box": [1, 2, 3, 4]}]}).encode()
    read = lambda path: read_boxes(path, [photo])  # noqa: E731
    return _one_file(folder / "boxes.json", [seed], mutation.json_changed, read)


# ---- the workdir ----------------------------------------------------------------------------------------------------


def _manifest(folder: Path) -> Maker:
    source = write_tar(folder / "0.tar", sample("a") | sample("b"))
    table = scan_source("set", HamerTarDataset(format="hamer_tar", path="0.tar"), source, folder)
    write_manifest(folder / "m.parquet", table)

    def read(path: Path) -> pa.Table:
        read_plan_columns(path)
        return read_manifest(path)

    return _one_file(folder / "m.parquet", [(folder / "m.parquet").read_bytes()], containers.parquet_changed, read, OWN)


def _cache(folder: Path) -> Maker:
    """Bytes that rot, and caches that somebody altered with all seals and digests put right."""
    root = write_tiny_cache(folder, n=3, views=1, samples_per_shard=2, channels=8, quarantined=1)
    whole = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    changed: list[Path] = []

    def read() -> None:
        cache = open_cache(root)
        cache.read(range(len(cache)), [0] * len(cache))

    def case(rng: Random) -> Case:
        again = {path: whole[path] for path in changed}
        path = rng.choice(sorted(whole))
        files = (
            _forged(root, path, whole, rng) if rng.random() < 0.7 else {path: mutation.bytes_changed(whole[path], rng)}
        )
        changed[:] = list(files)
        return Case(again | files, read, (*OWN, WorkError))

    return case


def _forged(root: Path, path: Path, whole: Mapping[Path, bytes], rng: Random) -> dict[Path, bytes]:
    """A changed file, and the records above it to fit."""
    if path.suffix == ".parquet":
        data = containers.parquet_changed(whole[path], rng)
        sidecar = parse_sealed_json(whole[path.with_suffix(".json")], "")
        sidecar |= {"bytes": len(data), "sha256": sha256_bytes(data)}
        return {path: data, path.with_suffix(".json"): sealed_json(sidecar)}
    shard = next((parent for parent in path.parents if parent.suffix == ".zarr"), None)
    if shard is None:
        return {path: _resealed(whole[path], rng)}
    data = (
        mutation.json_changed(whole[path], rng)
        if path.name == zarr3.METADATA_NAME
        else mutation.bytes_changed(whole[path], rng)
    )
    if path.name != zarr3.METADATA_NAME and len(data) > 4:
        data = data[:-4] + zarr3.crc32c_bytes(data[:-4])
    record_path = root / "ledger" / f"{shard.stem}.json"
    record = parse_sealed_json(whole[record_path], "")
    record["files"][path.relative_to(shard).as_posix()] = {"bytes": len(data), "sha256": sha256_bytes(data)}
    return {path: data, record_path: sealed_json(record)}


def _resealed(data: bytes, rng: Random) -> bytes:
    try:
        tree = mutation.tree_changed(parse_sealed_json(data, ""), rng)
        return sealed_json(tree if isinstance(tree, dict) and tree and "seal" not in tree else {"a": tree})
    except (ValueError, DamageError, TypeError):  # no sealed document, or a value that canonical JSON cannot hold
        return mutation.bytes_changed(data, rng)


def _codec(folder: Path) -> Maker:
    seed = codec_bytes(tiny_codec("pca4-int8", 8))
    read = lambda path: read_codec("pca4-int8", path.read_bytes())  # noqa: E731
    return _one_file(folder / "codec.safetensors", [seed], containers.safetensors_changed, read, (ValueError,))


def _events(folder: Path) -> Maker:
    seed = b"".join(
        json.dumps({"event": "teach_batch", "time": 1.5, "unit": "x", "views": 3}).encode() + b"\n" for _ in range(3)
    )
    read = lambda path: list(EventTail(path).new())  # noqa: E731
    return _one_file(folder / "events.jsonl", [seed], mutation.bytes_changed, read, OWN)


# ---- the MLflow server ----------------------------------------------------------------------------------------------


def _table(columns: Mapping[str, Any]) -> Callable[[Path], Maker]:
    def prepare(folder: Path) -> Maker:
        path = folder / "samples.parquet"
        write_table(path, {"sample_id": np.array(["a", "b", "c"], object), **columns})
        return _one_file(path, [path.read_bytes()], containers.parquet_changed, read_table, (DamageError,))

    return prepare


def _stored_picture(folder: Path) -> Maker:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    seeds = [encode_picture(pixels, "jpeg", 40), encode_picture(np.zeros_like(pixels), "png", 0)]
    read = lambda path: decode_picture(path.read_bytes())  # noqa: E731
    return _one_file(folder / "0", seeds, containers.picture_changed, read, (DamageError,))


_SAMPLES: dict[str, Any] = {"pa_mpjpe_mm": np.ones(3), "keypoints_2d": np.ones((3, 21, 2))}
_CASES: dict[str, Any] = {"error": np.ones(3), "picture": [b"x", b"", b"y" * 99], "label_2d": np.ones((3, 21, 3))}

PARSERS: dict[str, Callable[[Path], Maker]] = {
    "labels": _labels,
    "checkpoint": _checkpoint,
    "tar": _tar,
    "evaluation-npz": _evaluation_npz,
    "picture": _picture,
    "samples": _table(_SAMPLES),
    "cases": _table(_CASES),
    "stored-picture": _stored_picture,
    "mano-pickle": _hand_model(".pkl", containers.pickle_changed),
    "cache": _cache,
    "manifest": _manifest,
    "pipeline-yaml": _pipeline_yaml,
    "model-config": _model_config,
    "weights": _weights,
    "boxes": _boxes,
    "truth": _truth,
    "mocap": _mocap,
    "wheel": _wheel,
    "student": _student,
    "hand-npz": _hand_model(".npz", containers.zip_changed({".npy": containers.npy_changed})),
    "hand-safetensors": _hand_model(".safetensors", containers.safetensors_changed),
    "training-checkpoint": _training_checkpoint,
    "codec": _codec,
    "events": _events,
    "video": _video,
}
