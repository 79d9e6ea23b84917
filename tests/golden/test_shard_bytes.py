"""What is written for a fixed input and a fixed teacher, byte for byte, so that it changes only with a version.

Shards on disk are told apart by their identity. If our code began to write other bytes under the same identity, caches
would mix two kinds of answers and no check would see it. These tests see it:

- `test_shards_are_those_of_their_version`: encodings, layout, record, input hash and fingerprint. Pictures are taken as
  they come and the teacher is made of integers, so that every machine must give these bytes.
- `test_crops_and_pictures_are_those_of_their_version`: from a photograph to crops and JPEG bytes, which are OpenCV's
  and libjpeg-turbo's; held where both have the versions of constraints.txt.

When a change is meant, raise TEACH_VERSION (answers), PREPROCESSING_VERSION (crops and labels) or FORMAT_VERSION
(layout), then renew the pinned digests: `python -m tests.golden.test_shard_bytes`. It refuses where bytes changed under
the same identity.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.crops import PREPROCESSING_VERSION
from stages.preparation import (
    PreparedBatch,
    PreparedView,
    ShardJob,
    TeachSettings,
    TruthShape,
    prepared_views,
)
from stages.teach import TEACH_VERSION, teach_identity, teach_shard
from storage import layout
from storage.cache import CacheFolder
from storage.config import CacheConfig, FeaturesConfig, PicturesConfig
from storage.ledger import Quarantined
from storage.manifest import manifest_table, shards_of

PINNED = Path(__file__).with_name("shard_bytes.json")
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
RENEW = "python -m tests.golden.test_shard_bytes"
VERSIONS = {
    "FORMAT_VERSION": layout.FORMAT_VERSION,
    "PREPROCESSING_VERSION": PREPROCESSING_VERSION,
    "TEACH_VERSION": TEACH_VERSION,
}
SAMPLES, VIEWS, BATCH_SIZE, CHANNELS = 5, 2, 4, 16
LEFT_OUT = 3
"""The sample whose features are no numbers."""
CASES = {
    "int8": FeaturesConfig(grid="8x8-paper", encoding="int8"),
    "float16": FeaturesConfig(grid="full", encoding="float16"),
    "geometric": FeaturesConfig(grid="8x6-geometric", encoding="int8"),
}
DECIDING = ("opencv-python-headless", "simplejpeg", "numpy")
"""The packages that decide a crop's pixels and its JPEG bytes."""


def integers(*shape: int, step: int = 7, modulus: int = 251) -> NDArray[np.float32]:
    """Numbers between -2 and 2 that float32 holds exactly: multiples of 1/64 that follow from integers alone."""
    values = np.arange(int(np.prod(shape)), dtype=np.int64) * step % modulus - modulus // 2
    return (values.reshape(shape) / 64).astype(np.float32)


def teacher(pictures: NDArray[np.uint8], grid: str) -> Mapping[str, NDArray[Any]]:
    """Answers that follow from a picture's first pixel, in exact arithmetic; 255 makes features that are no numbers."""
    assert pictures.shape == (BATCH_SIZE, 256, 256, 3)
    height, width = {"full": (16, 12), "8x8-paper": (8, 8), "8x6-geometric": (8, 6)}[grid]
    seen = pictures[:, 0, 0, 0].astype(np.float32)

    def answer(*shape: int) -> NDArray[np.float32]:
        return integers(*shape)[None] + (seen / 64).reshape(-1, *[1] * len(shape))

    features = answer(height, width, CHANNELS)
    features[seen == 255] = np.nan
    return {
        "features": features,
        "global_orient": answer(1, 3, 3),
        "hand_pose": answer(15, 3, 3),
        "betas": answer(10),
        "cam": answer(3),
        "keypoints_2d": answer(21, 2),
        "keypoints_3d": answer(21, 3),
    }


def settings(features: FeaturesConfig, codec: str = "png") -> TeachSettings:
    pictures = PicturesConfig.model_validate({"codec": codec})
    return TeachSettings.of("train", CacheConfig(views=VIEWS, pictures=pictures, features=features), BATCH_SIZE, seed=3)


def rows() -> pa.Table:
    """A manifest of five hands; every number a plain one."""
    return manifest_table([row(number) for number in range(SAMPLES)])


