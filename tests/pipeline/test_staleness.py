"""What a change makes stale: what `plan` names, and what `run` then computes, counted in its event log."""

from __future__ import annotations

import os
import shutil

import pytest

from storage.snapshots import read_head
from tests.pipeline.commands import as_json
from tests.pipeline.lab import NO_WORK, Lab, Work, tree
from tests.tiny_experiment import HANDS_A_TAR, tar_path, write_teacher

BOTH = ["hybrid", "plain"]
ALL_SCORED = ["hybrid", "plain", "teacher"]


def nothing_is_left(lab: Lab) -> None:
    assert lab.reasons() == {}
    assert lab.run() == NO_WORK


def test_a_copy_elsewhere_is_finished(lab: Lab) -> None:
    nothing_is_left(lab)


def test_a_touched_tar_is_still_the_same(lab: Lab) -> None:
    os.utime(tar_path(lab.folder, "alpha", 1))
    nothing_is_left(lab)


def test_a_changed_hand_is_one_shard_and_who_learns_from_it(lab: Lab) -> None:
    before = set(lab.shards())
    lab.rewrite("beta", edits={3: 1})
    assert lab.plan()["ingest"]["reasons"]["changed"] == 1
    assert lab.run("ingest") == Work(scanned=["beta-000000.tar"])
    assert lab.reasons() == {
        "teach": {"changed": 1},
        "train": {"changed": 1},
        "evaluate": {"changed": 1},
        "compare": {"changed": 1},
    }
    assert lab.run() == Work(shards={"beta": 1}, trained=["hybrid"], scored=["hybrid"], reported=True)
    assert before < set(lab.shards())
    assert len(lab.shards()) == len(before) + 1
    nothing_is_left(lab)


def test_a_rewritten_tar_is_its_shards_alone(lab: Lab) -> None:
    lab.rewrite("alpha", 1, edits=dict.fromkeys(range(HANDS_A_TAR), 1))
    assert lab.run() == Work(
        scanned=["alpha-000001.tar"], shards={"alpha": 2}, trained=BOTH, scored=BOTH, reported=True
    )
    nothing_is_left(lab)


def test_an_added_tar_is_new_shards(lab: Lab) -> None:
    lab.rewrite("alpha", 2)
    lab.configure({"datasets.alpha.path": "tars/alpha-{000000..000002}.tar"})
    assert lab.plan()["ingest"]["reasons"]["new"] == 1
    assert lab.run() == Work(
        scanned=["alpha-000002.tar"], shards={"alpha": 2}, trained=BOTH, scored=BOTH, reported=True
    )
    nothing_is_left(lab)


def test_a_removed_tar_is_forgotten(lab: Lab) -> None:
    heads = {path: read_head(path) for path in lab.workdir.glob("cache/*")}
    lab.configure({"datasets.alpha.path": "tars/alpha-000000.tar"})
    assert lab.reasons() == {
        "ingest": {"removed": 1},
        "teach": {"removed": 1},
        "train": {"changed": 2},
        "evaluate": {"changed": 2},
        "compare": {"changed": 1},
    }
    assert lab.run() == Work(trained=BOTH, scored=BOTH, reported=True)
    changed = {
        name for path, before in heads.items() for name, digest in read_head(path).items() if before[name] != digest
    }
    assert changed == {"alpha"}
    nothing_is_left(lab)
    stale = as_json(lab.config, "clean", "--stale")["stale"]
    assert sum(path.endswith(".zarr") for path in stale) == 2


def test_a_removed_tar_that_returns_costs_its_scan(lab: Lab) -> None:
    lab.configure({"datasets.alpha.path": "tars/alpha-000000.tar"})
    lab.run("teach")
    lab.configure({"datasets.alpha.path": "tars/alpha-{000000..000001}.tar"})
    assert lab.run() == Work(scanned=["alpha-000001.tar"])


def test_another_teacher_changes_every_shard(lab: Lab) -> None:
    write_teacher(lab.folder / "teacher", seed=1)
    assert lab.reasons() == {
        "teach": {"changed": 8},
        "train": {"changed": 2},
        "evaluate": {"changed": 3},
        "compare": {"changed": 1},
    }
    kept = tree(lab.workdir / "cache")
    assert lab.run() == Work(shards={"alpha": 4, "beta": 2, "val": 2}, trained=BOTH, scored=ALL_SCORED, reported=True)
    assert kept.items() <= tree(lab.workdir / "cache").items(), "the old caches stay readable"
    nothing_is_left(lab)


