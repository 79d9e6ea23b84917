from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from models.hand_model import load_hand_model, save_hand_model
from models.student import Student, StudentSpec
from storage.cache import open_cache
from storage.errors import DamageError, WorkError
from storage.snapshots import read_head
from tests.tiny_cache import write_tiny_cache
from trainer import metrics as m
from trainer.cases import BEST, WORST, extreme_cases, read_table, write_table
from trainer.config import LatencyConfig
from trainer.evaluate import (
    EvaluateJob,
    EvaluationSet,
    TeacherJob,
    evaluate_student,
    evaluate_teacher,
    read_evaluation,
    score,
)
from trainer.scores import HO3D_ORDER, STUDENTS_AFFINE, Hands, Protocol, Scoring, in_students_view

LATENCY = LatencyConfig(batch_sizes=[1, 2], warmup=1, iterations=3)
VERTICES = 6


def STAND_IN(batch: dict[str, np.ndarray]) -> Hands:  # noqa: N802 - a constant in the place of a predictor
    """Answers for samples that were left out: a hand that no prediction here equals."""
    size = len(batch["sample_id"])
    return Hands(np.full((size, 21, 3), 0.5) * np.arange(21)[:, None], np.full((size, VERTICES, 3), 0.25))


def evaluation_set(
    folder: Path, protocol: Protocol | None = None, vertices: int = VERTICES, quarantined: int = 0
) -> EvaluationSet:
    options = {"n": 7, "views": 2, "role": "evaluate", "dataset": "val", "quarantined": quarantined}
    cache = write_tiny_cache(folder / "cache", truth_vertices=vertices, **options)  # type: ignore[arg-type]
    return EvaluationSet("val", cache, read_head(cache)["val"], protocol)


def perfect(protocol: Protocol | None):  # type: ignore[no-untyped-def]
    """Predicts the authors' truth: mirrored for left hands, in OpenPose order, turned to OpenCV axes."""

    def predict(batch: dict[str, np.ndarray]) -> Hands:
        side = np.where(batch["labels/right"] > 0.5, 1.0, -1.0)[:, None, None] * [1, 0, 0] + [0, 1, 1]
        joints, vertices = batch["labels/truth_xyz"], batch["labels/truth_vertices"]
        if protocol == "ho3d":
            joints, vertices = joints[:, np.argsort(HO3D_ORDER)] * [1, -1, -1], vertices * [1, -1, -1]
        return Hands(joints * side + 0.3, vertices * side + 0.3, batch["labels/keypoints_2d"][..., :2])

    return predict


@pytest.mark.parametrize("protocol", ["freihand", "ho3d"])
def test_the_truth_scores_perfectly_left_hands_and_joint_order_included(tmp_path: Path, protocol: Protocol) -> None:
    each = evaluation_set(tmp_path, protocol)
    reader = open_cache(each.cache_root, {each.dataset: each.digest})
    assert 0 < reader.read(range(7), [0] * 7, ["labels/right"])["labels/right"].sum() < 7
    found = score(reader, 0, perfect(protocol), protocol, 3, tmp_path / "out", STAND_IN).metrics()
    for name in ("pa_mpjpe_mm", "pa_mpvpe_mm", "mpjpe_mm"):
        assert found[name] == pytest.approx(0, abs=1e-3), name
    for name in ("f5", "f15", "auc", "auc_mesh", "pck_05", "pck_10", "pck_15"):
        assert found[name] == pytest.approx(1, abs=0.01), name
    joints, vertices = json.loads((tmp_path / "out" / "pred.json").read_text())
    truth = reader.read(range(7), [0] * 7)["labels/truth_xyz"]
    assert np.allclose(joints, truth - truth[:, np.argsort(HO3D_ORDER)[:1] if protocol == "ho3d" else [0]], atol=1e-5)
    assert np.shape(vertices) == (7, VERTICES, 3)


def scored_by_the_authors_rules(pred: list, xyz: np.ndarray, verts: np.ndarray) -> dict[str, float]:
    """FreiHAND's and HO-3D's evaluation, sample by sample as HAMER_SPEC 9 tells it, sharing no code with ours."""
    assert len(pred) == 2
    assert len(pred[0]) == len(pred[1]) == len(xyz)
    errors: dict[str, list[np.ndarray]] = {"joints": [], "mesh": []}
    for name, answers, truth in (("joints", pred[0], xyz), ("mesh", pred[1], verts)):
        for answer, true in zip(answers, truth, strict=True):
            a, b = np.array(answer), true.astype(np.float64)
            a, b_mean = a - a.mean(0), b.mean(0)
            scale = np.linalg.norm(b - b_mean)
            a, b0 = a / np.linalg.norm(a), (b - b_mean) / scale
            turn, shrink = orthogonal_procrustes(b0, a)
            errors[name].append(np.linalg.norm(a @ turn.T * shrink * scale + b_mean - b, axis=1))
    joints, mesh = np.array(errors["joints"]), np.array(errors["mesh"])
    limits = np.linspace(0, 0.05, 100)
    curve = np.array([[(joints[:, j] <= limit).mean() for limit in limits] for j in range(joints.shape[1])])
    auc = np.trapezoid(curve, limits, axis=1) / np.trapezoid(np.ones(100), limits)
    return {"pa_mpjpe_mm": 1e3 * joints.mean(0).mean(), "pa_mpvpe_mm": 1e3 * mesh.mean(0).mean(), "auc": auc.mean()}