def row(number: int) -> dict[str, Any]:
    return {
        "sample_id": f"golden:{number:06d}#0",
        "dataset": "golden",
        "source": "golden.tar",
        "source_sha256": "0" * 64,
        "key": f"{number:06d}",
        "hand": 0,
        "ordinal": number,
        "image_name": f"{number:06d}.png",
        "image_path": None,
        "image_offset": 512,
        "image_length": 100,
        "image_sha256": f"{number:064x}",
        "width": 160,
        "height": 120,
        "center": [80.0 + number, 60.0],
        "scale": [0.25, 0.375],
        "right": float(number % 2),
        "keypoints_2d": integers(21, 3).ravel() * 16 + 80,
        "keypoints_3d": integers(21, 4).ravel(),
        "hand_pose": integers(48),
        "betas": integers(10),
        "has_hand_pose": 1.0,
        "has_betas": float(number % 2),
        "protocol": "",
        "truth_xyz": None,
        "truth_vertices": None,
        "reason": None,
    }


def batches(job: ShardJob) -> Iterator[PreparedBatch]:
    """The job's views as if they were prepared: integers for labels, text for the encoded pictures."""
    views: list[PreparedView] = []
    for number, name in enumerate(job.sample_ids):
        views += [view_of(name, number, view) for view in range(VIEWS)]
    bad = Quarantined("golden:000004#0", "undecodable-picture: 000004.png")
    views = [view for view in views if view.sample_id != bad.sample_id]
    for start in range(0, len(views), BATCH_SIZE):
        some = tuple(views[start : start + BATCH_SIZE])
        pictures = np.zeros((len(some), 256, 256, 3), np.uint8)
        for item, view in enumerate(some):
            number = int(view.sample_id[7:13])
            pictures[item] = 255 if number == LEFT_OUT else 16 * number + view.view
        yield PreparedBatch(pictures, some, (bad,) if start == 0 else ())


def view_of(name: str, number: int, view: int) -> PreparedView:
    def values(path: str, *shape: int) -> NDArray[Any]:
        dtype = layout.BY_PATH[path].dtypes[0]
        return (integers(*shape) + number + view).astype(dtype)

    shapes: dict[str, tuple[int, ...]] = {
        "labels/keypoints_2d": (21, 3),
        "labels/keypoints_3d": (21, 4),
        "labels/global_orient": (3,),
        "labels/hand_pose": (45,),
        "labels/betas": (10,),
        "views/scale": (),
        "views/rotation_deg": (),
        "views/translation": (2,),
        "views/colour": (3,),
        "views/flip": (),
        "views/center": (2,),
        "views/box_px": (),
        "views/affine": (2, 3),
    }
    once: dict[str, tuple[int, ...]] = {
        "labels/has_hand_pose": (),
        "labels/has_betas": (),
        "labels/right": (),
        "labels/box_size": (2,),
        "labels/image_size": (2,),
    }
    return PreparedView(
        name,
        view,
        f"the picture of {name} in view {view}".encode(),
        {path: values(path, *shape) for path, shape in shapes.items()},
        {path: (integers(*shape) + number).astype(layout.BY_PATH[path].dtypes[0]) for path, shape in once.items()},
    )


def shard_digests(folder: Path, features: FeaturesConfig) -> dict[str, str]:
    """The digests of everything that one shard leaves: its files, its record; and the names it has."""
    use = settings(features)
    identity = teach_identity(
        use,
        checkpoint_sha256="ab" * 32,
        model_config={"MODEL": {"BACKBONE": {"EMBED_DIM": CHANNELS}}, "FOCAL_LENGTH": 5000},
        hand_model_sha256="cd" * 32,
        precision="fp32",
    )
    cache = CacheFolder.create(folder, identity)
    (plan,) = shards_of(rows(), "train", 512)
    job = ShardJob("golden", plan.input_hash, rows(), use, cache.root, folder)
    teach_shard(job, batches(job), teacher, {"device": "none"})
    files = [path for path in sorted(cache.root.rglob("*")) if path.is_file() and path.name != "cache.json"]
    named = {str(path.relative_to(cache.root)).replace(plan.input_hash, "<input hash>"): path for path in files}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in named.items()}
    return {"fingerprint": cache.fingerprint, "input hash": plan.input_hash, **digests}


