"""Samples in = cached + quarantined, whatever is wrong with them; and the runs that must not touch the real outputs."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tests.pipeline.commands import as_json, handstill
from tests.pipeline.lab import NO_WORK, Lab, tree
from tests.tars import write_tar
from tests.tiny_experiment import annotation, hand_members, tar_path, write_hands

GOOD = 2


def write_bad_hands(path: Path) -> None:
    """Two good samples; one without its labels, one labelled NaN; one whose picture breaks off after its header."""
    good = hand_members("good0", 1) | hand_members("good1", 2)
    lonely = {"lonely.jpg": hand_members("lonely", 3)["lonely.jpg"]}
    draw = np.random.default_rng(4)
    hand = annotation(draw, betas=np.full(10, np.nan, np.float32))
    unfit = {"nan.jpg": hand_members("nan", 4)["nan.jpg"], "nan.data.pyd": pickle.dumps([hand])}
    broken = hand_members("broken", 5)
    whole = broken["broken.jpg"]
    start = whole.index(b"\xff\xda")
    broken["broken.jpg"] = whole[: start + 20]
    write_tar(path, good | lonely | unfit | broken)


def quarantine_of(lab: Lab, dataset: str) -> dict[str, str]:
    """Sample id -> reason, from the snapshot that the cache points at."""
    found = {}
    for path in lab.workdir.glob("cache/*/snapshots/*.parquet"):
        for row in pq.read_table(path, partitioning=None).to_pylist():
            if row["dataset"] == dataset and row["reason"] is not None:
                found[row["sample_id"]] = row["reason"]
    return found


def test_counts_tie_with_both_kinds_of_quarantine(lab: Lab) -> None:
    write_bad_hands(tar_path(lab.folder, "beta"))
    stages = as_json(lab.config, "run", "teach")["stages"]
    assert {key: stages["ingest"][key] for key in ("samples_in", "samples_done", "quarantined")} == {
        "samples_in": 17,
        "samples_done": 15,
        "quarantined": 2,
    }
    assert {key: stages["teach"][key] for key in ("samples_in", "samples_done", "quarantined")} == {
        "samples_in": 17,
        "samples_done": 14,
        "quarantined": 3,
    }
    reasons = {sample_id: reason.split(":")[0] for sample_id, reason in quarantine_of(lab, "beta").items()}
    assert reasons == {"beta:lonely#0": "no-label", "beta:nan#0": "bad-label", "beta:broken#0": "undecodable-picture"}
    document = as_json(lab.config, "status")
    assert document["left_out_at_ingest"] == {"no-label": 1, "bad-label": 1}
    assert "left out at ingest: 1 bad-label" in handstill("status", "-c", lab.config).out
    status = document["stages"]
    assert (status["ingest"]["quarantined"], status["teach"]["quarantined"]) == (2, 3)
    lab.run()
    again = as_json(lab.config, "run")["stages"]
    assert (again["teach"]["samples_in"], again["teach"]["quarantined"]) == (17, 3)
    shown = as_json(lab.config, "show", "teach")["outputs"]
    beta = next(output["snapshots"]["beta"] for output in shown if "beta" in output["snapshots"])
    assert (beta["cached"], beta["quarantined"]) == (GOOD, 3)


def test_an_id_that_came_before_is_left_out(lab: Lab) -> None:
    write_hands(tar_path(lab.folder, "alpha", 1), "alpha", 0, edits={0: 1})  # the keys of the first tar
    stages = as_json(lab.config, "run", "teach")["stages"]
    assert stages["ingest"]["quarantined"] == 4
    assert (stages["teach"]["samples_in"], stages["teach"]["samples_done"], stages["teach"]["quarantined"]) == (
        16,
        12,
        4,
    )
    counts = as_json(lab.config, "status")["stages"]
    assert (counts["ingest"]["quarantined"], counts["teach"]["quarantined"]) == (4, 4)
    assert set(quarantine_of(lab, "alpha").values()) == {"duplicate: its id stands in an earlier source file"}


def test_a_picture_in_both_roles_is_warned_of(lab: Lab) -> None:
    shared = hand_members("shared", 7)
    write_tar(tar_path(lab.folder, "beta"), hand_members("a", 1) | shared)
    write_tar(tar_path(lab.folder, "val"), shared | hand_members("b", 2))
    answer = handstill("run", "ingest", "-c", lab.config)
    assert answer.code == 0
    (warning,) = [line for line in answer.err.splitlines() if "WARNING" in line]
    assert "1 pictures stand in a training set and in an evaluation set" in warning
    assert "beta:shared#0" in warning
    assert "val:shared#0" in warning


def test_a_limited_run_leaves_the_real_outputs_alone(lab: Lab) -> None:
    before = tree(lab.folder)
    stages = as_json(lab.config, "run", "--limit", "3")["stages"]
    assert stages["ingest"]["samples_in"] == 9, "the first three of each set"
    assert stages["teach"]["samples_in"] == 9
    assert (stages["train"]["done"], stages["evaluate"]["done"], stages["compare"]["done"]) == (2, 3, 1)
    after = tree(lab.folder)
    assert {path: digest for path, digest in after.items() if not path.startswith("work/smoke-3/")} == before
    assert any(path.startswith("work/smoke-3/report/") for path in after)
    assert lab.run() == NO_WORK
    again = as_json(lab.config, "run", "--limit", "3")["stages"]
    assert all(stage["done"] == 0 for stage in again.values())


def test_a_limit_that_spans_tars(lab: Lab) -> None:
    stages = as_json(lab.config, "run", "teach", "--limit", "6")["stages"]
    assert stages["ingest"]["samples_in"] == 6 + 4 + 4
    assert stages["teach"]["samples_done"] == 14