@pytest.mark.parametrize("protocol", ["freihand", "ho3d"])
def test_the_authors_scripts_would_print_our_scores(tmp_path: Path, protocol: Protocol) -> None:
    each = evaluation_set(tmp_path, protocol)
    reader = open_cache(each.cache_root, {each.dataset: each.digest})
    draw = np.random.default_rng(3)

    def predict(batch: dict[str, np.ndarray]) -> Hands:
        true = perfect(protocol)(batch)
        joints, vertices = (part + draw.normal(0, 0.01, part.shape) for part in (true.keypoints_3d, true.vertices))
        return Hands(joints, vertices)

    ours = score(reader, 0, predict, protocol, 3, tmp_path, STAND_IN).metrics()
    truth = reader.read(range(7), [0] * 7)
    pred = json.loads((tmp_path / "pred.json").read_bytes())
    theirs = scored_by_the_authors_rules(pred, truth["labels/truth_xyz"], truth["labels/truth_vertices"])
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-3 if name == "auc" else 1e-4), name  # micrometres in the file


@pytest.mark.parametrize("protocol", ["freihand", "ho3d"])
def test_left_out_samples_keep_their_place_in_the_prediction_file(tmp_path: Path, protocol: Protocol) -> None:
    each = evaluation_set(tmp_path, protocol, quarantined=2)
    reader = open_cache(each.cache_root, {each.dataset: each.digest})
    assert (len(reader), reader.samples_in) == (7, 9)
    score(reader, 0, perfect(protocol), protocol, 3, tmp_path, STAND_IN)
    joints, vertices = json.loads((tmp_path / "pred.json").read_bytes())
    assert (len(joints), len(vertices)) == (9, 9)
    nobody = STAND_IN({"sample_id": np.array(["x"])}).for_authors(np.ones(1), protocol)
    at = [index for index in range(9) if np.allclose(joints[index], nobody[0][0].round(6))]
    assert at == [1, 2] == sorted(set(range(9)) - set(reader.snapshot_rows.tolist()))
    assert all(np.allclose(vertices[index], nobody[1][0].round(6)) for index in at)


def test_metrics_are_means_of_the_samples_table(tmp_path: Path) -> None:
    each = evaluation_set(tmp_path)
    reader = open_cache(each.cache_root, {each.dataset: each.digest})

    def predict(batch: dict[str, np.ndarray]) -> Hands:
        wrong = np.random.default_rng(0).normal(size=batch["labels/truth_xyz"].shape) * 0.01
        return Hands(
            batch["labels/truth_xyz"] + wrong, batch["labels/truth_vertices"], batch["labels/keypoints_2d"][..., :2]
        )

    scoring = score(reader, 0, predict, None, 4, tmp_path / "out", STAND_IN)
    write_table(tmp_path / "samples.parquet", scoring.samples())
    table = read_table(tmp_path / "samples.parquet")
    assert table["sample_id"].tolist() == reader.ids
    for name in ("pa_mpjpe_mm", "mpjpe_mm", "f5"):
        assert np.mean(table[name]) == pytest.approx(scoring.metrics()[name])
    assert table["joint_errors_mm"].mean(1) == pytest.approx(table["pa_mpjpe_mm"], rel=1e-3)
    labels = reader.read(range(7), [0] * 7, ["labels/keypoints_2d", "labels/box_size"])
    predicted = table["keypoints_2d"].reshape(7, 21, 2)
    assert predicted == pytest.approx(labels["labels/keypoints_2d"][..., :2], abs=1e-3)
    assert table["hand_px"].tolist() == labels["labels/box_size"].max(1).tolist()
    assert table["visible_share"] == pytest.approx((labels["labels/keypoints_2d"][..., 2] > 0.5).mean(1))
    assert not (tmp_path / "out" / "pred.json").exists()


