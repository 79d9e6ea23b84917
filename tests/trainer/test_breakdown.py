from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from mlflow.entities import Metric

from storage.encodings import encode_picture
from trainer.breakdown import by_difficulty, by_joint
from trainer.cases import Columns
from trainer.origins import COMMAND, COMMIT, CONFIGURATION, cost, origin
from trainer.pairing import all_pairs, budget_differences, paired, recipe_differences
from trainer.report_cases import cases_html, sheet_png
from trainer.runs import Runs, StudentRun, by_name
from trainer.showcase import find_cases

N = 16
IDS = np.array([f"val:{i:02d}#0" for i in range(N)], object)


def run(name: str, seed: int | None = 0, *, experiment: str = "exp", kind: str = "student", **more: Any) -> StudentRun:
    params = {"steps": "100", "batch_size": "8", "on": "['a']", "lr": "0.1", "distill.outputs": "0.3", "head": "light"}
    strategy = name.partition("-")[2]
    found = StudentRun(
        f"{experiment}/{name}/{seed}", kind, name, seed, strategy, "net", name, params, {"val": {"pa_mpjpe_mm": 1.0}},
        {}, {}, None, None, experiment,
    )  # fmt: skip
    return replace(found, **more)


class Told:
    """Runs as MLflow would tell of them, from what a test says."""

    def __init__(self, tables: dict[str, Columns], cases: dict[str, Columns] | None = None) -> None:
        self.tables, self.kept = tables, cases or {}
        self.points: list[Metric] = []

    def samples(self, of: StudentRun, dataset: str) -> Columns | None:
        return self.tables.get(of.run_id)

    def cases(self, of: StudentRun, dataset: str) -> Columns | None:
        return self.kept.get(of.run_id)

    def history(self, of: StudentRun, metric: str) -> list[Metric]:
        return self.points

    def as_runs(self) -> Runs:
        return cast(Runs, self)


def table(errors: np.ndarray, **more: np.ndarray) -> Columns:
    return {"sample_id": IDS, "pa_mpjpe_mm": errors.astype(float), **more}


def test_joints_are_averaged_over_samples_and_seeds() -> None:
    joints = np.tile(np.arange(21.0), (N, 1))
    joints[0] = np.nan
    a, b = run("a-none", 0), run("a-none", 1)
    tables = {
        a.run_id: table(np.ones(N), joint_errors_mm=joints),
        b.run_id: table(np.ones(N), joint_errors_mm=joints + 2),
    }
    found = by_joint(Told(tables).as_runs(), {"a-none": [a, b]}, "val")
    assert found is not None
    assert found["error_mm"]["a-none"] == pytest.approx(np.arange(21.0) + 1)
    assert (found["joints"][0], found["joints"][8]) == ("wrist", "index tip")
    assert by_joint(Told({}).as_runs(), {"a-none": [a]}, "val") is None


def test_difficulty_cuts_the_samples_into_quarters_from_easy_to_hard() -> None:
    student, teacher = run("a-none"), run("teacher", None, kind="teacher")
    hard = np.arange(N)[::-1].astype(float)
    seen = np.ones(N)
    tables = {
        student.run_id: table(hard * 10, hand_px=100 - hard, visible_share=seen),
        teacher.run_id: table(hard, mean_pose_pa_mpjpe_mm=-hard + 50),
    }
    members = {"a-none": [student], "teacher": [teacher]}
    found = {each["kind"]: each for each in by_difficulty(Told(tables).as_runs(), members, teacher, "val")}
    assert found.keys() == {"teacher_error", "mean_pose", "small_hand"}, "what everybody has is no difficulty"
    assert found["teacher_error"]["error"]["a-none"] == [15.0, 55.0, 95.0, 135.0]
    assert (found["teacher_error"]["from"], found["teacher_error"]["to"]) == ([0, 4, 8, 12], [3, 7, 11, 15])
    assert found["mean_pose"]["error"]["a-none"] == [135.0, 95.0, 55.0, 15.0]
    assert found["small_hand"]["error"]["a-none"] == [15.0, 55.0, 95.0, 135.0], "a small hand is a hard one"
    assert (found["small_hand"]["from"][0], found["small_hand"]["to"][0]) == (97.0, 100.0)
    assert found["teacher_error"]["samples"] == [4, 4, 4, 4]
    few = {key: {name: column[:11] for name, column in each.items()} for key, each in tables.items()}
    assert by_difficulty(Told(few).as_runs(), members, teacher, "val") == []


def test_hidden_joints_are_a_difficulty_where_labels_differ() -> None:
    student = run("a-none")
    seen = np.where(np.arange(N) < 12, 1.0, 0.5)
    told = Told({student.run_id: table(np.where(seen < 1, 9.0, 1.0), visible_share=seen)})
    (found,) = by_difficulty(told.as_runs(), {"a-none": [student]}, None, "val")
    assert (found["kind"], found["samples"], found["error"]["a-none"]) == ("hidden", [12, 4], [1.0, 9.0])


