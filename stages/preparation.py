"""From a shard's rows of the manifest to batches of the exact pictures that the teacher is to see.

Pixels come straight from the tar, by offset. Each picture's bytes are hashed on the way: what the manifest promised is
what is taught, or the work stops. A photograph is decoded once for all its views. The picture a view keeps is encoded
and decoded again before anyone sees it, so that teacher and students look at the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from models.crops import (
    IDENTITY,
    STUDENT_BOX,
    Augmentation,
    BoxRule,
    Crop,
    HandLabels,
    boxes_for,
    crop,
    draw_augmentation,
    move_labels,
    view_rng,
)
from stages.pictures import decode
from stages.sources import SourceChangedError, SourceMissingError
from storage.config import CacheConfig, FeaturesConfig, PicturesConfig
from storage.durable import sha256_bytes
from storage.encodings import decode_picture, encode_picture
from storage.errors import InputError
from storage.inputs import bring, is_copy
from storage.ledger import Quarantined
from storage.manifest import Role
from storage.mirror import Mirror

EVALUATION_VIEWS = 2
"""Of an evaluation sample: view 0 in the students' box, view 1 in the teacher's own, wider one."""

STUDENT_VIEW, TEACHER_VIEW = 0, 1

Row = Mapping[str, Any]
Values = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class TeachSettings:
    """All that decides what is made of a sample, beside the teacher itself."""

    role: Role
    views: int
    augmentation: Literal["hamer", "none"]
    seed: int
    pictures: PicturesConfig
    features: FeaturesConfig
    batch_size: int

    @staticmethod
    def of(role: Role, cache: CacheConfig, batch_size: int, seed: int) -> TeachSettings:
        """The settings of one role: evaluation sets have their two boxes and are never augmented."""
        train = role == "train"
        return TeachSettings(
            role=role,
            views=cache.views if train else EVALUATION_VIEWS,
            augmentation=cache.augmentation if train and cache.views > 1 else "none",
            seed=seed if train and cache.views > 1 and cache.augmentation != "none" else 0,
            pictures=cache.pictures,
            features=cache.features,
            batch_size=batch_size,
        )


@dataclass(frozen=True, eq=False)
class ShardJob:
    """One shard to be taught; small enough to send to another process."""

    dataset: str
    input_hash: str
    rows: pa.Table
    """The shard's rows of the manifest (all columns), in order."""
    settings: TeachSettings
    cache_root: Path
    base: Path
    """Relative sources start here: the configuration file's folder."""
    events: Path | None = None
    """A file that gets one line of JSON when the shard is begun and one when it is committed; no output."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """What these lines say besides: which run and stage, where."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Samples that are not to be touched, because whoever does dies of it; sample id -> reason."""
    store: Mirror | None = None
    """Of a workdir on an object store: where the shard goes. `cache_root` is then in this machine's copy."""

    @property
    def sample_ids(self) -> list[str]:
        ids: list[str] = self.rows["sample_id"].to_pylist()
        return ids


@dataclass(frozen=True, eq=False)
class PreparedView:
    """One view of one sample, ready for the teacher."""

    sample_id: str
    view: int
    encoded: bytes
    per_view: Values
    """Moved labels and view parameters, by array path, without the view axis."""
    per_sample: Values
    """What a sample has once, by array path; the same in all its views."""


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """At most `batch_size` views; a sample's views may go on in the next batch, never in another shard."""

    pictures: NDArray[np.uint8]
    """(m,256,256,3) RGB, as decoded from the stored bytes."""
    views: tuple[PreparedView, ...]
    quarantined: tuple[Quarantined, ...] = ()
    """Samples found unusable since the last batch."""