def test_the_joints_of_ho3d_come_back_in_our_order(tmp_path: Path) -> None:
    each = evaluation_set(tmp_path, "ho3d")
    reader = open_cache(each.cache_root, {each.dataset: each.digest})

    def predict(batch: dict[str, np.ndarray]) -> Hands:
        hands = perfect("ho3d")(batch)
        hands.keypoints_3d[:, 8] += 0.03  # the tip of the index finger in OpenPose order
        return hands

    errors = score(reader, 0, predict, "ho3d", 3, None, STAND_IN).samples()["joint_errors_mm"]
    assert errors.argmax(1).tolist() == [8] * 7


def test_the_pictures_of_the_best_and_the_worst_samples_are_kept(tmp_path: Path) -> None:
    cache = write_tiny_cache(tmp_path / "cache", n=30, views=2, role="evaluate", dataset="val")
    reader = open_cache(cache, {"val": read_head(cache)["val"]})
    errors = np.random.default_rng(0).permutation(30).astype(float)
    errors[3] = np.nan
    columns = {"sample_id": np.array(reader.ids), "pa_mpjpe_mm": errors}
    write_table(tmp_path / "cases.parquet", extreme_cases(reader, columns, 0))
    kept = read_table(tmp_path / "cases.parquet")
    known = sorted(errors[np.isfinite(errors)])
    assert kept["error"].tolist() == known[:BEST] + known[-WORST:]
    row = reader.ids.index(kept["sample_id"][-1])
    assert errors[row] == np.nanmax(errors)
    assert kept["picture"][-1] == reader.picture_bytes(row, 0)
    label = reader.read([row], [0], ["labels/keypoints_2d"])["labels/keypoints_2d"][0]
    assert kept["label_2d"][-1].reshape(21, 3) == pytest.approx(label, abs=1e-3)


def test_what_the_teacher_said_of_its_wider_view_is_moved_into_the_students() -> None:
    theirs, ours = np.array([[1.0, 0, -100], [0, 1.0, -50]]), np.array([[-2.0, 0, 400], [0, 2.0, -100]])
    batch = {"views/affine": theirs[None], STUDENTS_AFFINE: ours[None]}
    photo_px = np.array([[[150.0, 90.0]]])
    said = (photo_px + theirs[:, 2]) / 256 - 0.5
    assert in_students_view(said, batch) == pytest.approx((photo_px * [-2, 2] + ours[:, 2]) / 256 - 0.5)


def test_without_authors_truth_the_visible_labels_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    joints = rng.normal(size=(2, 21, 3)) * 0.04
    confidence = np.ones((2, 21, 1))
    confidence[0, 3], confidence[1, 3:] = 0, 0
    pred = joints + np.array([0.1, 0, 0])
    pred[0, 3] += 1
    batch = {
        "sample_id": np.array(["a", "b"]), "labels/right": np.ones(2),
        "labels/keypoints_3d": np.concatenate([joints, confidence], -1),
        "labels/keypoints_2d": np.zeros((2, 21, 3)), "labels/box_size": np.ones((2, 2)), "views/box_px": np.ones(2),
    }  # fmt: skip
    scoring = Scoring()
    scoring.add(batch, Hands(pred, np.zeros((2, 5, 3)), np.zeros((2, 21, 2))))
    assert scoring.metrics() == pytest.approx({"pa_mpjpe_mm": 0, "mpjpe_mm": 0, "auc": 1}, abs=0.01)
    assert np.isnan(scoring.samples()["pa_mpjpe_mm"][1])  # three joints tell nothing


def test_pck_is_relative_to_the_annotated_box_not_to_the_crop() -> None:
    batch = {
        "sample_id": np.array(["a"]), "labels/right": np.ones(1), "labels/keypoints_3d": np.zeros((1, 21, 4)),
        "labels/keypoints_2d": np.concatenate([np.zeros((1, 21, 2)), np.ones((1, 21, 1))], -1),
        "labels/box_size": np.array([[50.0, 100.0]]), "views/box_px": np.array([200.0]),  # HInt's box: twice the hand's
    }  # fmt: skip
    pred = np.zeros((1, 21, 2))
    pred[0, :7, 0] = 0.04  # 8 px of a hand of 100 px
    scoring = Scoring("hint")
    scoring.add(batch, Hands(np.zeros((1, 21, 3)), np.zeros((1, 5, 3)), pred))
    assert scoring.metrics() == {"pck_05": pytest.approx(14 / 21), "pck_10": 1.0, "pck_15": 1.0}


def test_a_mesh_of_another_topology_moves_with_its_joints(tmp_path: Path) -> None:
    each = evaluation_set(tmp_path)
    reader = open_cache(each.cache_root, {each.dataset: each.digest})

    def predict(batch: dict[str, np.ndarray]) -> Hands:
        vertices = np.repeat(batch["labels/truth_vertices"], 2, axis=1)
        return Hands(batch["labels/truth_xyz"] * 3, vertices * 3, None)

    each_right = [i for i in range(7) if reader[i]["labels/right"] > 0.5]
    scoring = score(reader, 0, predict, None, 3, tmp_path / "out", STAND_IN)
    assert "pa_mpvpe_mm" not in scoring.metrics()
    assert scoring.samples()["f5"][each_right] == pytest.approx(1.0)