def test_more_views_concern_the_training_cache_only(lab: Lab) -> None:
    lab.configure({"cache.views": 3})
    assert lab.reasons()["teach"] == {"changed": 6}
    assert lab.run() == Work(shards={"alpha": 4, "beta": 2}, trained=BOTH, scored=BOTH, reported=True)
    nothing_is_left(lab)


@pytest.mark.parametrize(
    ("change", "shards"),
    [
        ({"cache.features": {"encoding": "float16"}}, 8),
        ({"cache.features": {"grid": "full"}}, 8),
        ({"cache.pictures": {"quality": 90}}, 8),
        ({"teacher.batch_size": 2}, 8),
        ({"cache.augmentation": "none"}, 6),
        ({"seed": 1}, 6),
        ({"cache.samples_per_shard": 4}, 4),
    ],
    ids=lambda value: str(value),
)
def test_what_decides_the_answers_makes_new_caches(lab: Lab, change: dict[str, object], shards: int) -> None:
    lab.configure(change)
    assert lab.plan()["teach"]["todo"] == shards


def test_a_students_own_setting_concerns_that_student(lab: Lab) -> None:
    lab.configure({"students.hybrid.lr": 2e-4})
    assert lab.reasons() == {"train": {"changed": 1}, "evaluate": {"changed": 1}, "compare": {"changed": 1}}
    assert lab.run() == Work(trained=["hybrid"], scored=["hybrid"], reported=True)
    nothing_is_left(lab)
    lab.configure({"students.hybrid.lr": 1e-4})
    assert lab.run() == Work(reported=True), "the student of before is still there"


def test_a_new_student_and_a_new_seed(lab: Lab) -> None:
    lab.configure({"students.third": {"backbone": "mobilenetv3_small_050", "head": "light", "distill": {"outputs": 1}}})
    assert lab.reasons() == {"train": {"new": 1}, "evaluate": {"new": 1}, "compare": {"changed": 1}}
    lab.configure({"students.third!": None, "train.seeds": [0, 1]})
    assert lab.reasons() == {"train": {"new": 2}, "evaluate": {"new": 2}, "compare": {"changed": 1}}


def test_a_changed_evaluation_set_retrains_nobody(lab: Lab) -> None:
    lab.rewrite("val", edits={0: 1})
    assert lab.run() == Work(scanned=["val-000000.tar"], shards={"val": 1}, scored=ALL_SCORED, reported=True)
    nothing_is_left(lab)


@pytest.mark.parametrize(
    "change",
    [
        {"train.log_every": 7},
        {"train.checkpoint_every": 2},
        {"train.loader_workers": 0},
        {"cluster.max_retries": 5},
        {"teacher.workers": {"count": 1}},
        {"evaluate.batch_size": 2},
        {"name": "another-name"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_nothing_makes_nothing_stale(lab: Lab, change: dict[str, object]) -> None:
    lab.configure(change)
    assert lab.reasons() == {}


def test_a_lost_memory_costs_a_scan_and_no_answer(lab: Lab) -> None:
    shutil.rmtree(lab.workdir / "state")
    assert lab.run() == Work(scanned=["alpha-000000.tar", "alpha-000001.tar", "beta-000000.tar", "val-000000.tar"])


def test_a_change_that_keeps_size_and_time_is_found_by_rehash(lab: Lab) -> None:
    tar = tar_path(lab.folder, "beta")
    status = tar.stat()
    data = bytearray(tar.read_bytes())
    position = data.index(b"\xff\xda") + 40  # inside the first picture's coded pixels
    data[position] ^= 1
    with tar.open("r+b") as handle:
        handle.write(data)
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert lab.reasons() == {}
    assert lab.reasons("--rehash")["ingest"] == {"changed": 1}
    assert lab.run("ingest", "--rehash").scanned == ["beta-000000.tar"]
    assert lab.reasons()["teach"] == {"changed": 1}
