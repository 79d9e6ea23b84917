"""The whole pipeline on real photographs with a full-size ViT-H checkpoint in the official Lightning layout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from storage.cache import open_cache
from storage.identity import stored_identity
from tests.shared import REFERENCE, SHARED, needs_shared

pytestmark = [needs_shared, pytest.mark.timeout(1800)]

HANDS = {"freihand-real": 8, "cocow-real": 10, "interhand26m-real": 6}


def handstill(config: Path, *arguments: str) -> dict[str, Any]:
    """Run a command as a user would; its JSON document."""
    command = [sys.executable, "-m", "pipeline.cli", "-c", str(config), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """real-hands.yaml with its checkpoint (2.7 GB) and its workdir in a folder of the test's own."""
    folder = tmp_path_factory.mktemp("real-hands")
    hamer = folder / "hamer"
    subprocess.run([sys.executable, str(REFERENCE / "make_checkpoint.py"), str(hamer)], check=True, capture_output=True)
    text = Path(__file__).with_name("real-hands.yaml").read_text()
    places = {
        "../../runs/real-hands/hamer": hamer,
        "../../runs/real-hands/work": folder / "work",
        "../../../shared": SHARED,
    }
    for there, here in places.items():
        assert there in text
        text = text.replace(there, str(here))
    path = folder / "pipeline.yaml"
    path.write_text(text)
    yield path
    shutil.rmtree(folder)


def views_of(cache: Path) -> int:
    """Training sets have the one view of real-hands.yaml; evaluation sets always have two, one for each box."""
    identity = stored_identity(cache)
    assert identity is not None
    return {"train": 1, "evaluate": 2}[identity["role"]]


@pytest.fixture(scope="module")
def taught(config: Path) -> dict[str, Any]:
    return handstill(config, "run", "teach")


@pytest.fixture(scope="module")
def finished(config: Path, taught: dict[str, Any]) -> dict[str, Any]:
    """The rest of the run, after the checkpoint's bytes were destroyed: nothing after `teach` may read them."""
    checkpoint = config.parent / "hamer" / "checkpoints" / "hamer.ckpt"
    before = checkpoint.stat()
    with checkpoint.open("r+b") as file:
        file.write(b"\0" * (1 << 20))
    os.utime(checkpoint, ns=(before.st_atime_ns, before.st_mtime_ns))
    return handstill(config, "run")


def test_every_hand_is_cached_or_quarantined(taught: dict[str, Any], config: Path) -> None:
    ingest, teach = taught["stages"]["ingest"], taught["stages"]["teach"]
    assert ingest["samples_in"] == sum(HANDS.values()) == 24
    assert ingest["samples_in"] == ingest["samples_done"] + ingest["quarantined"]
    assert teach["samples_in"] == 24 + HANDS["interhand26m-real"] + HANDS["cocow-real"]  # two sets have both roles
    assert teach["samples_in"] == teach["samples_done"] + teach["quarantined"]
    for folder in (config.parent / "work" / "cache").iterdir():
        for snapshot in folder.glob("snapshots/*.parquet"):
            table = pq.read_table(snapshot)
            assert len(table) == HANDS[table["dataset"][0].as_py()]
            assert all((shard is None) != (reason is None) for shard, reason in zip(
                table["shard"].to_pylist(), table["reason"].to_pylist(), strict=True
            ))  # fmt: skip


