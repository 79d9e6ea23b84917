"""`handstill audit`: what it answers, what it leaves, and how it ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import auditing
from stages.audit import Compute, computed_by_threads
from stages.plausibility import QUANTITIES
from tests.pipeline.commands import as_json, handstill
from tests.pipeline.inline import no_session
from tests.pipeline.lab import Lab, tree

KINDS = ["audit.json", "audit.md", "channels.parquet", "disagreement.png", "features.png", "worst.csv"]


def test_audit(lab: Lab) -> None:
    document = as_json(lab.config, "audit")
    assert document["ok"] is True
    assert list(document["caches"]) == ["evaluate", "train"]
    train = document["caches"]["train"]
    assert {name: stats["samples"] for name, stats in train["datasets"].items()} == {
        "alpha": 8, "beta": 4, "overall": 12,
    }  # fmt: skip
    alpha = train["datasets"]["alpha"]
    assert {"samples", "views", "features", "outputs", "not_finite", "disagreement"} <= alpha.keys()
    assert (alpha["views"], alpha["features"]["channels"], alpha["not_finite"]) == (2, 24, {})
    assert alpha["disagreement"]["px"]["samples"] == 8
    assert train["drift"] == {}
    folder = Path(document["folder"])
    assert folder.parent == lab.workdir / "audit"
    assert sorted(path.name for path in folder.iterdir()) == KINDS
    before = tree(lab.folder)
    assert as_json(lab.config, "audit") == document
    assert tree(lab.folder) == before
    answer = handstill("audit", "-c", lab.config)
    assert (answer.code, "train/alpha" in answer.out, str(folder) in answer.out) == (0, True, True)
    assert "shards/s" not in answer.err, "it was not computed again"


def test_an_unfit_cache_exits_with_1(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    tight = replace(QUANTITIES["camera_scale"], high=1e-3)
    monkeypatch.setitem(QUANTITIES, "camera_scale", tight)
    answer = handstill("audit", "-c", lab.config, "--json")
    assert (answer.code, answer.document["ok"]) == (1, False)
    found = {(f["severity"], f["cache"], f["dataset"], f["what"]) for f in answer.document["findings"]}
    assert found == {
        ("unfit", cache, dataset, "camera_scale")
        for cache, dataset in (("train", "alpha"), ("train", "beta"), ("evaluate", "val"))
    }
    assert handstill("audit", "-c", lab.config).code == 1, "the second time too, from what stands"


def test_what_changed_between_two_caches(lab: Lab) -> None:
    old = as_json(lab.config, "audit")["caches"]["train"]["fingerprint"]
    lab.configure({"cache.features": {"grid": "8x8-paper", "encoding": "float16"}})
    as_json(lab.config, "run", "teach")
    for against in (old, str(lab.workdir / "cache" / old)):
        document = as_json(lab.config, "audit", "--against", against)
        drift = document["caches"]["train"]["drift"]
        assert document["caches"]["train"]["against"] == old
        assert list(drift) == ["alpha", "beta"]
        assert drift["alpha"]["common_views"] == 16
        assert drift["alpha"]["joints"]["px"]["max"] == 0, "the same teacher, stored otherwise"
        assert 0 < drift["alpha"]["features"]["relative_frechet"] < 1e-3
        assert document["caches"]["evaluate"]["against"] is None
    assert len(list((lab.workdir / "audit").iterdir())) == 2
    assert "joints' distance" in (Path(document["folder"]) / "audit.md").read_text()


def test_shared_caches_are_named_by_their_fingerprints(lab: Lab) -> None:
    (lab.workdir / "cache").rename(lab.folder / "shared")
    lab.configure({"cache.root": "shared"})
    old = as_json(lab.config, "audit")["caches"]["train"]
    assert Path(old["path"]).parent == lab.folder / "shared"
    document = as_json(lab.config, "audit", "--against", old["fingerprint"])
    assert document["caches"]["train"]["drift"]["beta"]["features"]["drifted"] == 0


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"cache.views": 3}, [], "run `handstill run teach`"),
        ({}, ["--against", "0123456789abcdef"], "want a cache folder, or one of the fingerprints"),
        ({}, ["--against", "/"], "is not a cache"),
        ({"audit.memory_gib": 0.001}, [], "audit.memory_gib: found 0.00"),
    ],
)
def test_wrong_input_exits_with_2(lab: Lab, changes: dict[str, Any], options: list[str], said: str) -> None:
    lab.configure(changes)
    if "cache.views" in changes:
        lab.configure({"evaluate.on": ["beta"]})
    answer = handstill("audit", "-c", lab.config, *options)
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err
    assert not (lab.workdir / "audit").exists()


def test_damage_ends_an_audit_and_leaves_nothing(lab: Lab) -> None:
    victim = next(lab.shards("beta")[0].glob("teacher/cam/c.*"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x00")
    answer = handstill("audit", "-c", lab.config)
    assert answer.code == 1
    assert "handstill verify" in answer.err
    assert not (lab.workdir / "audit").exists()


def test_memory_does_not_change_the_result(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    document = as_json(lab.config, "audit")
    folder = Path(document["folder"])
    kept = folder.rename(folder.with_name("kept"))
    monkeypatch.setattr(auditing, "partitions_at_once", lambda *sizes: 1)
    assert as_json(lab.config, "audit") == document
    for name in KINDS:
        assert (folder / name).read_bytes() == (kept / name).read_bytes(), name


@pytest.mark.parametrize(
    ("address", "options", "on_ray"),
    [
        ("local", [], False),
        ("auto", [], True),
        ("local", ["--on", "ray"], True),
        ("auto", ["--on", "local"], False),
    ],
)
def test_where_the_graphs_are_computed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, address: str, options: list[str], on_ray: bool
) -> None:
    asked: list[float] = []

    def in_place_of_ray(cpus: float) -> Compute:
        asked.append(cpus)
        return computed_by_threads(1)

    monkeypatch.setattr(auditing, "ray_session", no_session)
    monkeypatch.setattr(auditing, "cluster_size", lambda: ({"CPU": 64.0}, 2))
    monkeypatch.setattr(auditing, "computed_on_ray", in_place_of_ray)
    lab.configure({"cluster.address": address, "teacher.workers": {"gpus": 0}, "audit.memory_gib": 4.0})
    as_json(lab.config, "audit", *options)
    assert bool(asked) is on_ray
    if on_ray:
        (cpus,) = asked
        assert 32 / cpus * (auditing.WORKER_BYTES + 24 * 2**20) < 4 * 2**30, "no more at a time than a node's memory"


def test_an_audit_of_what_is_no_more_is_stale(lab: Lab) -> None:
    folder = as_json(lab.config, "audit")["folder"]
    assert as_json(lab.config, "clean", "--stale")["stale"] == {}
    lab.rewrite("beta", edits={0: 1})
    as_json(lab.config, "run")
    assert folder in as_json(lab.config, "clean", "--stale")["stale"]
    as_json(lab.config, "clean", "--stale", "--yes")
    assert not Path(folder).exists()


def test_the_document_is_the_file(lab: Lab) -> None:
    document = as_json(lab.config, "audit")
    folder = Path(document.pop("folder"))
    assert json.loads((folder / "audit.json").read_text()) == document
