"""Fitted encodings: the pass that fits them, once and before any shard, and what depends on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import stages.teach
from pipeline import calibrating, calibrations
from stages.answers import Forward
from stages.calibrate import fit
from storage.cache import CacheFolder, open_cache
from storage.codecs import CODEC_FILE, FittedCodec
from storage.durable import is_partial, sha256_file
from tests.pipeline.commands import as_json, handstill
from tests.pipeline.lab import Lab, Work, tree
from tests.tiny_experiment import events_of

FITTED = ["pca12-int8", "codes4"]
CODES = {"cache.features": {"encoding": "codes4"}}
ALL = {"alpha": 4, "beta": 2, "val": 2}


def calibration_of(lab: Lab) -> list[Path]:
    return [path for path in sorted(lab.workdir.glob("cache/calibration/*")) if not is_partial(path)]


def current_caches(lab: Lab, encoding: str) -> list[CacheFolder]:
    found = [CacheFolder(path.parent) for path in sorted(lab.workdir.glob("cache/*/cache.json"))]
    return [folder for folder in found if folder.identity["features"]["encoding"] == encoding]


def test_a_plan_says_that_calibration_comes_first(lab: Lab) -> None:
    whole = lab.plan()["teach"]
    assert whole["todo"] == 0
    lab.configure(CODES)
    plan = lab.plan()["teach"]  # and it writes nothing
    assert plan["why"][0] == (
        "calibration first: the teacher looks at 24 views to fit codes4; until then no shard is there"
    )
    assert (plan["todo"], plan["reasons"]["changed"], plan["teacher_passes"]) == (8, 8, 24 + 24 + 8)
    assert plan["why"][1] == "changed: cache.features.encoding int8 -> codes4 (train, evaluate)"
    lab.configure({"cache.calibration": {"views": 5}})
    assert "looks at 6 views" in lab.plan()["teach"]["why"][0], "all views of three samples"
    lab.run("teach")
    assert lab.plan()["teach"]["todo"] == 0
    lab.configure({"cache.calibration": {"views": 6}})
    assert "changed: cache.calibration.views 5 -> 6 (train, evaluate)" in lab.plan()["teach"]["why"]


@pytest.mark.parametrize("encoding", FITTED)
def test_a_fitted_cache_is_taught_verified_learnt_from_and_finished(lab: Lab, encoding: str) -> None:
    lab.configure({"cache.features": {"encoding": encoding}})
    assert lab.run() == Work(
        shards=ALL, trained=["hybrid", "plain"], scored=["hybrid", "plain", "teacher"], reported=True
    )
    assert lab.reasons() == {}
    (calibration,) = calibration_of(lab)
    train, evaluate = current_caches(lab, encoding)
    named = {folder.identity["features"]["codec_sha256"] for folder in (train, evaluate)}
    assert named == {sha256_file(calibration / CODEC_FILE)}, "one codec for both roles"
    about = json.loads((calibration / "calibration.json").read_text())
    assert (about["views"], about["tokens"], about["datasets"]) == (24, 24 * 64, ["alpha", "beta"])
    reader = open_cache(train.root)
    assert reader.feature_shape == (8, 8, 24)
    document = as_json(lab.config, "verify")
    assert (document["ok"], document["rows_rechecked"], document["max_rel_error"]) == (True, 16, 0.0)
    shown = as_json(lab.config, "show", train.root)
    assert shown["encoding"] == f"{encoding}, relative error {about['error']:.4f} at calibration"


def test_what_the_teacher_saw_is_not_written(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the codec is fitted nothing but logs has grown; afterwards no file holds a token that was seen."""
    lab.configure(CODES)
    seen: list[NDArray[np.float16]] = []
    grown: set[str] = set()
    before = tree(lab.folder)

    def watched(tokens: NDArray[np.float16], encoding: str, seed: int) -> FittedCodec:
        now = tree(lab.folder)
        grown.update(name for name, digest in now.items() if before.get(name) != digest)
        seen.append(tokens)
        return fit(tokens, encoding, seed)

    monkeypatch.setattr(calibrating, "fit", watched)
    lab.run("teach")
    told = {"logs", "lease.json", "workers.lock", "state", "references", "mlflow.db", "tracking"}
    assert {Path(name).parts[1] for name in grown} <= told
    needles = [token.astype(kind).tobytes() for token in seen[0][::3, 7] for kind in (np.float16, np.float32)]
    for path in (path for path in lab.folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        assert not any(needle in data for needle in needles), path
    (calibration,) = calibration_of(lab)
    assert sum(path.stat().st_size for path in calibration.iterdir()) < 2 * 4 * (24 * 25 + 4 * 256 * 24)


def test_another_tar_does_not_calibrate_again(lab: Lab) -> None:
    lab.configure(CODES)
    lab.run("teach")
    kept = tree(lab.workdir / "cache" / "calibration")
    lab.rewrite("alpha", 2)
    lab.configure({"datasets.alpha.path": "tars/alpha-{000000..000002}.tar"})
    assert lab.run("teach") == Work(scanned=["alpha-000002.tar"], shards={"alpha": 2})
    assert tree(lab.workdir / "cache" / "calibration") == kept
    lab.configure({"cache.views": 3})
    assert lab.run("teach") == Work(shards={"alpha": 6, "beta": 2}), "evaluation sets have another number of views"
    assert tree(lab.workdir / "cache" / "calibration") == kept


@pytest.mark.parametrize("moment", ["fit", "publish_directory"])
def test_killed_while_it_calibrates_it_begins_again_to_the_same_codec(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    lab.configure(CODES)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibrating if moment == "fit" else calibrations, moment, die)
        assert handstill("run", "teach", "-c", lab.config).code != 0
    assert calibration_of(lab) == []
    assert lab.plan()["teach"]["why"][0].startswith("calibration first")
    assert lab.run("teach") == Work(shards=ALL)
    first = tree(lab.workdir / "cache")
    assert not any("partial" in name for name in first)
    shutil.rmtree(lab.workdir / "cache")
    lab.run("teach")
    undisturbed = tree(lab.workdir / "cache")
    assert undisturbed.items() <= first.items()


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_a_lost_calibration_is_taken_from_a_cache_without_the_teacher(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    lab.configure(CODES)
    lab.run("teach")
    before = tree(lab.workdir / "cache")
    (calibration,) = calibration_of(lab)
    if how == "gone":
        shutil.rmtree(calibration)
    else:
        (calibration / CODEC_FILE).write_bytes(b"no codec")
    assert lab.plan()["teach"]["why"][0].startswith("calibration first")
    monkeypatch.setattr(calibrating, "teach_all", None)
    assert lab.run("teach") == Work()
    after = tree(lab.workdir / "cache")
    assert {name for name in before if before[name] != after[name]} == {
        str((calibration / "calibration.json").relative_to(lab.workdir / "cache"))
    }, "only what it was fitted on is forgotten"


@pytest.mark.parametrize("name", [CODEC_FILE, "calibration.json", ""])
@pytest.mark.parametrize("harm", ["flip", "delete"])
def test_a_harmed_calibration_is_named_by_verify_and_put_back_by_run(lab: Lab, name: str, harm: str) -> None:
    lab.configure(CODES)
    lab.run("teach")
    before = tree(lab.workdir / "cache")
    (calibration,) = calibration_of(lab)
    if harm == "delete":
        shutil.rmtree(calibration) if not name else (calibration / name).unlink()
    else:
        path = calibration / (name or CODEC_FILE)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    answer = handstill("-c", lab.config, "verify")
    assert answer.code == 1
    assert str(calibration / name if harm == "delete" else path) in answer.out
    assert "`handstill run teach` puts it back" in answer.out
    assert lab.run("teach") == Work()
    assert handstill("-c", lab.config, "verify").code == 0
    after = tree(lab.workdir / "cache")
    assert {path for path in before if before[path] != after[path]} <= {
        str((calibration / "calibration.json").relative_to(lab.workdir / "cache"))
    }


def test_a_calibration_of_another_encoding_is_stale(lab: Lab) -> None:
    lab.configure(CODES)
    lab.run("teach")
    (calibration,) = calibration_of(lab)
    assert str(calibration) not in as_json(lab.config, "clean", "--stale")["stale"]
    lab.configure({"cache.features": {"encoding": "pca12-int8"}})
    lab.run("teach")
    stale = as_json(lab.config, "clean", "--stale", "--yes")["stale"]
    assert str(calibration) in stale
    assert len(calibration_of(lab)) == 1
    assert lab.plan()["teach"]["todo"] == 0


def test_a_smoke_run_has_a_codec_of_its_own(lab: Lab) -> None:
    lab.configure(CODES)
    lab.run("teach", "--limit", "1")
    assert lab.plan()["teach"]["why"][0].startswith("calibration first")
    lab.run("teach")
    (small,) = lab.workdir.glob("smoke-1/cache/calibration/*")
    (real,) = calibration_of(lab)
    assert small.name != real.name


def test_more_components_than_channels_are_the_users_mistake(lab: Lab) -> None:
    lab.configure({"cache.features": {"encoding": "pca25-int8"}})
    answer = handstill("plan", "-c", lab.config)
    assert answer.code == 2
    assert "pca25-int8 wants 25 components, but this teacher's features have 24 channels" in answer.err


@pytest.mark.parametrize("encoding", ["float16", "int8", *FITTED])
@pytest.mark.parametrize("how", ["swapped rows", "another teacher"])
def test_verify_knows_features_that_are_not_of_their_picture(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, encoding: str, how: str
) -> None:
    lab.configure({"cache.features": {"encoding": encoding}})
    lab.run("teach")
    real = stages.teach.teacher_forward

    def wrong(teacher: Any, device: str) -> Forward:
        if how == "another teacher":
            for parameter in teacher.network.backbone.parameters():
                parameter.data.mul_(1.3)
        forward = real(teacher, device)

        def answer(pictures: NDArray[np.uint8], grid: Any) -> Any:
            outputs = dict(forward(pictures, grid))
            given = outputs["features"][[1, 0, 3, 2]] if how == "swapped rows" else outputs["features"]
            truth = dict(honest(pictures, grid))
            return truth | {"features": given}

        return answer

    honest: Forward
    from models.teacher import load_teacher

    checkpoint = lab.folder / "teacher" / "checkpoints" / "hamer.ckpt"
    honest = real(load_teacher(checkpoint, "open-hand", "cpu", "fp32"), "cpu")
    monkeypatch.setattr(stages.teach, "teacher_forward", wrong)
    answer = handstill("verify", "-c", lab.config, "--json")
    assert answer.code == 1
    assert len(answer.document["damaged"]) == answer.document["rows_rechecked"] == 16
    assert all("teacher's features of today" in line for line in answer.document["damaged"])


def test_the_calibration_is_noted(lab: Lab) -> None:
    lab.configure(CODES)
    lab.run("teach")
    assert [event["event"] for event in events_of(lab.config) if "calibrat" in event["event"]] == ["calibrated"]
