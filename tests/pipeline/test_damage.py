"""Damaged outputs: what `plan` and `verify` say of them, and that `run` repairs exactly that, to the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from storage.errors import DamageError
from storage.reading import open_cache
from tests.pipeline.commands import as_json, handstill
from tests.pipeline.lab import NO_WORK, NOTHING, Lab, Work, tree


def features_of(shard: Path) -> Path:
    return next(path for path in (shard / "teacher/features").iterdir() if path.name.startswith("c"))


def truncate(path: Path) -> None:
    with path.open("r+b") as handle:
        handle.truncate(path.stat().st_size - 1)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("dataset", ["alpha", "val"])
@pytest.mark.parametrize("harm", [truncate, Path.unlink], ids=["truncated", "deleted"])
def test_a_shards_file_is_found_by_plan_and_repaired(lab: Lab, harm: object, dataset: str) -> None:
    before = tree(lab.workdir / "cache")
    assert callable(harm)
    harm(features_of(lab.shards(dataset)[0]))
    plan = lab.plan()
    assert plan["teach"]["reasons"] == NOTHING | {"damaged": 1}
    assert plan["teach"]["todo"] == 1
    assert [plan[stage]["todo"] for stage in ("ingest", "train", "evaluate", "compare")] == [0, 0, 0, 0]
    assert any(f"damaged: {dataset}" in line for line in plan["teach"]["why"])
    assert lab.run() == Work(shards={dataset: 1})
    assert tree(lab.workdir / "cache") == before
    assert lab.run() == NO_WORK


def test_a_deleted_shard_and_a_deleted_cache_folder_are_made_again(lab: Lab) -> None:
    before = tree(lab.workdir / "cache")
    shutil.rmtree(lab.shards("beta")[1])
    assert lab.plan()["teach"]["reasons"] == NOTHING | {"damaged": 1}
    assert lab.run() == Work(shards={"beta": 1})
    assert tree(lab.workdir / "cache") == before
    shutil.rmtree(lab.workdir / "cache")
    assert lab.run() == Work(shards={"alpha": 4, "beta": 2, "val": 2})
    assert tree(lab.workdir / "cache") == before


@pytest.mark.parametrize("inside", ["teacher/features", "pictures/bytes", "labels/keypoints_3d", "zarr.json"])
def test_verify_finds_a_flipped_byte_and_run_repairs_it(lab: Lab, inside: str) -> None:
    before = tree(lab.workdir / "cache")
    shard = lab.shards("alpha")[1]
    path = shard / inside
    if path.is_dir():
        path = next(item for item in path.iterdir() if item.name.startswith("c"))
    flip_a_byte(path)
    assert lab.reasons() == {}, "a plan looks at sizes only"
    answer = handstill("verify", "-c", lab.config, "--json")
    assert answer.code == 1
    assert answer.document["ok"] is False
    assert answer.document["shards"] == 8
    assert answer.document["damaged"]
    assert all(shard.name in line for line in answer.document["damaged"])
    assert lab.plan()["teach"]["reasons"] == NOTHING | {"damaged": 1}
    assert lab.run() == Work(shards={"alpha": 1})
    assert tree(lab.workdir / "cache") == before
    assert as_json(lab.config, "verify")["ok"] is True


def test_a_missing_result_of_a_student_is_made_again(lab: Lab) -> None:
    result = next(lab.workdir.glob("students/hybrid/*/*/result.json"))
    network = next(result.parent.glob("student/*.safetensors"))
    before = network.read_bytes()
    shutil.rmtree(result.parent)
    assert lab.reasons()["train"] == {"new": 1}
    work = lab.run()
    assert work.trained == ["hybrid"]
    assert network.read_bytes() == before
    assert lab.run() == NO_WORK


def test_a_reader_refuses_what_verify_would_find(lab: Lab) -> None:
    shard = lab.shards("alpha")[0]
    flip_a_byte(features_of(shard))
    reader = open_cache(shard.parent.parent)
    with pytest.raises(DamageError, match="handstill run"):
        reader.read(range(len(reader)), [0] * len(reader))


def test_plan_finds_a_flipped_byte_when_it_hashes_everything(lab: Lab) -> None:
    before = tree(lab.workdir / "cache")
    flip_a_byte(features_of(lab.shards("val")[0]))
    assert lab.reasons() == {}
    assert lab.reasons("--rehash") == {"teach": {"damaged": 1}}
    assert lab.run("--rehash") == Work(shards={"val": 1})
    assert tree(lab.workdir / "cache") == before