def test_a_prediction_that_is_no_number_names_its_sample(tmp_path: Path) -> None:
    each = evaluation_set(tmp_path)
    reader = open_cache(each.cache_root, {each.dataset: each.digest})

    def predict(batch: dict[str, np.ndarray]) -> Hands:
        joints = batch["labels/truth_xyz"].copy()
        joints[batch["sample_id"] == "val:000004#0", 3] = np.inf
        return Hands(joints, batch["labels/truth_vertices"])

    with pytest.raises(WorkError, match="keypoints_3d predicted for val:000004#0 are not finite"):
        score(reader, 0, predict, None, 3, None, STAND_IN)


def student_job(folder: Path, backbone: str = "test_efficientnet", latency: LatencyConfig = LATENCY) -> EvaluateJob:
    torch.manual_seed(0)
    Student(StudentSpec(backbone=backbone, head="light"), load_hand_model("open-hand")).save(folder / "student")
    sets = (evaluation_set(folder, "freihand"),)
    return EvaluateJob("s", 0, folder / "student", sets, folder / "out", "id", 4, latency, "cpu")


def test_a_student_is_evaluated_once(tmp_path: Path) -> None:
    job = student_job(tmp_path)
    result = evaluate_student(job)
    assert result.metrics["val"].keys() == {"pa_mpjpe_mm", "mpjpe_mm", "auc", "f5", "f15", "pck_05", "pck_10", "pck_15"}
    assert (result.samples, result.unanswered) == ({"val": 7}, {"val": 0})
    assert result.latency_ms.keys() == {"1", "2"}
    assert result.fps == pytest.approx(1000 / result.latency_ms["1"])
    assert result.whole_path is not None
    assert (result.whole_path.batch_size, result.whole_path.iterations) == (1, LATENCY.iterations)
    assert result.gflop is not None
    assert 0.01 < result.gflop < 1
    assert result.peak_memory_mb is not None
    assert result.peak_memory_mb > 100, "of a process with torch in it"
    assert "1 threads" in str(result.device)
    assert read_evaluation(job.out_dir, "id") == result == evaluate_student(job)
    assert read_evaluation(job.out_dir, "other") is None
    (job.out_dir / "evaluation.json").write_text("{}")
    with pytest.raises(DamageError, match=r"evaluation\.json is damaged"):
        evaluate_student(job)


def test_the_speed_of_a_fused_student_is_measured_when_asked_for(tmp_path: Path) -> None:
    one = {"batch_sizes": [1], "warmup": 0, "iterations": 1}
    plain, fused = (
        evaluate_student(student_job(tmp_path / str(fused), "repvit_m0_9", LatencyConfig(**one, fused=fused)))
        for fused in (False, True)
    )
    assert plain.metrics["val"] == pytest.approx(fused.metrics["val"])
    assert (plain.params_m, fused.latency.keys()) == (fused.params_m, {"1"})
    assert plain.gflop is not None
    assert fused.gflop is not None
    assert fused.gflop < plain.gflop


def test_the_teacher_is_scored_from_its_wider_view_and_the_mean_pose_beside_it(tmp_path: Path) -> None:
    each = evaluation_set(tmp_path)
    save_hand_model(load_hand_model("open-hand"), tmp_path / "hand.safetensors")
    result = evaluate_teacher(TeacherJob((each,), tmp_path / "hand.safetensors", tmp_path / "out", "id"))
    reader = open_cache(each.cache_root, {each.dataset: each.digest})
    rows = reader.read(range(7), [1] * 7)
    side = np.where(rows["labels/right"] > 0.5, 1.0, -1.0)[:, None, None] * [1, 0, 0] + [0, 1, 1]
    expected = m.pa_mpjpe_mm(rows["teacher/keypoints_3d"] * side, rows["labels/truth_xyz"])
    assert result.metrics["val"]["pa_mpjpe_mm"] == pytest.approx(expected.mean())
    assert "pck_05" in result.metrics["val"]
    assert "pck_05" not in result.mean_pose["val"]
    table = read_table(tmp_path / "out" / "val" / "samples.parquet")
    assert table["mean_pose_pa_mpjpe_mm"].mean() == pytest.approx(result.mean_pose["val"]["pa_mpjpe_mm"])
    assert len(read_table(tmp_path / "out" / "val" / "cases.parquet")["picture"]) == 7
    assert result.mean_pose["val"]["pa_mpjpe_mm"] > 0
