"""What an audit says of caches whose numbers are known."""

from __future__ import annotations

import csv
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from stages.audit import AuditedCache, computed_by_threads, partitions_at_once, shard_jobs, tally_of
from stages.audit_document import OVERALL, drifts, findings, statistics, with_overall
from stages.audit_pages import features_figure, files_of
from stages.contact_sheet import png
from stages.tally import Tally, open_shard
from storage.errors import DamageError, InputError
from storage.reading import open_cache
from storage.snapshots import read_head
from tests import tiny_cache
from tests.tiny_cache import write_tiny_cache

Spoil = Callable[[dict[str, NDArray[Any]]], None]


def spoil_one_in(monkeypatch: pytest.MonkeyPatch, every: int, spoil: Spoil) -> None:
    """Let the tiny caches that are written from now on have odd values in every so-manieth sample."""
    teacher, seen = tiny_cache.teacher, [0]

    def spoilt(*arguments: Any) -> dict[str, NDArray[Any]]:
        values = teacher(*arguments)
        if seen[0] % every == 0:
            spoil(values)
        seen[0] += 1
        return values

    monkeypatch.setattr(tiny_cache, "teacher", spoilt)


def audited(root: Path, name: str = "train") -> AuditedCache:
    return AuditedCache(name, root, read_head(root))


def tallies_of(root: Path, other: Path | None = None, workers: int = 1, worst: int = 5) -> dict[str, Tally]:
    jobs = shard_jobs(audited(root), worst, None if other is None else audited(other, "against"))
    return {name: tally_of(found, computed_by_threads(workers)) for name, found in jobs.items()}


def stats_of(root: Path) -> dict[str, Any]:
    return {name: statistics(tally) for name, tally in tallies_of(root).items()}


def unfit(root: Path) -> list[str]:
    return [finding.what for finding in findings("train", stats_of(root)) if finding.severity == "unfit"]


@pytest.mark.parametrize("encoding", ["float16", "int8", "pca8-int8", "codes2"])
def test_channels_have_the_moments_of_the_decoded_features(tmp_path: Path, encoding: Any) -> None:
    root = write_tiny_cache(tmp_path, n=11, views=2, samples_per_shard=4, encoding=encoding, quarantined=1)
    reader = open_cache(root)
    rows = [row for row in range(len(reader)) for _ in range(2)]
    features = reader.read(rows, [0, 1] * len(reader))["teacher/features"].astype(np.float64)
    found = tallies_of(root)["tiny"]
    assert found.counts["samples"] == len(reader) == 11
    for view in range(2):
        exact = features[view::2].reshape(-1, 32)
        moments = found.features[view]
        assert moments.count.tolist() == [len(exact)] * 32
        np.testing.assert_allclose(moments.mean, exact.mean(0), atol=1e-6)
        np.testing.assert_allclose(moments.std, exact.std(0), rtol=1e-5)
        np.testing.assert_array_equal(moments.low, exact.min(0))
        np.testing.assert_array_equal(moments.high, exact.max(0))


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    root = write_tiny_cache(tmp_path, n=40, views=1, samples_per_shard=1)
    assert pickle.dumps(tallies_of(root, workers=4)) == pickle.dumps(tallies_of(root, workers=1))


def test_a_plausible_cache_has_nothing_to_find(tmp_path: Path) -> None:
    root = write_tiny_cache(tmp_path)
    stats = stats_of(root)["tiny"]
    assert findings("train", {"tiny": stats}) == []
    assert stats["features"]["int8"]["at_limit_a_token"] == pytest.approx(1, abs=0.05)
    assert stats["outputs"]["rotation_error"]["max"] < 1e-6
    assert stats["outputs"]["camera_scale"]["mean"] == pytest.approx(0.9)


def _nan_camera(values: dict[str, NDArray[Any]]) -> None:
    values["teacher/cam"][0, 1] = np.nan


def _mirrored(values: dict[str, NDArray[Any]]) -> None:
    values["teacher/hand_pose"][1, 3] *= -1


def _sheared(values: dict[str, NDArray[Any]]) -> None:
    values["teacher/global_orient"][0, 0, 0, 1] += 0.01


def _behind(values: dict[str, NDArray[Any]]) -> None:
    values["teacher/cam"][:, 0] = -0.5


def _giant(values: dict[str, NDArray[Any]]) -> None:
    values["teacher/keypoints_3d"] *= 20


def _far_off(values: dict[str, NDArray[Any]]) -> None:
    values["teacher/keypoints_2d"] += 5


def _misshapen(values: dict[str, NDArray[Any]]) -> None:
    values["teacher/betas"][:, 4] = -40


def _infinite_features(values: dict[str, NDArray[Any]]) -> None:
    values["teacher/features"][0, 2, 2, 7] = np.inf


