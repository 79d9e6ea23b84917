from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from pydantic import ValidationError

import trainer.compare as compare_module
from storage.errors import InputError
from trainer.compare import Comparison, compare, paired_difference
from trainer.config import CompareConfig, GateConfig
from trainer.pictures import sheet
from trainer.report import warnings, write_report

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow 3.17 on SQLAlchemy 2.1

ERRORS = {"small-none": 9.0, "small-output": 8.0, "big-none": 7.0}


class Store:
    """An MLflow store as the pipeline leaves it."""

    def __init__(self, folder: Path) -> None:
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.folder = folder
        self.client = MlflowClient(tracking_uri=self.uri)
        self.experiment = self.client.create_experiment("exp", artifact_location=(folder / "artifacts").as_uri())

    def add(
        self, tags: dict[str, str], metrics: dict[str, float], params: dict[str, Any], status: str = "FINISHED"
    ) -> str:
        run_id: str = self.client.create_run(
            self.experiment,
            run_name=tags.get("student", "teacher"),
            tags={f"handstill.{key}": value for key, value in tags.items()},
        ).info.run_id
        self.client.log_batch(run_id, metrics=[Metric(key, value, 0, 0) for key, value in metrics.items()])
        for key, value in params.items():
            self.client.log_param(run_id, key, value)
        self.client.set_terminated(run_id, status)
        return run_id

    def add_samples(self, run_id: str, dataset: str, errors: np.ndarray) -> None:
        ids = [f"s{i}" for i in range(len(errors))]
        path = self.folder / "samples.parquet"
        pq.write_table(pa.table({"sample_id": ids, "pa_mpjpe_mm": errors, "f5": errors}), path)
        self.client.log_artifact(run_id, str(path), f"evaluation/{dataset}")


def student(store: Store, name: str, seed: int, error: float, **more: Any) -> str:
    tags = {
        "kind": "student", "student": name, "seed": str(seed), "strategy": name.split("-")[1],
        "backbone": name.split("-")[0], "identity": f"{name}{seed}",
    }  # fmt: skip
    metrics = {"val/pa_mpjpe_mm": error, "val/f5": 0.5, "latency_ms/1": 20.0, "fps": 50.0, "params_m": 4.0}
    run_id = store.add(tags, metrics | {"loss": 1.0, "label/betas": 2.0}, {"head": "light"}, **more)
    for step in (10, 20):
        store.client.log_metric(run_id, "validation/pa_mpjpe_mm", error + 20 - step, step=step)
    store.add_samples(run_id, "val", error + np.linspace(-1, 1, 40))
    return run_id


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("mlflow"))
    for name, error in ERRORS.items():
        for seed in (0, 1):
            student(store, name, seed, error + seed)
    student(store, "small-none", 0, 99.0, status="FAILED")
    metrics = {"val/pa_mpjpe_mm": 6.0, "mean_pose/val/pa_mpjpe_mm": 20.0, "params_m": 671.0}
    teacher = store.add({"kind": "teacher"}, metrics, {})
    store.add_samples(teacher, "val", np.full(40, 6.0))
    return store


@pytest.fixture(scope="module")
def comparison(store: Store) -> Comparison:
    return compare(store.uri, "exp", CompareConfig(bootstrap=100))


def test_the_document_is_what_scripts_rely_on(comparison: Comparison) -> None:
    document = comparison.document
    assert document["teacher"]["metrics"] == {"val": {"pa_mpjpe_mm": 6.0}}
    assert document["teacher"]["mean_pose"] == {"val": {"pa_mpjpe_mm": 20.0}}
    assert document["gate"]["passed"] is True
    first = document["students"][0]
    assert {key: first[key] for key in ("name", "seed", "backbone", "strategy", "params_m", "fps", "latency_ms")} == {
        "name": "big-none", "seed": 0, "backbone": "big", "strategy": "none", "params_m": 4.0, "fps": 50.0,
        "latency_ms": {"1": 20.0},
    }  # fmt: skip
    assert first["metrics"] == {"val": {"pa_mpjpe_mm": 7.0, "f5": 0.5}}
    assert len(first["run_id"]) == 32


def test_seeds_become_mean_and_deviation(comparison: Comparison) -> None:
    group = {g["name"]: g for g in comparison.document["by_student"]}["small-output"]
    assert (group["seeds"], group["metrics"]["val"]["pa_mpjpe_mm"]) == (2, 8.5)
    assert group["std"]["val"]["pa_mpjpe_mm"] == pytest.approx(np.sqrt(0.5))


def test_students_are_paired_with_the_plain_one_of_their_backbone_and_with_the_teacher(comparison: Comparison) -> None:
    pairs = {(p["student"], p["baseline"]): p for p in comparison.document["paired"]}
    assert pairs.keys() == {
        ("small-output", "small-none"), ("small-output", "teacher"), ("small-none", "teacher"), ("big-none", "teacher"),
    }  # fmt: skip
    against_plain = pairs["small-output", "small-none"]
    assert against_plain["difference"] == pytest.approx(-1.0)
    assert against_plain["low"] == pytest.approx(-1.0)
    assert against_plain["samples"] == 40


