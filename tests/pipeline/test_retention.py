"""What `clean` leaves of stale outputs, and that it takes nothing that somebody needs."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import KeepConfig
from pipeline.retention import cut_events, old_event_bytes, old_summaries
from pipeline.spool import Spool
from storage.durable import canonical_json
from storage.snapshots import read_head
from tests.pipeline.commands import as_json, handstill
from tests.pipeline.lab import NO_WORK, Lab, tree

DAY_S = 86400


def students(lab: Lab, name: str) -> set[Path]:
    return set(lab.workdir.glob(f"students/{name}/*/*"))


def caches(lab: Lab) -> set[Path]:
    return {path.parent for path in lab.workdir.glob("cache/*/cache.json")}


def clean(lab: Lab, *options: str) -> dict[str, Any]:
    document: dict[str, Any] = as_json(lab.config, "clean", "--stale", *options)
    return document


def pass_days(lab: Lab, days: float) -> None:
    """Let what is known to be stale be so for longer."""
    path = lab.workdir / "state" / "stale_since.json"
    known = json.loads(path.read_bytes())
    path.write_bytes(canonical_json({item: since_s - days * DAY_S for item, since_s in known.items()}))


@pytest.fixture
def aged(lab: Lab) -> Lab:
    """`hybrid` was trained three times, each time differently; the current one is the youngest."""
    (current,) = students(lab, "hybrid")
    identity = json.loads((current / "identity.json").read_text())
    for age, rate in ((2, 2e-4), (1, 3e-4)):
        older = shutil.copytree(current, current.with_name(f"{age:016x}"))
        (older / "identity.json").write_bytes(canonical_json(identity | {"recipe": identity["recipe"] | {"lr": rate}}))
        modified_s = current.stat().st_mtime - age
        os.utime(older, (modified_s, modified_s))
    return lab


def test_a_dry_run_says_what_would_go_and_changes_nothing(aged: Lab) -> None:
    before = tree(aged.workdir)
    document = clean(aged, "--dry-run")
    assert tree(aged.workdir) == before
    assert document["deleted"] is False
    stale = {Path(path) for path in document["stale"]}
    assert stale < students(aged, "hybrid")
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in stale}
    assert document["bytes"] == sum(sizes.values()) == sum(document["stale"].values())
    assert handstill("clean", "--stale", "--dry-run", "--yes", "-c", aged.config).code == 2


def test_the_last_students_stay(aged: Lab) -> None:
    aged.configure({"retention": {"students": {"keep_last": 1}}})
    (current,) = {Path(path) for path in students(aged, "hybrid")} - {
        Path(path) for path in [*clean(aged)["stale"], *clean(aged)["kept"]]
    }
    document = clean(aged, "--yes")
    stays = {Path(path) for path in document["kept"]}
    assert {"among the last 1"} == set(document["kept"].values())
    assert students(aged, "hybrid") == {current} | {path for path in stays if "students" in path.parts}
    assert len(students(aged, "hybrid")) == 2
    oldest_kept = max((Path(path) for path in stays if "students" in Path(path).parts), key=lambda p: p.stat().st_mtime)
    assert json.loads((oldest_kept / "identity.json").read_text())["recipe"]["lr"] == 3e-4


def test_days_count_from_when_it_was_found_stale(aged: Lab) -> None:
    aged.configure({"retention": {"students": {"keep_days": 7}, "caches": {"keep_days": 0}}})
    assert clean(aged, "--yes")["stale"] == {}
    assert clean(aged, "--yes")["stale"] == {}
    pass_days(aged, 6.9)
    kept = clean(aged)["kept"]
    assert kept
    assert all(why.endswith("kept for 7 days") for why in kept.values())
    pass_days(aged, 0.2)
    gone = {Path(path) for path in clean(aged, "--yes")["stale"]}
    assert gone == {Path(path) for path in kept}
    assert len(students(aged, "hybrid")) == 1
    assert aged.run() == NO_WORK


def test_the_last_caches_stay_by_role(lab: Lab) -> None:
    for views in (3, 4, 1):
        lab.configure({"cache.views": views})
        lab.run("teach")
        time.sleep(0.02)
    assert len(caches(lab)) == 5, "the evaluation set is always seen once"
    lab.run()
    lab.configure({"retention": {"caches": {"keep_last": 2}, "students": {"keep_last": 9}}})
    gone = [Path(path) for path in clean(lab, "--yes")["stale"] if Path(path).parent.name == "cache"]
    assert len(gone) == 1
    assert len(caches(lab)) == 4


def test_a_pinned_student_stays_with_what_it_was_trained_on(lab: Lab) -> None:
    (student,) = students(lab, "plain")
    identity = json.loads((student / "identity.json").read_text())
    lab.configure({"cache.views": 3})
    lab.run()
    lab.configure({"retention": {"pinned": [student.name]}})
    document = clean(lab, "--yes")
    root = lab.workdir / "cache" / identity["cache"]
    assert document["kept"][str(student)] == "pinned"
    assert document["kept"][str(root)] == f"plain/seed-0/{student.name} reads it"
    assert read_head(root)["alpha"] == identity["snapshots"]["alpha"]
    assert (student / "result.json").is_file()


def test_an_unfinished_training_that_is_kept_keeps_its_snapshot_and_shards(lab: Lab) -> None:
    (student,) = students(lab, "plain")
    (student / "result.json").unlink()
    cache = lab.workdir / "cache" / json.loads((student / "identity.json").read_text())["cache"]
    alpha = {path.name for path in lab.shards("alpha")}
    snapshot = json.loads((student / "identity.json").read_text())["snapshots"]["alpha"]
    lab.configure({"datasets.alpha.path": "tars/alpha-000000.tar"})
    lab.run()
    lab.configure({"retention": {"students": {"keep_last": 1}}})
    clean(lab, "--yes")
    assert {path.name for path in lab.shards("alpha")} == alpha
    assert (cache / "snapshots" / f"{snapshot}.parquet").is_file()
    shutil.rmtree(student)
    assert len([path for path in clean(lab, "--yes")["stale"] if path.endswith(".zarr")]) == 2


def test_a_pin_that_names_nothing_deletes_nothing(aged: Lab) -> None:
    aged.configure({"retention": {"pinned": ["hybrid/seed-0/0123456789abcdef"]}})
    before = students(aged, "hybrid")
    answer = handstill("clean", "--stale", "--yes", "-c", aged.config)
    assert answer.code == 2
    assert "retention.pinned: no student, score or cache is named 'hybrid/seed-0/0123456789abcdef'" in answer.err
    assert students(aged, "hybrid") == before


def test_what_mlflow_has_not_got_stays_and_is_said(aged: Lab) -> None:
    stale = [Path(path) for path in clean(aged)["stale"]]
    victim = next(path for path in stale if "students" in path.parts)
    Spool(victim).append("metrics", step=1, values={"loss": 1.0})
    assert as_json(aged.config, "status")["undelivered_records"] == 1
    text = handstill("clean", "--stale", "--yes", "-c", aged.config).out
    assert f"kept  {victim}: 1 records of it are not in MLflow yet; a run delivers them" in text
    assert (victim / "tracking.jsonl").is_file()
    aged.run()
    assert as_json(aged.config, "status")["undelivered_records"] == 0
    assert str(victim) in clean(aged, "--yes")["stale"]
    assert not victim.exists()


def test_a_run_cleans_up_at_its_end_if_asked(lab: Lab) -> None:
    lab.configure({"students.hybrid.lr": 2e-4})
    lab.run()
    assert len(students(lab, "hybrid")) == 2
    lab.configure({"retention": {"at_end": True}})
    answer = handstill("run", "-c", lab.config, "--json")
    assert answer.code == 0, answer.err
    assert any("/students/hybrid/" in path for path in answer.document["cleaned"]["stale"])
    assert "stale outputs" in answer.document["text"]
    assert len(students(lab, "hybrid")) == 1
    assert lab.run() == NO_WORK
    lab.configure({"cache.views": 3})
    answer = handstill("run", "ingest", "-c", lab.config, "--json")
    assert (answer.code, answer.document["cleaned"]) == (0, None)
    assert "retention.at_end: nothing was deleted: clean: alpha, beta is not cached yet" in answer.err


def log_of(path: Path, *days_ago: float) -> list[bytes]:
    """An event log of runs so many days ago, two lines each."""
    runs = [
        b"".join(
            json.dumps({"time": 1e9 - days * DAY_S, "event": event}).encode() + b"\n"
            for event in ("run_started", "run_done")
        )
        for days in days_ago
    ]
    path.write_bytes(b"".join(runs))
    return runs


@pytest.mark.parametrize(
    ("policy", "stays"),
    [
        ({}, 4),
        ({"keep_days": 5}, 2),
        ({"keep_last": 1}, 1),
        ({"keep_days": 5, "keep_last": 3}, 3),
        ({"keep_days": 0.1}, 1),
    ],
)
def test_old_events_go_by_whole_runs(tmp_path: Path, policy: dict[str, float], stays: int) -> None:
    path = tmp_path / "events.jsonl"
    runs = log_of(path, 30, 6, 4, 1)
    keep = KeepConfig.model_validate(policy)
    expected = b"".join(runs[len(runs) - stays :])
    assert old_event_bytes(path, keep, 1e9) == path.stat().st_size - len(expected)
    cut_events(path, keep, 1e9)
    assert path.read_bytes() == expected
    assert old_event_bytes(path, keep, 1e9) == 0


def test_old_summaries_go_with_their_events(lab: Lab) -> None:
    for _ in range(3):
        lab.run()
    folder = lab.workdir / "summaries"
    before = sorted(folder.iterdir())
    assert old_summaries(folder, KeepConfig(), time.time()) == []
    lab.configure({"retention": {"events": {"keep_last": 2}}})
    clean(lab, "--yes")
    assert sorted(folder.iterdir()) == before[-2:]
    log = (lab.workdir / "logs" / "events.jsonl").read_text().splitlines()
    assert sum('"run_started"' in line for line in log) == 2