def prepared_batches(job: ShardJob) -> Iterator[PreparedBatch]:
    """The job's views in order, in batches; the last one may be short, or hold quarantined samples only.

    Raises:
        InputError: a source is missing or has changed since it was ingested.
    """
    views: list[PreparedView] = []
    pictures: list[NDArray[np.uint8]] = []
    quarantined: list[Quarantined] = []
    for sample in _samples(job):
        if isinstance(sample, Quarantined):
            quarantined.append(sample)
            continue
        for view in sample:
            views.append(view)
            pictures.append(decode_picture(view.encoded))
            if len(views) == job.settings.batch_size:
                yield PreparedBatch(np.stack(pictures), tuple(views), tuple(quarantined))
                views, pictures, quarantined = [], [], []
    if views or quarantined:
        stacked = np.stack(pictures) if pictures else np.empty((0, 256, 256, 3), np.uint8)
        yield PreparedBatch(stacked, tuple(views), tuple(quarantined))


def _samples(job: ShardJob) -> Iterator[Iterator[PreparedView] | Quarantined]:
    truth = TruthShape.of(job)
    last_place: tuple[Any, ...] = ()
    photo: NDArray[np.uint8] | None = None
    for row in job.rows.to_pylist():
        if row["sample_id"] in job.left_out:
            yield Quarantined(row["sample_id"], job.left_out[row["sample_id"]])
            continue
        place = (row["source"], row["image_path"], row["image_offset"])
        if place != last_place:  # hands of one photograph follow each other
            last_place, photo = place, decode(read_photo(row, job.base))
        if photo is None:
            yield Quarantined(row["sample_id"], f"undecodable-picture: {row['image_name']}")
        else:
            yield prepared_views(row, photo, job.settings, truth)


def photo_file(row: Row, base: Path) -> Path:
    """The file that holds the photograph of a manifest row: the tar, or the picture itself."""
    return base / str(row["source"] if row["image_offset"] >= 0 else row["image_path"])


def read_photo(row: Row, base: Path) -> bytes:
    """The encoded photograph of a manifest row.

    Raises:
        SourceMissingError: there is no such file, or it cannot be read.
        SourceChangedError: its bytes are not those that were ingested.
    """
    path = photo_file(row, base)
    data = _read_part(row, path, fresh=False)
    if sha256_bytes(data) != row["image_sha256"] and is_copy(path):
        data = _read_part(row, path, fresh=True)  # this machine's copy may be older than what was ingested
    if sha256_bytes(data) != row["image_sha256"]:
        raise SourceChangedError(
            f"{path}: the picture {row['image_name']} has changed since it was ingested; "
            "leave the sources alone while handstill runs, then run again"
        )
    return data


def _read_part(row: Row, path: Path, *, fresh: bool) -> bytes:
    bring(path, fresh=fresh)
    in_tar = row["image_offset"] >= 0
    try:
        with path.open("rb") as file:
            if in_tar:
                file.seek(row["image_offset"])
            data: bytes = file.read(row["image_length"]) if in_tar else file.read()
    except OSError as error:
        raise SourceMissingError(
            f"{path} cannot be read ({error.strerror}); bring it back, or take it out of datasets"
        ) from None
    return data