def test_only_the_named_identities_and_the_last_runs_count(store: Store) -> None:
    found = compare(store.uri, "exp", identities={"big-none0"}).document["students"]
    assert [(s["name"], s["seed"]) for s in found] == [("big-none", 0)]
    with pytest.raises(InputError, match="no finished student"):
        compare(store.uri, "exp", identities=set())
    with pytest.raises(InputError, match="no experiment 'other'"):
        compare(store.uri, "other")


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        ({"limit": 7.5}, True),
        ({"limit": 7.4}, False),
        ({"limit": 7.5, "students": ["big-none", "small-none"]}, False),
        ({"teacher_ratio": 1.25}, True),
        ({"teacher_ratio": 1.2}, False),
        ({"better_than_mean_pose": True}, True),
        ({"metric": "f5", "limit": 0.5}, True),
        ({"metric": "f5", "limit": 0.51}, False),
    ],
)
def test_the_gate(store: Store, gate: dict[str, Any], passed: bool) -> None:
    config = CompareConfig(gate=GateConfig(dataset="val", **gate), bootstrap=100)
    assert compare(store.uri, "exp", config).passed is passed


@pytest.mark.parametrize(
    ("gate", "named"),
    [
        ({"dataset": "vall", "limit": 1}, "on vall"),
        ({"dataset": "val", "students": ["nobody"]}, "nobody"),
        ({"dataset": "val", "metric": "f5", "teacher_ratio": 2}, "teacher_ratio"),
    ],
)
def test_a_gate_on_what_is_not_there_is_the_users_mistake(store: Store, gate: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        compare(store.uri, "exp", CompareConfig(gate=GateConfig(**gate), bootstrap=100))


def test_a_metric_that_does_not_exist_is_seen_before_anything_runs() -> None:
    with pytest.raises(ValidationError, match="'mpjpe'"):
        GateConfig.model_validate({"dataset": "val", "metric": "mpjpe"})


def test_a_bootstrap_interval_covers_the_difference_and_ignores_unknowns() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(1.0, 1.0, 500), rng.normal(0.5, 1.0, 500)
    a[:5] = np.nan
    mean, low, high = paired_difference(a, b, 500)
    assert low < mean < high
    assert mean == pytest.approx((a - b)[5:].mean())
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(2 / 495), rel=0.2)


def test_the_report_stands_alone(store: Store, comparison: Comparison, tmp_path: Path) -> None:
    png = sheet(np.zeros((3, 256, 256, 3), np.uint8), np.zeros((3, 21, 3)), np.full((3, 21, 2), 1e9))
    shown = Comparison(comparison.document, comparison.curves, {"<b>small</b>": png})
    write_report(shown, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert 'src="http' not in page
    assert "<link" not in page
    assert "<script" not in page
    assert "<b>small" not in page
    assert page.count("<svg") == 2
    assert "data:image/png;base64," in page
    rows = list(csv.reader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["student", "teacher", "mean pose", "big-none", "small-none", "small-output"]
    assert rows[5][-2] == "8.50 ± 0.707"
    assert (tmp_path / "table.md").read_text().count("\n") == 7
    tex = (tmp_path / "table.tex").read_text()
    assert tex.startswith("\\begin{tabular}{ll" + "r" * (len(rows[0]) - 2) + "}\n\\toprule\n")
    assert r"\midrule" + "\nbig-none & none & " in tex
    assert r"8.50 $\pm$ 0.707" in tex
    before = page
    write_report(shown, tmp_path)
    assert (tmp_path / "report.html").read_text() == before


def test_nobody_beats_those_on_the_front_in_speed_and_in_accuracy() -> None:
    def group(name: str, fps: float | None, error: float, score: float) -> dict[str, Any]:
        return {"name": name, "fps": fps, "metrics": {"val": {"pa_mpjpe_mm": error}, "hint": {"pck_05": score}}}

    groups = [
        group("fast", 90.0, 12.0, 0.6),
        group("slower and worse", 50.0, 13.0, 0.5),
        group("slower and as good", 60.0, 12.0, 0.6),
        group("good", 30.0, 8.0, 0.9),
        group("never timed", None, 1.0, 1.0),
    ]
    teacher = {"fps": 2.0, "metrics": {"val": {"pa_mpjpe_mm": 7.0}}}
    front = compare_module._pareto(groups, teacher)
    assert front == {"val": ["fast", "good", "teacher"], "hint": ["fast", "good"]}


def test_a_set_without_3d_truth_is_compared_by_its_2d_errors() -> None:
    columns = {
        "sample_id": np.array(["a", "b"], object),
        "pa_mpjpe_mm": np.array([np.nan, np.nan]),
        "error_2d_share": np.array([0.1, 0.2]),
    }
    errors = compare_module._errors(columns)
    assert errors is not None
    assert (errors.metric, errors.by_id) == ("error_2d_share", {"a": 0.1, "b": 0.2})


def test_the_report_warns_of_students_that_the_mean_pose_beats() -> None:
    def student(name: str, error: float) -> dict[str, Any]:
        return {"name": name, "metrics": {"val": {"pa_mpjpe_mm": error}}}

    document = {
        "teacher": {"mean_pose": {"val": {"pa_mpjpe_mm": 20.0}}},
        "by_student": [student("good", 12.0), student("bad", 26.0)],
    }
    (line,) = warnings(document)
    assert "bad" in line
    assert "good" not in line
    document["by_student"] = [student("good", 12.0)]
    assert warnings(document) == []