def test_the_worst_and_the_best_are_shown_with_what_everybody_said() -> None:
    student, other, teacher = run("a-none"), run("b-none"), run("teacher", None, kind="teacher")
    points = np.zeros((N, 42))
    errors = np.arange(N).astype(float)
    picture = encode_picture(np.full((256, 256, 3), 120, np.uint8), "jpeg", 90)
    kept = {
        "sample_id": IDS, "error": errors, "picture": np.array([picture] * N, object), "label_2d": np.zeros((N, 63)),
    }  # fmt: skip
    told = Told(
        {
            student.run_id: table(errors, keypoints_2d=points),
            other.run_id: table(errors * 3, keypoints_2d=points),
            teacher.run_id: table(errors[::-1]),
        },
        {student.run_id: kept},
    )
    members = {"a-none": [student], "b-none": [other], "teacher": [teacher]}
    found = find_cases(told.as_runs(), members, "val", 4)
    assert [case.sample_id for case in found] == [
        "val:15#0",
        "val:14#0",
        "val:13#0",
        "val:12#0",
        "val:00#0",
        "val:01#0",
    ]
    assert [case.worst for case in found] == [True] * 4 + [False] * 2
    assert [(each.name, each.error) for each in found[0].answers] == [("teacher", 0), ("a-none", 15), ("b-none", 45)]
    assert found[0].answers[0].points is None
    page = cases_html({"val": found})
    assert page.count("<img") == 6 * 5
    assert "b-none: PA-MPJPE 45.00 mm" in page
    assert sheet_png(found[0])[:4] == b"\x89PNG"
    assert find_cases(told.as_runs(), members, "val", 0) == []


def test_pairs_say_whether_their_budgets_are_equal() -> None:
    plain, longer = run("a-none"), run("a-hybrid")
    longer = replace(longer, params=longer.params | {"steps": "200", "distill.outputs": "0.9"})
    assert budget_differences([longer], [plain]) == ["steps 200 against 100"]
    assert recipe_differences([longer], [plain]) == []
    slower = replace(plain, params=plain.params | {"lr": "0.2"})
    assert (budget_differences([slower], [plain]), recipe_differences([slower], [plain])) == (
        [],
        ["lr 0.2 against 0.1"],
    )
    newer = replace(plain, training={"a": "d2"})
    older = replace(plain, training={"a": "d1"})
    assert budget_differences([newer], [older]) == ["other snapshots of the training data"]
    assert budget_differences([plain, run("a-none", 1)], [plain]) == ["2 against 1 seeds"]


def test_strategies_meet_those_of_their_architecture_and_what_distils_more_comes_first() -> None:
    runs = [run("a-none"), run("a-hybrid"), run("b-none", backbone="other"), run("a-none", 1)]
    teacher = run("teacher", None, kind="teacher")
    told = Told({each.run_id: table(np.arange(N) + at) for at, each in enumerate([*runs, teacher])})
    found = all_pairs(told.as_runs(), by_name(runs), {"exp": teacher}, 50)
    assert [(each["student"], each["baseline"]) for each in found] == [
        ("a-hybrid", "a-none"), ("a-none", "teacher"), ("a-hybrid", "teacher"), ("b-none", "teacher"),
    ]  # fmt: skip
    first = found[0]
    assert (first["equal_budget"], first["differs"]) == (False, ["1 against 2 seeds"])
    assert first["difference"] == pytest.approx(1 - 1.5)


def test_only_shared_samples_are_paired_and_other_snapshots_are_told() -> None:
    a, b = run("a-hybrid", evaluated={"val": "x"}), run("a-none", evaluated={"val": "y"})
    errors = np.arange(N).astype(float)
    short = {"sample_id": IDS[4:][::-1], "pa_mpjpe_mm": errors[4:][::-1] - 1}
    pair = paired(Told({a.run_id: table(errors), b.run_id: short}).as_runs(), [a], [b], "val", 50)
    assert pair is not None
    assert (pair.interval.mean, pair.interval.count) == (1.0, N - 4)
    assert paired(Told({a.run_id: table(errors)}).as_runs(), [a], [b], "val", 50) is None


def test_students_of_one_name_in_two_experiments_are_told_apart() -> None:
    groups = by_name([run("a-none"), run("a-none", experiment="other"), run("b-none")])
    assert list(groups) == ["exp/a-none", "other/a-none", "b-none"]


def test_hours_leave_out_the_pauses() -> None:
    told = Told({})
    seconds = [0, 10, 20, 30, 5030, 5040]  # killed after 30 s, resumed much later
    told.points = [Metric("system/process_cpu_cores", 2.0, 1000 * s, s) for s in seconds]
    student = run("a-none", numbers={"system/gpu_0_memory_usage_megabytes": 1.0})
    assert cost(told.as_runs(), student) == pytest.approx(
        {"hours": 40 / 3600, "cpu_hours": 80 / 3600, "gpu_hours": 40 / 3600}
    )
    assert cost(told.as_runs(), run("a-none"))["gpu_hours"] == 0
    assert cost(Told({}).as_runs(), student)["hours"] is None


def test_the_line_that_makes_a_run_again() -> None:
    tags = {COMMIT: "c0ffee", CONFIGURATION: "ab", COMMAND: "handstill -c 'my file.yaml' run --limit 3"}
    found = origin(run("a-none", tags=tags, training={"a": "d1"}), "sqlite:////my runs/mlflow.db")
    assert found["line"] == (
        "git checkout c0ffee && MLFLOW_TRACKING_URI='sqlite:////my runs/mlflow.db' mlflow artifacts download "
        "-r exp/a-none/0 -a configuration -d . && mv configuration/pipeline.yaml again-exp/a-no.yaml && "
        "handstill -c again-exp/a-no.yaml run --limit 3"
    )
    assert (found["training"], found["dirty"]) == ({"a": "d1"}, False)
    assert origin(run("a-none"), "http://mlflow:5000")["line"] == ""
