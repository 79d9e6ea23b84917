"""What a picture's codec costs and what it changes: bytes, speed, PSNR, and how far the teacher's answers move.

    python benchmarks/picture_codecs.py [--quick] [--json FILE]

The 256x256 crops of the training views, lossless, are encoded every way; the demo's teacher looks at the decoded pixels
and at the lossless ones. A cache's teacher and students look at the decoded pixels alike, so the distance of its
answers says how much of the picture is lost, not that they disagree. The hands are synthesised here and, where
../shared/data/real-hands is there, also those of its photographs (whose crops have been through a JPEG before).
Speeds are those of one thread; the ways take turns and the best turn counts.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from models.teacher import load_teacher
from stages.answers import Forward, run_padded
from stages.config import HamerTarDataset, SynthesiseConfig, SynthesiseSet
from stages.ingest import scan_source
from stages.preparation import ShardJob, TeachSettings, prepared_batches
from stages.synthesise import run_unit, synthesise_units
from stages.teach import teacher_forward
from storage.config import CacheConfig, FeaturesConfig, PicturesConfig
from storage.encodings import decode_picture, encode_picture

ROOT = Path(__file__).resolve().parents[1]
TEACHER = ROOT / "models/assets/demo_teacher/checkpoints/hamer.ckpt"
REAL_HANDS = ROOT.parent / "shared/data/real-hands"
BATCH = 16
GRID = "8x8-paper"

Pictures = NDArray[np.uint8]


def demo_teacher() -> Forward:
    """The demo's own teacher: small, trained, of HaMeR's architecture (192 channels)."""
    return teacher_forward(load_teacher(TEACHER, "open-hand", "cpu", "fp32"), "cpu")


def synthesised_views(hands: int, seed: int, views: int) -> Pictures:
    """Lossless crops (n,256,256,3) of rendered hands: the plain view of each and augmented ones."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        dataset = HamerTarDataset(format="hamer_tar", path="hands.tar")
        config = SynthesiseConfig(sets={"hands": SynthesiseSet(hands=hands, seed=seed)})
        for unit in synthesise_units(config, {"hands": dataset}, base):
            run_unit(unit)
        return _views_of("hands", dataset, base / "hands.tar", base, views)


def real_views(views: int) -> Pictures | None:
    """The same of the hands in real photographs; None where they are not there."""
    tars = sorted(REAL_HANDS.glob("*/*.tar"))
    found = [
        _views_of(tar.parent.name, HamerTarDataset(format="hamer_tar", path=str(tar)), tar, ROOT, views) for tar in tars
    ]
    return np.concatenate(found) if found else None


def _views_of(name: str, dataset: HamerTarDataset, tar: Path, base: Path, views: int) -> Pictures:
    table = scan_source(name, dataset, tar, base)
    table = table.filter(table["reason"].is_null())
    cache = CacheConfig(views=views, pictures=PicturesConfig(codec="png"), features=FeaturesConfig(grid=GRID))
    job = ShardJob(name, name, table, TeachSettings.of("train", cache, BATCH, 0), base, base)
    return np.concatenate([batch.pictures for batch in prepared_batches(job) if batch.views])


def answers(forward: Forward, pictures: Pictures) -> dict[str, NDArray[np.float32]]:
    """The teacher's answers to all pictures."""
    batches = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    found = [run_padded(forward, batch, GRID, BATCH) for batch in batches]
    return {name: np.concatenate([outputs[name] for outputs in found]) for name in found[0]}


@dataclass(frozen=True)
class Way:
    """One way to make bytes of a picture, and pixels of them again."""

    name: str
    encode: Callable[[Pictures], bytes]
    decode: Callable[[bytes], Pictures]


def ways() -> list[Way]:
    found = [Way("png", lambda picture: encode_picture(picture, "png", 0), decode_picture)]
    for quality in (75, 85, 90, 95):
        for sampling in ("420", "444"):
            found.append(Way(f"jpeg {quality} {sampling}", _jpeg(quality, sampling), decode_picture))
    found += [Way(f"webp {quality}", _webp(quality=quality), _from_webp) for quality in (75, 90)]
    return [*found, Way("webp lossless", _webp(lossless=True), _from_webp)]