def _infinite_joints(values: dict[str, NDArray[Any]]) -> None:
    values["teacher/keypoints_3d"][:, 0, 2] = np.inf
    values["teacher/keypoints_2d"][1, 4] = [np.inf, -np.inf]


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (_nan_camera, "not finite"),
        (_infinite_joints, "not finite"),
        (_infinite_features, "not finite"),
        (_mirrored, "rotation_error"),
        (_sheared, "rotation_error"),
        (_behind, "camera_scale"),
        (_giant, "hand_size"),
        (_far_off, "frame"),
        (_misshapen, "beta_magnitude"),
    ],
)
def test_impossible_values_make_a_cache_unfit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Spoil, what: str
) -> None:
    spoil_one_in(monkeypatch, 12, spoil)
    root = write_tiny_cache(tmp_path, encoding="float16")
    assert set(unfit(root)) == {what}
    files_of({"findings": [], "caches": {}}, {"train": (root, with_overall(tallies_of(root, other=root)))})


def test_few_odd_answers_are_only_to_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_one_in(monkeypatch, 120, _behind)
    root = write_tiny_cache(tmp_path, n=120, views=1, samples_per_shard=60)
    (found,) = findings("train", stats_of(root))
    assert (found.severity, found.what, found.dataset) == ("look", "camera_scale", "tiny")
    assert "1 of 120 views" in found.text


def test_dead_and_exploding_channels_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(values: dict[str, NDArray[Any]]) -> None:
        values["teacher/features"][..., 3] = 7
        values["teacher/features"][..., 20] *= 60

    spoil_one_in(monkeypatch, 1, spoil)
    root = write_tiny_cache(tmp_path, encoding="float16")
    stats = stats_of(root)
    assert (stats["tiny"]["features"]["dead"], stats["tiny"]["features"]["exploding"]) == ([3], [20])
    assert [(f.severity, f.what) for f in findings("train", stats)] == [
        ("look", "dead channels"),
        ("look", "exploding channels"),
    ]


def test_features_that_say_nothing_are_unfit_and_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(values: dict[str, NDArray[Any]]) -> None:
        values["teacher/features"][:] = 0
        values["teacher/features_scale"][:] = 0

    spoil_one_in(monkeypatch, 1, spoil)
    root = write_tiny_cache(tmp_path)
    assert unfit(root) == ["dead channels"]
    tallies = with_overall(tallies_of(root))
    assert tallies["tiny"].counts["zero_scale"] == tallies["tiny"].counts["tokens"] == 12 * 3 * 64
    picture = Image.open(io.BytesIO(png(features_figure({"train": tallies}))))
    assert min(picture.size) > 300