def view_digests() -> dict[str, str]:
    """The digests of crops, of their JPEG bytes and of the labels moved with them, from a photograph drawn here."""
    across, down = np.meshgrid(np.arange(160), np.arange(120))
    photo = np.stack([across, down * 2, (across * down) % 256], axis=-1).astype(np.uint8)
    photo[40:80, 60:100] = 255 - photo[40:80, 60:100]
    found = {}
    for sample in rows().to_pylist():
        for codec in ("png", "jpeg"):
            use = settings(CASES["int8"], codec)
            for view in prepared_views(sample, photo, use, TruthShape(joints=False, vertices=0)):
                name = f"{sample['sample_id']} view {view.view}"
                if codec == "jpeg":
                    found[f"{name} jpeg"] = hashlib.sha256(view.encoded).hexdigest()
                    continue
                pixels = np.asarray(Image.open(io.BytesIO(view.encoded)))  # zlib's bytes are nobody's business
                found[f"{name} pixels"] = hashlib.sha256(pixels.tobytes()).hexdigest()
                values = [np.asarray(view.per_view[path], np.float64) for path in sorted(view.per_view)]
                rounded = b"".join((np.round(value, 4) + 0.0).tobytes() for value in values)  # + 0.0: no -0.0
                found[f"{name} values"] = hashlib.sha256(rounded).hexdigest()
    return found


def measured(folder: Path) -> dict[str, Any]:
    return {
        "versions": VERSIONS,
        "shards": {name: shard_digests(folder / name, features) for name, features in CASES.items()},
    }


def changed(pinned: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    return sorted(name for name in pinned.keys() | found.keys() if pinned.get(name) != found.get(name))


@pytest.mark.parametrize("case", CASES)
def test_shards_are_those_of_their_version(case: str, tmp_path: Path) -> None:
    pinned = json.loads(PINNED.read_text())
    found = changed(pinned["shards"][case], shard_digests(tmp_path, CASES[case]))
    assert not found, (
        f"{', '.join(found)}: not what version {pinned['versions']} wrote. Caches on disk would mix two kinds. If that "
        f"is meant, raise TEACH_VERSION or FORMAT_VERSION and renew with `{RENEW}`; else mend what changed."
    )
    assert pinned["versions"] == VERSIONS, f"a version was raised: renew with `{RENEW}`"


def test_crops_and_pictures_are_those_of_their_version() -> None:
    pinned = json.loads(PINNED.read_text())["views"]
    for package in DECIDING:
        wanted, there = constrained(package), importlib.metadata.version(package)
        if there != wanted:
            pytest.skip(f"{package} is {there}; the digests are pinned for {wanted} (constraints.txt)")
    if platform.machine() != "x86_64":
        pytest.skip(f"this is {platform.machine()}; the digests are pinned for x86_64")
    found = changed(pinned, view_digests())
    assert not found, (
        f"{', '.join(found)}: not what PREPROCESSING_VERSION {PREPROCESSING_VERSION} made. If that is meant, raise it "
        f"and renew with `{RENEW}`; if a package was moved, that is a change of crops too."
    )


def constrained(package: str) -> str:
    found = re.search(rf"^{re.escape(package)}==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE)
    assert found is not None, f"{package} is not in constraints.txt"
    return found.group(1)


def test_shards_hold_both_kinds_of_quarantine(tmp_path: Path) -> None:
    """What is pinned is not an empty shell: three samples stored, one left out by its picture, one by its answer."""
    shard_digests(tmp_path, CASES["int8"])
    (root,) = tmp_path.iterdir()
    (record,) = CacheFolder(root).finished().values()
    assert record.rows == SAMPLES - 2
    assert [sample.reason.split(":")[0] for sample in record.quarantined] == ["not-finite", "undecodable-picture"]


def renew() -> int:
    """Write the digests of today; refused where they changed and neither a version nor the identity did."""
    with tempfile.TemporaryDirectory() as folder:
        document = measured(Path(folder)) | {"views": view_digests()}
    if PINNED.is_file():
        pinned = json.loads(PINNED.read_text())
        other = [
            name
            for name, case in document["shards"].items()
            if (before := pinned["shards"].get(name, {})).get("fingerprint") == case["fingerprint"] and before != case
        ]
        other += changed(pinned["views"], document["views"])
        if other and pinned["versions"] == VERSIONS:
            sys.stderr.write(f"{', '.join(other)} changed, but no version did. Raise one of {', '.join(VERSIONS)}.\n")
            return 1
    PINNED.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(renew())
