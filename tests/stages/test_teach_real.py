"""Real photographs, real labels, HaMeR's network (small): what is cached is what the teacher says live."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from models.preprocessing import normalise
from models.teacher import Teacher, load_teacher
from stages.config import HamerTarDataset
from stages.ingest import scan_source
from stages.pictures import decode
from stages.preparation import read_photo
from stages.replay import compare, remake, stored_view
from stages.teach import ShardJob, TeachSettings, numerics, prepared_batches, recheck_rows, teach_shard, teacher_forward
from storage.cache import CacheFolder, CacheReader, open_cache
from storage.config import CacheConfig, FeatureGrid, FeaturesConfig, PicturesConfig
from storage.encodings import to_grid
from storage.manifest import shards_of
from storage.snapshots import build_snapshot, publish_snapshot, write_head
from storage.verification import verify_folder, verify_shard
from tests.shared import SHARED, needs_shared
from tests.tiny_networks import write_tiny_teacher

NAMES = ("cocow-real", "freihand-real", "interhand26m-real")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    checkpoint, hand = write_tiny_teacher(tmp_path_factory.mktemp("teacher"))
    return load_teacher(checkpoint, hand)


def teach_set(name: str, folder: Path, teacher: Teacher) -> CacheFolder:
    config = HamerTarDataset(format="hamer_tar", path="000000.tar")
    base = SHARED / "data" / "real-hands" / name
    table = scan_source(name, config, base / "000000.tar", base)
    cache = CacheConfig(views=2, features=FeaturesConfig(grid="full", encoding="float16"), samples_per_shard=5)
    settings = TeachSettings.of("train", cache, 4, 0)
    identity = {"teacher": {"batch_size": 4}, "features": {"grid": "full", "encoding": "float16"}}
    made = CacheFolder.create(folder, identity)
    plans = shards_of(table, "train", cache.samples_per_shard)
    for plan in plans:
        job = ShardJob(name, plan.input_hash, table.take(pa.array(plan.rows)), settings, made.root, base)
        teach_shard(job, prepared_batches(job), teacher_forward(teacher), numerics("cpu"))
    digest = publish_snapshot(made.root, made.fingerprint, name, build_snapshot(table, plans, made.finished()))
    write_head(made.root, {name: digest})
    return made


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_real_hands_are_cached_whole_and_right(name: str, tmp_path: Path, teacher: Teacher) -> None:
    cache = teach_set(name, tmp_path, teacher)
    assert verify_folder(cache) == []
    records = cache.finished().values()
    assert [damage for record in records for damage in verify_shard(cache, record)] == []
    assert sum(len(record.quarantined) for record in records) == 0
    reader = open_cache(cache.root)
    assert len(reader) == sum(record.samples_in for record in records) > 0
    check_live(reader, teacher)
    check_replay(reader, name)
    assert (
        max(check.max_rel_error for check in recheck_rows(reader, range(len(reader)), teacher_forward(teacher))) < 1e-5
    )
    visible = reader.read(range(len(reader)), [0] * len(reader))["labels/keypoints_2d"]
    inside = np.abs(visible[..., :2]).max(axis=-1)[visible[..., 2] > 0] <= 0.5
    assert inside.mean() > 0.9  # the plain crop holds the hand that it was cut for


def check_replay(reader: CacheReader, name: str) -> None:
    """Every view made again from its photograph and parameters is the stored one, to the bit."""
    base = SHARED / "data" / "real-hands" / name
    config = HamerTarDataset(format="hamer_tar", path="000000.tar")
    rows = {row["sample_id"]: row for row in scan_source(name, config, base / "000000.tar", base).to_pylist()}
    for position, sample_id in enumerate(reader.ids):
        row = rows[sample_id]
        photo = decode(read_photo(row, base))
        assert photo is not None
        for view in range(reader.n_views):
            stored = stored_view(reader, position, view)
            found = compare(stored, remake(stored, row, photo, "train", PicturesConfig()), same_libraries=True)
            assert (found.differences, found.identical_picture, found.max_label_difference) == ((), True, 0)


def check_live(reader: CacheReader, teacher: Teacher) -> None:
    """The stored pictures through the network, one at a time, give the stored answers."""
    for position in range(0, len(reader), 3):
        sample = reader[position]
        with torch.no_grad():
            said = teacher(normalise(torch.from_numpy(sample["pictures"][1:2])))
        features = said["features"][0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(sample["teacher/features"][1], features, rtol=1e-3, atol=1e-3)
        for output in ("cam", "betas", "hand_pose", "keypoints_3d", "keypoints_2d"):
            np.testing.assert_allclose(sample[f"teacher/{output}"][1], said[output][0].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", ["full", "8x8-paper", "8x6-geometric"])
def test_the_grid_on_the_device_is_the_one_in_numpy_bit_for_bit(grid: FeatureGrid, teacher: Teacher) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    forward = teacher_forward(teacher)
    np.testing.assert_array_equal(
        forward(pictures, grid)["features"], to_grid(forward(pictures, "full")["features"], grid)
    )