def _jpeg(quality: int, sampling: str) -> Callable[[Pictures], bytes]:
    if sampling == "420":  # as the cache stores it
        return lambda picture: encode_picture(picture, "jpeg", quality)
    options: dict[str, Any] = {"quality": quality, "colorspace": "RGB", "colorsubsampling": sampling, "fastdct": False}
    return lambda picture: bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(picture), **options))


def _webp(**options: Any) -> Callable[[Pictures], bytes]:
    def encode(picture: Pictures) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="WEBP", **options)
        return buffer.getvalue()

    return encode


def _from_webp(data: bytes) -> Pictures:
    return np.asarray(Image.open(io.BytesIO(data), formats=["WEBP"]).convert("RGB"))


def speeds(kinds: list[Way], pictures: Pictures, turns: int) -> dict[str, tuple[float, float]]:
    """(encoded, decoded) pictures a second of each way."""
    best = {way.name: (0.0, 0.0) for way in kinds}
    for _ in range(turns):
        for way in kinds:
            started = time.perf_counter()
            encoded = [way.encode(picture) for picture in pictures]
            middle = time.perf_counter()
            for data in encoded:
                way.decode(data)
            rates = len(pictures) / (middle - started), len(pictures) / (time.perf_counter() - middle)
            best[way.name] = max(best[way.name][0], rates[0]), max(best[way.name][1], rates[1])
    return best


def measure(kinds: list[Way], pictures: Pictures, forward: Forward) -> list[tuple[str, float, str]]:
    """Of each way: bytes, PSNR, and the distance of the teacher's answers from those to lossless pixels."""
    wanted = answers(forward, pictures)
    rows: list[tuple[str, float, str]] = []
    for way in kinds:
        encoded = [way.encode(picture) for picture in pictures]
        decoded = np.stack([way.decode(data) for data in encoded])
        found = answers(forward, decoded)
        error = float(np.square(decoded.astype(np.float32) - pictures).mean())
        rows += [
            (way.name, float(np.mean([len(data) for data in encoded])), "bytes a picture"),
            (way.name, 10 * float(np.log10(255**2 / error)) if error else float("inf"), "dB PSNR"),
            (way.name, _relative(found["features"], wanted["features"]), "relative change of features"),
            (way.name, _joints_mm(found["keypoints_3d"], wanted["keypoints_3d"]), "mm, mean change of joints"),
        ]
    return rows


def _relative(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def _joints_mm(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """From the wrist."""
    apart = (found - found[:, :1]) - (wanted - wanted[:, :1])
    return 1000 * float(np.linalg.norm(apart, axis=-1).mean())


def report(quick: bool) -> dict[str, Any]:
    """Measure, and say it in the layout that all benchmarks share."""
    kinds, forward = ways(), demo_teacher()
    sets = {"synthesised": synthesised_views(16 if quick else 100, seed=12, views=2)}
    real = real_views(1 if quick else 3)
    if real is not None:
        sets["real"] = real
    rows = [
        (f"{name}, {way}", value, unit)
        for name, pictures in sets.items()
        for way, value, unit in measure(kinds, pictures, forward)
    ]
    for way, (encode, decode) in speeds(kinds, sets["synthesised"][:50], turns=1 if quick else 3).items():
        rows += [(f"{way}, encode", encode, "pictures/s"), (f"{way}, decode", decode, "pictures/s")]
    values = {(what, unit): value for what, value, unit in rows}
    of = [values[f"synthesised, {way}", "bytes a picture"] for way in ("jpeg 95 420", "jpeg 85 420", "png")]
    pictures = ", ".join(f"{len(views)} {name}" for name, views in sets.items())
    return {
        "name": "picture_codecs",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread; pictures: {pictures}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rows": [{"what": what, "value": round(value, 5), "unit": unit} for what, value, unit in rows if value < 1e9],
        "ratios": {
            "jpeg_95_over_85_bytes": round(of[0] / of[1], 3),
            "png_over_jpeg_95_bytes": round(of[2] / of[0], 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = json.dumps(report(arguments.quick), indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
