"""One thing changes: `plan` names it and the shards that it makes stale, `run` computes just those, nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from storage import layout
from storage.cache import CacheFolder
from storage.identity import stored_identity
from storage.reading import open_cache
from storage.snapshots import read_head
from tests.pipeline.commands import as_json, handstill
from tests.pipeline.lab import NO_WORK, Lab, Work, tree
from tests.tars import write_tar
from tests.tiny_experiment import HANDS_A_TAR, events_of, hand_members, tar_path, write_teacher

EVERY_SHARD = {"alpha": 4, "beta": 2, "val": 2}
TRAINING_SHARDS = {"alpha": 4, "beta": 2}


def changes(plan: Mapping[str, Any], stage: str) -> dict[str, tuple[Any, Any]]:
    """key -> (old, new) of what a stage's plan says has changed."""
    return {change["key"]: (change["old"], change["new"]) for change in plan[stage]["changes"]}


def committed(lab: Lab, since: int) -> set[str]:
    """Input hashes of the shards that were computed since that line of the event log."""
    return {event["unit"] for event in events_of(lab.config, since) if event["event"] == "shard_committed"}


def run_as_planned(lab: Lab) -> Work:
    """Run; what is computed must be just what `plan` named."""
    lab.run("ingest")
    named = {unit["unit"] for unit in lab.plan()["teach"]["work"]}
    seen = len(events_of(lab.config))
    work = lab.run()
    assert committed(lab, seen) == named
    return work


def caches(lab: Lab) -> dict[Path, list[str]]:
    """Every cache that has snapshots, and the ids that it holds."""
    return {path: open_cache(path).ids for path in lab.workdir.glob("cache/*") if read_head(path)}


def test_another_teacher(lab: Lab) -> None:
    old = CacheFolder(next(lab.workdir.glob("cache/*"))).identity["teacher"]["checkpoint_sha256"]
    write_teacher(lab.folder / "teacher", seed=1)
    plan = lab.plan()
    assert changes(plan, "teach").keys() == {"teacher.checkpoint"}
    was, now = changes(plan, "teach")["teacher.checkpoint"]
    assert was == old != now
    text = handstill("plan", "-c", lab.config).out
    assert f"changed: teacher.checkpoint {was[:12]} -> {now[:12]} (train, evaluate)" in text
    before = caches(lab)
    assert run_as_planned(lab).shards == EVERY_SHARD
    after = caches(lab)
    assert len(after) == 4
    assert before.items() <= after.items(), "the old caches stay readable"
    as_json(lab.config, "clean", "--stale", "--yes")
    assert caches(lab).keys() == after.keys() - before.keys()
    assert lab.run() == NO_WORK


@pytest.mark.parametrize(
    ("module", "constant", "key"),
    [
        ("stages.teach", "PREPROCESSING_VERSION", "preprocessing_version"),
        ("stages.teach", "TEACH_VERSION", "algorithm_version"),
        ("storage.layout", "FORMAT_VERSION", "format_version"),
    ],
)
def test_another_version_of_our_own_code(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, module: str, constant: str, key: str
) -> None:
    old = getattr(layout, constant, 1)
    monkeypatch.setattr(f"{module}.{constant}", old + 1)
    plan = lab.plan()
    assert plan["teach"]["reasons"] == {"new": 0, "changed": 8, "removed": 0, "damaged": 0}
    assert changes(plan, "teach") == {key: (old, old + 1)}
    before = tree(lab.workdir / "cache")
    assert run_as_planned(lab) == Work(
        shards=EVERY_SHARD, trained=["hybrid", "plain"], scored=["hybrid", "plain", "teacher"], reported=True
    )
    assert before.items() <= tree(lab.workdir / "cache").items()