@dataclass(frozen=True)
class TruthShape:
    """What 3D truth of its authors a shard stores: all its samples alike, zeros where one has none."""

    joints: bool
    vertices: int

    @staticmethod
    def of(job: ShardJob) -> TruthShape:
        """Training shards store none. InputError when meshes of different sizes meet in one shard."""
        if job.settings.role != "evaluate":
            return TruthShape(joints=False, vertices=0)
        lengths = set(pc.list_value_length(job.rows["truth_vertices"]).drop_null().to_pylist())
        if len(lengths) > 1:
            sizes = sorted(length // 3 for length in lengths)
            raise InputError(f"{job.dataset}: truth_verts holds meshes of {sizes} vertices; wanted one size")
        return TruthShape(
            joints=job.rows["truth_xyz"].null_count < job.rows.num_rows, vertices=max(lengths, default=0) // 3
        )

    def values(self, row: Row) -> Values:
        """The truth of one sample, by array path."""
        missing = (self.joints and row["truth_xyz"] is None) or (self.vertices and row["truth_vertices"] is None)
        values: Values = {}
        if self.joints:
            values["labels/truth_xyz"] = _points(row["truth_xyz"], 21)
        if self.vertices:
            values["labels/truth_vertices"] = _points(row["truth_vertices"], self.vertices)
        return values | {"labels/has_truth": np.array(0 if missing else 1, np.float32)} if values else values


def _points(flat: Sequence[float] | None, count: int) -> NDArray[np.float32]:
    return np.zeros((count, 3), np.float32) if flat is None else np.array(flat, np.float32).reshape(count, 3)


def prepared_views(
    row: Row, photo: NDArray[np.uint8], settings: TeachSettings, truth: TruthShape
) -> Iterator[PreparedView]:
    """The views of one hand, one at a time."""
    labels = source_labels(row)
    once = per_sample(row) | truth.values(row)
    for view in range(settings.views):
        augmentation = _augmentation(row, view, settings)
        side_px = box_rule(settings.role, row, view).side_px(row["scale"])
        cut = crop(photo, row["center"], side_px, row["right"], augmentation)
        encoded, values = seen(cut, labels, augmentation, settings.pictures)
        yield PreparedView(row["sample_id"], view, encoded, values, once)


def seen(cut: Crop, labels: HandLabels, augmentation: Augmentation, pictures: PicturesConfig) -> tuple[bytes, Values]:
    """What is stored of a cut-out view: its encoded picture; by array path, its moved labels and its parameters."""
    encoded = encode_picture(cut.picture, pictures.codec, pictures.quality)
    return encoded, _view_labels(move_labels(labels, cut, augmentation)) | _view_parameters(cut, augmentation)


def box_rule(role: Role, row: Row, view: int) -> BoxRule:
    """How the box of a view follows from the annotated one."""
    if role == "train":
        return STUDENT_BOX
    protocol = cast(Literal["freihand", "ho3d", "hint"] | None, row["protocol"] or None)
    return boxes_for(protocol)[view]


def _augmentation(row: Row, view: int, settings: TeachSettings) -> Augmentation:
    if view == 0 or settings.augmentation == "none":  # evaluation sets always have none
        return IDENTITY
    return draw_augmentation(view_rng(settings.seed, row["sample_id"], view))


def source_labels(row: Row) -> HandLabels:
    """The labels of a manifest row, in the photograph."""
    pose = np.array(row["hand_pose"], np.float32)
    return HandLabels(
        keypoints_2d=np.array(row["keypoints_2d"], np.float32).reshape(21, 3),
        keypoints_3d=np.array(row["keypoints_3d"], np.float32).reshape(21, 4),
        global_orient=pose[:3],
        hand_pose=pose[3:],
        betas=np.array(row["betas"], np.float32),
    )


def _view_labels(labels: HandLabels) -> Values:
    return {
        "labels/keypoints_2d": np.asarray(labels.keypoints_2d, np.float32),
        "labels/keypoints_3d": np.asarray(labels.keypoints_3d, np.float32),
        "labels/global_orient": np.asarray(labels.global_orient, np.float32),
        "labels/hand_pose": np.asarray(labels.hand_pose, np.float32),
        "labels/betas": np.asarray(labels.betas, np.float32),
    }


def _view_parameters(cut: Crop, augmentation: Augmentation) -> Values:
    return {
        "views/scale": np.array(augmentation.scale, np.float64),
        "views/rotation_deg": np.array(augmentation.rotation_deg, np.float64),
        "views/translation": np.array(augmentation.translation, np.float64),
        "views/colour": np.array(augmentation.colour, np.float64),
        "views/flip": np.array(cut.mirrored, np.bool_),
        "views/center": np.asarray(cut.center, np.float64),
        "views/box_px": np.array(cut.box_px, np.float64),
        "views/affine": np.asarray(cut.affine, np.float64),
    }


def per_sample(row: Row) -> Values:
    """What is stored once a sample, whatever the view; by array path."""
    return {
        "labels/has_hand_pose": np.array(row["has_hand_pose"], np.float32),
        "labels/has_betas": np.array(row["has_betas"], np.float32),
        "labels/right": np.array(row["right"], np.float32),
        "labels/box_size": np.array(row["scale"], np.float64) * 200,  # HaMeR keeps boxes in units of 200 px
        "labels/image_size": np.array([row["width"], row["height"]], np.int64),
    }