def test_plain_zarr_opens_the_cache(taught: dict[str, Any], config: Path) -> None:
    shards = sorted((config.parent / "work" / "cache").glob("*/shards/*.zarr"))
    assert len(shards) == taught["stages"]["teach"]["done"] == 5
    rows = 0
    for shard in shards:
        group = zarr.open_group(shard, mode="r")
        features = group["teacher/features"]
        views = views_of(shard.parents[1])
        n = features.shape[0]
        rows += n
        assert features.shape == (n, views, 8, 8, 1280)
        assert features.dtype == np.int8
        assert features.metadata.dimension_names == ("sample", "view", "row", "column", "channel")
        shapes = {name: group[f"teacher/{name}"].shape[2:] for name in ("cam", "hand_pose", "keypoints_3d", "betas")}
        assert shapes == {"cam": (3,), "hand_pose": (15, 3, 3), "keypoints_3d": (21, 3), "betas": (10,)}
        assert group["teacher/keypoints_3d"].attrs["unit"] == "m"
        assert group["labels/keypoints_2d"].shape == (n, views, 21, 3)
        rotations = group["teacher/hand_pose"][:].reshape(-1, 3, 3)
        assert np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max() < 1e-5
    assert rows == taught["stages"]["teach"]["samples_done"]


def test_cached_answers_are_the_teachers(taught: dict[str, Any], config: Path) -> None:
    document = handstill(config, "verify")
    assert document["ok"], document
    assert document["rows_rechecked"] == taught["stages"]["teach"]["samples_done"]
    assert document["max_rel_error"] < 1e-4  # the same machine, the same batch size: the same bits
    assert document["rows_replayed"] == document["rows_rechecked"]
    pictures = sum(
        views_of(folder) * len(open_cache(folder)) for folder in (config.parent / "work" / "cache").iterdir()
    )
    assert document["pictures_identical"] == document["pictures_replayed"] == pictures
    assert document["max_label_difference"] == 0


def test_students_train_without_the_teacher(finished: dict[str, Any], config: Path) -> None:
    assert finished["stages"]["teach"]["done"] == 0
    assert finished["stages"]["train"]["done"] == 2
    events = [json.loads(line) for line in (config.parent / "work/logs/events.jsonl").read_text().splitlines()]
    assert [event["teacher_imported"] for event in events if event["event"] == "train_done"] == [False, False]
    for student in (config.parent / "work" / "students").glob("*/seed-0/*/student"):
        assert sum(file.stat().st_size for file in student.iterdir()) < 30e6


def test_comparison_comes_out(finished: dict[str, Any], config: Path) -> None:
    document = handstill(config, "compare")
    assert [student["name"] for student in document["students"]] == ["mobilenetv3-hybrid", "mobilenetv3-none"]
    assert document["teacher"]["params_m"] == pytest.approx(670.4, abs=0.5)
    for scored in (document["teacher"], *document["students"]):
        assert scored["metrics"]["interhand26m-real"]["pa_mpjpe_mm"] > 0
        assert 0 <= scored["metrics"]["cocow-real"]["pck_15"] <= 1
        assert scored["latency_ms"]["1"] > 0
    report = (config.parent / "work" / "report" / "report.html").read_text()
    assert "mobilenetv3-hybrid" in report


def test_mlflow_says_what_was_read(finished: dict[str, Any], config: Path) -> None:
    work = config.parent / "work"
    client = mlflow.MlflowClient(f"sqlite:///{work / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("real-hands")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`handstill.kind` = 'student'")
    assert len(runs) == 2
    for run in runs:
        inputs = {item.dataset.name for item in run.inputs.dataset_inputs}
        assert inputs == set(HANDS)
        digests = {item.dataset.digest for item in run.inputs.dataset_inputs}
        assert digests <= {path.stem for path in work.glob("cache/*/snapshots/*.parquet")}


def test_a_second_run_finds_nothing_to_do(finished: dict[str, Any], config: Path) -> None:
    again = handstill(config, "run")
    assert {name: stage["done"] for name, stage in again["stages"].items()} == dict.fromkeys(again["stages"], 0)


def test_reading_by_id_gives_the_pictures_the_teacher_saw(taught: dict[str, Any], config: Path) -> None:
    for folder in (config.parent / "work" / "cache").iterdir():
        cache = open_cache(folder)
        row = cache[cache.ids[-1]]
        assert row["pictures"].shape == (views_of(folder), 256, 256, 3)
        assert row["teacher/features"].dtype == np.float32
