from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.errors import InputError
from tests.trainer.mlflow_store import Store, student
from trainer.cases import paired_metric
from trainer.compare import Comparison, best_of, compare, pareto
from trainer.config import CompareConfig, better_by
from trainer.job import student_folder
from trainer.pictures import sheet
from trainer.report import write_report
from trainer.report_figures import trade_off
from trainer.report_tables import best_cells, scores, warnings
from trainer.runs import Selection

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow 3.17 on SQLAlchemy 2.1

EXP = Selection(("exp",))
ERRORS = {"small-none": 9.0, "small-output": 8.0, "big-none": 7.0}


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
    return compare(store.uri, EXP, CompareConfig(bootstrap=100))


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
    found = compare(store.uri, Selection(("exp",), identities=frozenset({"big-none0"}))).document["students"]
    assert [(s["name"], s["seed"]) for s in found] == [("big-none", 0)]
    with pytest.raises(InputError, match="no finished student"):
        compare(store.uri, Selection(("exp",), identities=frozenset()))
    with pytest.raises(InputError, match=r"no experiment 'other' at .* \(there is: .*exp.*\); run `handstill run`"):
        compare(store.uri, Selection(("other",)))


def test_the_report_stands_alone(store: Store, comparison: Comparison, tmp_path: Path) -> None:
    png = sheet(np.zeros((3, 256, 256, 3), np.uint8), np.zeros((3, 21, 3)), np.full((3, 21, 2), 1e9))
    shown = Comparison(comparison.document, comparison.curves, {"<b>small</b>": png})
    write_report(shown, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert 'src="http' not in page
    assert "<link" not in page
    assert "<script" not in page
    assert "<b>small" not in page
    assert page.count("<svg") == 3
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "differences-val.svg", "learning-curves.svg", "trade-off-val.svg",
    ]  # fmt: skip
    assert "data:image/png;base64," in page
    rows = list(csv.reader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["student", "teacher", "mean pose", "big-none", "small-none", "small-output"]
    assert rows[5][-2] == "8.50 ± 0.707"
    assert (tmp_path / "table.md").read_text().count("\n") == 7
    tex = (tmp_path / "table.tex").read_text()
    assert tex.startswith("\\begin{tabular}{ll" + "r" * (len(rows[0]) - 2) + "}\n\\toprule\n")
    assert r"\midrule" + "\nbig-none & none & " in tex
    assert r"8.50 $\pm$ 0.707" in tex
    differences = list(csv.reader((tmp_path / "differences.csv").read_text().splitlines()))
    assert [row[:2] for row in differences[1:3]] == [["small-output", "small-none"], ["big-none", "teacher"]]
    assert json.loads((tmp_path / "comparison.json").read_text()) == comparison.document
    before = page
    write_report(shown, tmp_path)
    assert (tmp_path / "report.html").read_text() == before


def test_what_one_seed_cannot_tell_is_said_and_not_drawn(store: Store, comparison: Comparison, tmp_path: Path) -> None:
    one = compare(store.uri, Selection(("exp",), "tags.`handstill.seed` = '0'"), CompareConfig(bootstrap=100))
    rising: dict[str, dict[int | None, list[tuple[int, float]]]]
    rising = {"small-none": {0: [(50, 9.0), (100, 9.5)]}, "big-none": {0: [(50, 9.0), (100, 8.0)]}}
    write_report(Comparison(one.document, rising, {}), tmp_path / "one")
    page = (tmp_path / "one/report.html").read_text()
    assert "takes several seeds" in page
    assert "Thin: 95% over seeds" not in page
    assert "After their lowest point these got worse again: small-none. The weights" in page
    write_report(comparison, tmp_path / "two")
    page = (tmp_path / "two/report.html").read_text()
    assert "Thin: 95% over seeds" in page
    assert "takes several seeds" not in page
    assert page.count("Student&#x27;s t of") == 1, "said of the first table only"


def test_students_on_one_spot_have_one_block_of_names(comparison: Comparison) -> None:
    document = copy.deepcopy(comparison.document)
    for group, error in zip(document["by_student"], (7.999, 4.0, 8.0), strict=True):
        group["speed"], group["metrics"]["val"]["pa_mpjpe_mm"] = document["by_student"][0]["speed"], error
    first, apart, last = [group["name"] for group in document["by_student"]]
    written = [text.get_text() for text in trade_off(document, "val", "pa_mpjpe_mm").axes[0].texts]
    assert {f"{last}\n{first}", apart} <= set(written)


def test_the_one_data_set_is_named_once(comparison: Comparison, tmp_path: Path) -> None:
    write_report(comparison, tmp_path)
    header = "| student, on val | strategy | M params | fps | seeds | PA-MPJPE, mm | F@5 |"
    assert (tmp_path / "table.md").read_text().startswith(header)
    assert (tmp_path / "table.csv").read_text().startswith('student,strategy,M params,fps,seeds,"val: PA-MPJPE, mm"')
    page = (tmp_path / "report.html").read_text()
    assert "<th class=over colspan=5></th><th class=over colspan=2>val</th>" in page


def test_the_best_student_of_each_metric_is_in_bold(comparison: Comparison, tmp_path: Path) -> None:
    rows, best = scores(comparison.document), best_cells(comparison.document)
    assert {(rows[row][0], rows[0][column]) for row, column in best} == {
        ("big-none", "val: PA-MPJPE, mm"),
        *((name, "val: F@5") for name in ERRORS),  # all the same
    }
    write_report(comparison, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<td class=best>7.50 ± 0.707</td>") == 1
    assert page.count("<td class=best>") == 4


def test_students_of_one_network_share_the_mean_of_their_speeds(tmp_path: Path) -> None:
    """What their measurements differ by is noise, and must not decide who is beaten by nobody."""
    store = Store(tmp_path)
    for name, error, fps in (("a-none", 9.0, 60.0), ("a-hybrid", 8.0, 40.0), ("b-none", 10.0, 70.0)):
        store.client.log_metric(student(store, name, 0, error), "fps", fps)
    document = compare(store.uri, EXP, CompareConfig(bootstrap=100)).document
    speeds = {group["name"]: (group["fps"], group["speed"]) for group in document["by_student"]}
    assert speeds == {"a-none": (60.0, 50.0), "a-hybrid": (40.0, 50.0), "b-none": (70.0, 70.0)}
    assert document["pareto"] == {"val": ["b-none", "a-hybrid"]}


def test_speeds_of_different_machines_are_not_averaged(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name, error, fps, device in (("a-none", 9.0, 60.0, "a CPU"), ("a-hybrid", 8.0, 900.0, "a GPU")):
        run = student(store, name, 0, error)
        store.client.log_metric(run, "fps", fps)
        store.client.log_dict(run, {"device": device}, "evaluation/evaluation.json")
    comparison = compare(store.uri, EXP, CompareConfig(bootstrap=100))
    assert [group["speed"] for group in comparison.document["by_student"]] == [900.0, 60.0]
    write_report(comparison, tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "differ by noise only" not in page
    assert page.count("Speeds were measured on different machines and do not compare") == 2


def test_a_score_of_nothing_is_a_score_and_one_that_is_no_number_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    student(store, "a-none", 0, 0.0)
    student(store, "b-none", 0, float("nan"))
    document = compare(store.uri, EXP, CompareConfig(bootstrap=100)).document
    assert best_of(document) == "a-none 0 mm PA-MPJPE"
    assert [each["metrics"].get("val", {}).get("pa_mpjpe_mm") for each in document["students"]] == [0.0, None]


@pytest.mark.parametrize(
    ("gain", "words"), [(0.299, "only 29% better than"), (0.0001, "hardly better than"), (-0.1, "no better than")]
)
def test_shares_are_rounded_down(gain: float, words: str) -> None:
    assert better_by(gain) == words


def test_a_student_may_be_called_student(tmp_path: Path) -> None:
    folder = tmp_path / "student/seed-0/0123456789abcdef/student"
    folder.mkdir(parents=True)
    (folder / "student.json").touch()
    assert student_folder(tmp_path) == folder


def test_nobody_beats_those_on_the_front_in_speed_and_in_accuracy() -> None:
    def group(name: str, fps: float | None, error: float, score: float) -> dict[str, Any]:
        return {"name": name, "speed": fps, "metrics": {"val": {"pa_mpjpe_mm": error}, "hint": {"pck_05": score}}}

    groups = [
        group("fast", 90.0, 12.0, 0.6),
        group("slower and worse", 50.0, 13.0, 0.5),
        group("slower and as good", 60.0, 12.0, 0.6),
        group("good", 30.0, 8.0, 0.9),
        group("never timed", None, 1.0, 1.0),
    ]
    teacher = {"speed": 2.0, "metrics": {"val": {"pa_mpjpe_mm": 7.0}}}
    front = pareto(groups, teacher)
    assert front == {"val": ["fast", "good", "teacher"], "hint": ["fast", "good"]}


def test_a_set_without_3d_truth_is_compared_by_its_2d_errors() -> None:
    columns = {
        "sample_id": np.array(["a", "b"], object),
        "pa_mpjpe_mm": np.array([np.nan, np.nan]),
        "error_2d_share": np.array([0.1, 0.2]),
    }
    assert paired_metric(columns) == "error_2d_share"


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
    document["by_student"] = [student("good", 14.0), student("begun", 19.0), student("bad", 26.0)]
    nothing, little = warnings(document)
    assert "no worse than bad: they" in nothing
    assert "less than 30% better than the mean pose (20.00 mm PA-MPJPE): begun (5%). They are" in little