def test_the_sample_with_a_wrong_label_is_the_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher says what the labels say, of sample 7 a hand that lies a quarter of the picture beside it."""

    def agreeing(rng: np.random.Generator, views: int) -> dict[str, NDArray[Any]]:
        values = hand(rng, views)
        labels.append(values)
        return values

    def saying(*arguments: Any) -> dict[str, NDArray[Any]]:
        values, label = teacher(*arguments), labels[-1]
        points = label["labels/keypoints_2d"][..., :2] * 0.5
        label["labels/keypoints_2d"][..., :2] = points
        away = np.array([0.25, 0]) if len(labels) == 8 else np.array([0.0, 0])
        joints = label["labels/keypoints_3d"][..., :3] * (1 if len(labels) != 8 else [1, 1, 0.5])
        return values | {
            "teacher/keypoints_2d": (points + away).astype(np.float32),
            "teacher/keypoints_3d": joints.astype(np.float32),
        }

    labels: list[dict[str, NDArray[Any]]] = []
    hand, teacher = tiny_cache.hand, tiny_cache.teacher
    monkeypatch.setattr(tiny_cache, "hand", agreeing)
    monkeypatch.setattr(tiny_cache, "teacher", saying)
    root = write_tiny_cache(tmp_path)
    found = tallies_of(root)["tiny"]
    worst = {measure: offenders[0] for measure, offenders in found.worst.items()}
    assert {offender.sample_id for offender in worst.values()} == {"tiny:000007#0"}
    assert worst["px"].value == pytest.approx(64, rel=1e-5)
    assert worst["px"].values["root_mm"] > worst["px"].values["pa_mm"] > 1
    assert [offender.value for offender in found.worst["px"][1:]] == pytest.approx([0] * 4, abs=1e-4)
    assert open_shard(root, worst["px"].shard).sample_ids[worst["px"].row] == "tiny:000007#0"


def test_labels_without_confidence_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = tiny_cache.hand

    def unlabelled(rng: np.random.Generator, views: int) -> dict[str, NDArray[Any]]:
        values = hand(rng, views)
        values["labels/keypoints_3d"][..., 3] = 0
        values["labels/keypoints_2d"][:, 3:, 2] = 0.1
        return values

    monkeypatch.setattr(tiny_cache, "hand", unlabelled)
    said = stats_of(write_tiny_cache(tmp_path))["tiny"]["disagreement"]
    assert {name: (found["samples"], found["mean"]) for name, found in said.items()} == dict.fromkeys(said, (0, None))


def test_a_sample_is_judged_by_its_best_view(tmp_path: Path) -> None:
    found = tallies_of(write_tiny_cache(tmp_path, n=6, views=3))["tiny"]
    by_view, best = found.distances["px"].total[:3] / 6, found.distances["px"].total[3] / 6
    assert best < by_view.min()


def test_drift_names_the_channels_and_the_joints_that_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_tiny_cache(tmp_path / "before", n=12, encoding="float16", samples_per_shard=5)

    def drifted(values: dict[str, NDArray[Any]]) -> None:
        values["teacher/features"][..., 5] += 2
        values["teacher/keypoints_2d"] += np.float32(0.125)

    spoil_one_in(monkeypatch, 1, drifted)
    after = write_tiny_cache(tmp_path / "after", n=9, encoding="float16", samples_per_shard=4)
    said = drifts(tallies_of(before, after), tallies_of(after))["tiny"]
    assert said["common_views"] == 9 * 3
    assert said["joints"]["px"]["mean"] == pytest.approx(0.125 * np.sqrt(2) * 256)
    assert said["joints"]["mm"]["max"] == 0
    assert said["features"]["relative_frechet"] > 0.1
    top = {each["channel"]: each for each in said["features"]["top"]}
    assert said["features"]["top"][0]["channel"] == 5
    assert top[5]["mean_shift"] == pytest.approx(2 / tallies_of(before)["tiny"].features.over_first().std[5], rel=0.1)
    assert top[5]["variance_ratio"] == pytest.approx(1, abs=0.2)
    assert said["features"]["drifted"] >= 1
    same = drifts(tallies_of(before, before), tallies_of(before))["tiny"]
    assert (same["features"]["relative_frechet"], same["features"]["drifted"]) == (0, 0)
    assert (same["common_views"], same["joints"]["px"]["max"]) == (36, 0)


def test_features_of_other_widths_are_not_compared(tmp_path: Path) -> None:
    one, other = (write_tiny_cache(tmp_path, n=2, channels=channels) for channels in (8, 16))
    drifted = drifts(tallies_of(one, other), tallies_of(other))
    assert drifted["tiny"]["features"] is None
    assert [finding.what for finding in findings("train", {}, drifted)] == ["drift"]


def test_the_files_of_an_audit(tmp_path: Path) -> None:
    root = write_tiny_cache(tmp_path, n=14, dataset="one")
    write_tiny_cache(tmp_path, n=3, dataset="two")
    tallies = with_overall(tallies_of(root))
    stats = {name: statistics(tally) for name, tally in tallies.items()}
    assert stats[OVERALL]["samples"] == 17
    cache = {"fingerprint": root.name, "datasets": stats, "drift": {}, "against": None}
    files = files_of({"findings": [], "caches": {"train": cache}}, {"train": (root, tallies)})
    assert sorted(files) == [
        "audit.json", "audit.md", "channels.parquet", "disagreement.png", "features.png", "worst.csv",
    ]  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(files["worst.csv"].decode())))
    assert len(rows) == (5 + 3) * 3
    assert [row["rank"] for row in rows if (row["dataset"], row["measure"]) == ("two", "px")] == ["1", "2", "3"]
    values = [float(row["value"]) for row in rows if (row["dataset"], row["measure"]) == ("one", "pa_mm")]
    assert values == sorted(values, reverse=True)
    channels = pq.read_table(io.BytesIO(files["channels.parquet"]))
    assert channels.num_rows == 3 * 32
    assert "| two | 3 |" in files["audit.md"].decode()
    for name in ("features.png", "disagreement.png"):
        picture = np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB"))
        assert picture.std() > 10, f"{name} is blank"
    again = files_of({"findings": [], "caches": {"train": cache}}, {"train": (root, tallies)})
    assert again == files


def test_the_worst_of_all_shards_are_listed(tmp_path: Path) -> None:
    many = tallies_of(write_tiny_cache(tmp_path / "many", n=11, samples_per_shard=2), worst=7)["tiny"].worst["px"]
    one = tallies_of(write_tiny_cache(tmp_path / "one", n=11, samples_per_shard=11), worst=11)["tiny"].worst["px"]
    assert [each.sample_id for each in many] == [each.sample_id for each in one[:7]]
    assert [each.value for each in many] == [each.value for each in one[:7]]
    assert len(one) == 11


def test_damage_stops_an_audit(tmp_path: Path) -> None:
    root = write_tiny_cache(tmp_path)
    victim = next(root.glob("shards/*/teacher/features/c.*"))
    data = bytearray(victim.read_bytes())
    data[1000] ^= 1
    victim.write_bytes(data)
    with pytest.raises(DamageError, match="crc32c"):
        tallies_of(root)


def test_a_shard_that_is_gone_stops_an_audit(tmp_path: Path) -> None:
    root = write_tiny_cache(tmp_path)
    jobs = shard_jobs(audited(root), 1)["tiny"]
    (root / "ledger" / f"{jobs[0].input_hash}.json").unlink()
    with pytest.raises(DamageError, match="handstill run"):
        tally_of(jobs, computed_by_threads(1))


def test_memory_decides_how_many_shards_are_read_at_a_time() -> None:
    assert partitions_at_once(1000, 400, 100, cores=16) == 6
    assert partitions_at_once(1000, 400, 100, cores=4) == 4
    with pytest.raises(InputError, match=r"audit\.memory_gib: found 1\.00.*at least 1\.25"):
        partitions_at_once(2**30, 2**30, 2**28, cores=4)