@pytest.mark.parametrize(
    ("change", "shards", "named"),
    [
        ({"cache.features": {"encoding": "float16"}}, EVERY_SHARD, {"cache.features.encoding": ("int8", "float16")}),
        ({"cache.pictures": {"quality": 90}}, EVERY_SHARD, {"cache.pictures.quality": (95, 90)}),
        ({"cache.views": 3}, TRAINING_SHARDS, {"cache.views": (2, 3)}),
        ({"cache.augmentation": "none"}, TRAINING_SHARDS, {"cache.augmentation": ("hamer", "none")}),
        ({"seed": 1}, TRAINING_SHARDS, {"seed": (0, 1)}),
        ({"teacher.batch_size": 2}, EVERY_SHARD, {"teacher.batch_size": (4, 2)}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_setting_of_the_cache(
    lab: Lab, change: dict[str, Any], shards: dict[str, int], named: dict[str, tuple[Any, Any]]
) -> None:
    lab.configure(change)
    plan = lab.plan()
    assert changes(plan, "teach") == named
    key, (old, new) = next(iter(named.items()))
    assert any(line.startswith(f"changed: {key} {old} -> {new} (train") for line in plan["teach"]["why"])
    before = caches(lab)
    seen = len(events_of(lab.config))
    lab.run("teach")
    units = {unit["unit"] for unit in plan["teach"]["work"]}
    assert committed(lab, seen) == units
    assert {name: sum(unit["dataset"] == name for unit in plan["teach"]["work"]) for name in shards} == shards
    assert len(units) == sum(shards.values())
    assert before.items() <= caches(lab).items()


def test_the_nearest_cache_is_compared_with(lab: Lab) -> None:
    lab.configure({"cache.views": 3, "cache.pictures": {"quality": 90}})
    assert changes(lab.plan(), "teach") == {"cache.views": (2, 3), "cache.pictures.quality": (95, 90)}
    lab.run("teach")
    lab.configure({"cache.views": 1})
    plan = lab.plan()["teach"]["changes"]
    assert {"of": "train", "key": "cache.views", "old": 3, "new": 1} in plan
    assert not [change for change in plan if "quality" in change["key"]]


def test_a_changed_tar_is_named_with_its_shards(lab: Lab) -> None:
    lab.rewrite("alpha", 1, edits={2: 1})
    plan = lab.plan()
    tar = str(tar_path(lab.folder, "alpha", 1))
    assert plan["ingest"]["work"] == [{"unit": tar, "reason": "changed"}]
    lab.run("ingest")
    (shard,) = lab.plan()["teach"]["work"]
    assert (shard["dataset"], shard["role"], shard["samples"]) == ("alpha", "train", 2)
    assert (shard["reason"], shard["source"]) == ("changed", "tars/alpha-000001.tar")
    assert "changed: alpha (train), 1 shard: tars/alpha-000001.tar" in handstill("plan", "-c", lab.config).out
    assert lab.plan()["teach"]["changes"] == [], "the cache is the same, its data are not"
    seen = len(events_of(lab.config))
    lab.run("teach")
    assert committed(lab, seen) == {shard["unit"]}
    assert {change["key"] for change in lab.plan()["train"]["changes"]} == {"the samples of alpha"}


def test_an_added_and_a_removed_tar(lab: Lab) -> None:
    lab.rewrite("alpha", 2)
    lab.configure({"datasets.alpha.path": ["tars/alpha-000000.tar", "tars/alpha-000002.tar"]})
    assert lab.plan()["ingest"]["reasons"] == {"new": 1, "changed": 0, "removed": 1, "damaged": 0}
    before = set(lab.shards())
    work = run_as_planned(lab)
    assert work.shards == {"alpha": 2}
    assert before < set(lab.shards()), "those of the removed tar stay until clean"
    as_json(lab.config, "clean", "--stale", "--yes")
    assert len(set(lab.shards("alpha")) & before) == 2
    assert lab.run() == NO_WORK


@pytest.mark.parametrize("what", ["labels", "picture"])
def test_a_sample_that_goes_bad_in_the_middle_is_its_shard_alone(lab: Lab, what: str) -> None:
    members: dict[str, bytes] = {}
    for position in range(HANDS_A_TAR):
        members |= hand_members(f"00{position:04d}", [*f"beta-0-{position}".encode()])
    if what == "labels":
        members["000001.data.pyd"] = b"no pickle"
    else:
        picture = members["000001.jpg"]
        members["000001.jpg"] = picture[: picture.index(b"\xff\xda") + 20]
    ids = {shard: open_ids(shard) for shard in lab.shards("beta")}
    write_tar(tar_path(lab.folder, "beta"), members)
    assert run_as_planned(lab) == Work(shards={"beta": 1}, trained=["hybrid"], scored=["hybrid"], reported=True)
    (made,) = set(lab.shards("beta")) - ids.keys()
    assert open_ids(made) == ["beta:000000#0"]
    train = next(path for path in caches(lab) if (stored_identity(path) or {})["role"] == "train")
    reader = open_cache(train)
    assert [name for name in reader.ids if name.startswith("beta")] == [f"beta:00000{n}#0" for n in (0, 2, 3)]
    assert lab.run() == NO_WORK


def open_ids(shard: Path) -> list[str]:
    """The ids in a shard, read with nothing but its documents."""
    document = json.loads((shard / "sample_id/zarr.json").read_bytes())
    rows, width = document["shape"]
    data = next(path for path in (shard / "sample_id").iterdir() if path.name.startswith("c")).read_bytes()
    return [data[row * width : (row + 1) * width].rstrip(b"\0").decode() for row in range(rows)]


def test_a_trainer_pins_what_it_read_and_mlflow_shows_it(lab: Lab) -> None:
    before = {name: digest for path in caches(lab) for name, digest in read_head(path).items()}
    lab.rewrite("beta", edits={3: 1})
    lab.run()
    after = {name: digest for path in caches(lab) for name, digest in read_head(path).items()}
    assert {name for name in after if after[name] != before[name]} == {"beta"}
    client = MlflowClient(f"sqlite:///{lab.workdir / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`handstill.student` = 'hybrid'")
    read = [
        {item.dataset.name: item.dataset.digest for item in run.inputs.dataset_inputs}
        for run in sorted(runs, key=lambda run: run.info.start_time)
    ]
    assert [inputs["beta"] for inputs in read] == [before["beta"], after["beta"]]
    train = next(path for path in caches(lab) if "beta" in read_head(path))
    assert len(open_cache(train, before["beta"])) == HANDS_A_TAR, "what was pinned stays readable"


def test_a_students_changes_are_named_by_the_keys_of_the_file(lab: Lab) -> None:
    lab.configure({"train.lr": 2e-4, "students.hybrid.distill.outputs": 0.5, "datasets.beta.weight": 0.25})
    plan = lab.plan()
    found = {(change["of"], change["key"]): (change["old"], change["new"]) for change in plan["train"]["changes"]}
    assert found == {
        ("plain-seed0", "train.lr"): (1e-4, 2e-4),
        ("hybrid-seed0", "train.lr"): (1e-4, 2e-4),
        ("hybrid-seed0", "students.hybrid.distill.outputs"): (0.3, 0.5),
        ("hybrid-seed0", "datasets.beta.weight"): (0.5, 0.25),
    }
    text = handstill("plan", "-c", lab.config).out
    assert "changed: train.lr 0.0001 -> 0.0002 (plain-seed0, hybrid-seed0)" in text
    lab.configure({"train.lr": 1e-4, "students.hybrid!": None, "students.plain.lr": 3e-4})
    assert changes(lab.plan(), "train") == {"students.plain.lr": (1e-4, 3e-4)}


def test_a_change_of_how_scores_are_measured_is_named(lab: Lab) -> None:
    lab.configure({"evaluate.latency.warmup": 1})
    plan = lab.plan()
    assert {change["of"] for change in plan["evaluate"]["changes"]} == {"teacher", "plain-seed0", "hybrid-seed0"}
    assert changes(plan, "evaluate") == {"evaluate.latency.warmup": (0, 1)}
    lab.run()
    lab.configure({"students.plain.lr": 3e-4})
    lab.run("train")
    assert changes(lab.plan(), "evaluate").keys() == {"the student"}
