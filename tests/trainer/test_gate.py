from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from pydantic import ValidationError

from storage.errors import InputError
from tests.trainer.mlflow_store import Store, student
from trainer.compare import compare
from trainer.config import CompareConfig, GateConfig
from trainer.runs import Selection, split_registered

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow 3.17 on SQLAlchemy 2.1

EXP = Selection(("exp",))
NOISE = np.random.default_rng(0).normal(0, 1.0, 200)
"""What a sample has in common with itself under another network; the rest of the error is `OWN`."""
OWN = np.random.default_rng(1).normal(0, 0.5, 200)
OWN -= OWN.mean()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """base 8.0; close-new 0.02 worse, its interval over both sides of 0.05; bad-new surely worse; good-new surely
    better."""
    store = Store(tmp_path_factory.mktemp("mlflow"))
    for name, error in (("base-none", 8.0), ("close-hybrid", 8.02), ("bad-hybrid", 9.0), ("good-hybrid", 7.5)):
        errors = error + NOISE - NOISE.mean() + (OWN if name != "base-none" else 0)
        student(store, name, 0, error, errors)
    teacher = store.add({"kind": "teacher"}, {"val/pa_mpjpe_mm": 6.0, "mean_pose/val/pa_mpjpe_mm": 20.0}, {})
    store.add_samples(teacher, "val", np.full(200, 6.0))
    return store


def gate_of(store: Store, first_of: str | None = None, selection: Selection = EXP, **gate: Any) -> dict[str, Any]:
    config = CompareConfig(gate=GateConfig(dataset="val", **gate), bootstrap=300)
    found: dict[str, Any] = compare(store.uri, selection, config, first_of=first_of).document["gate"]
    return found


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        ({"limit": 7.5}, True),
        ({"limit": 7.4}, False),
        ({"limit": 7.5, "students": ["good-hybrid", "base-none"]}, False),
        ({"teacher_ratio": 1.25}, True),
        ({"teacher_ratio": 1.2}, False),
        ({"better_than_mean_pose": True}, True),
        ({"metric": "f5", "limit": 0.5}, True),
        ({"metric": "f5", "limit": 0.51}, False),
    ],
)
def test_limits(store: Store, gate: dict[str, Any], passed: bool) -> None:
    found = gate_of(store, **gate)
    assert found["passed"] is passed
    assert len(found["sentences"]) == len(found["checks"])
    assert (found["winner"] is not None) is passed


@pytest.mark.parametrize(
    ("student", "gate", "verdict", "passed"),
    [
        ("bad-hybrid", {}, "fails", False),
        ("bad-hybrid", {"in_doubt": "passes"}, "fails", False),
        ("bad-hybrid", {"tolerance": 2.0}, "passes", True),
        ("good-hybrid", {"in_doubt": "fails"}, "passes", True),
        ("close-hybrid", {"tolerance": 0.05}, "doubt", True),
        ("close-hybrid", {}, "doubt", False),
        ("close-hybrid", {"tolerance": 0.05, "in_doubt": "fails"}, "doubt", False),
        ("close-hybrid", {"in_doubt": "passes"}, "doubt", True),
    ],
)
def test_a_student_against_another_on_the_same_samples(
    store: Store, student: str, gate: dict[str, Any], verdict: str, passed: bool
) -> None:
    found = gate_of(store, baseline="base-none", students=[student], **gate)
    (check,) = found["checks"]
    assert (check["verdict"], check["passed"], found["passed"]) == (verdict, passed, passed)
    assert check["samples"] == 200


def test_the_sentence_says_by_how_much_and_how_sure(store: Store) -> None:
    (said,) = gate_of(store, baseline="base-none", students=["bad-hybrid"], tolerance=0.1)["sentences"]
    assert said.startswith("bad-hybrid is 1 mm worse than base-none in PA-MPJPE on val (95% interval")
    assert said.endswith("200 samples), and fails: 0.1 mm allowed, over 99.9% sure.")
    (said,) = gate_of(store, baseline="base-none", students=["close-hybrid"])["sentences"]
    assert "0.02 mm worse" in said
    assert "fails in doubt (the mean decides): 0 mm allowed" in said
    (said,) = gate_of(store, baseline="good-hybrid")["sentences"]
    assert said == "good-hybrid is the baseline itself."


def test_scores_that_should_be_large_are_worse_when_they_are_small(store: Store) -> None:
    # the tables' f5 are the errors: 9.0 is the better score here
    found = gate_of(store, metric="f5", baseline="base-none", students=["good-hybrid", "bad-hybrid"])
    assert [check["passed"] for check in found["checks"]] == [False, True]
    assert "0.5 worse than base-none in F@5" in found["sentences"][0]


def test_a_metric_that_is_no_mean_over_samples_has_no_interval(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name, auc in (("a-none", 0.8), ("b-hybrid", 0.7)):
        run = student(store, name, 0, 8.0)
        store.client.log_metric(run, "val/auc", auc)
    found = gate_of(store, metric="auc", baseline="a-none", students=["b-hybrid"], tolerance=0.05)
    assert found["passed"] is False
    assert "b-hybrid is 0.1 worse than a-none on val: more than the 0.05 allowed" in found["sentences"][0]
    assert "cannot be said" in found["sentences"][0]


@pytest.mark.parametrize(
    ("gate", "named"),
    [
        ({"dataset": "vall", "limit": 1}, "on vall"),
        ({"dataset": "val", "students": ["nobody"]}, "nobody"),
        ({"dataset": "val", "metric": "f5", "teacher_ratio": 2}, "teacher_ratio"),
        ({"dataset": "val", "baseline": "nobody"}, "known: bad-hybrid, base-none"),
        ({"dataset": "val", "baseline": "models:/nothing@champion"}, "registry has no models:/nothing@champion"),
        ({"dataset": "val", "baseline": "models:/nothing/3"}, "registry has no"),
        ({"dataset": "val", "baseline": "models:/nothing"}, "want models:/<name>@<alias> or"),
    ],
)
def test_a_gate_on_what_is_not_there_is_the_users_mistake(store: Store, gate: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        compare(store.uri, EXP, CompareConfig(gate=GateConfig(**gate), bootstrap=100))


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"gate": {"dataset": "val", "metric": "mpjpe"}}, "'mpjpe'"),
        ({"gate": {"dataset": "val", "tolerance": 0.1}}, "without a baseline"),
        ({"promote": {}}, "promote without a gate"),
        ({"gate": {"dataset": "val"}, "promote": {"alias": "latest"}}, "for itself"),
        ({"gate": {"dataset": "val"}, "promote": {"alias": "v3"}}, "for itself"),
        ({"gate": {"dataset": "val"}, "promote": {"model": "a/b"}}, "pattern"),
    ],
)
def test_what_makes_no_sense_is_seen_before_anything_runs(section: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        CompareConfig.model_validate(section)


def test_a_registered_version_is_a_baseline(store: Store) -> None:
    client = MlflowClient(tracking_uri=store.uri)
    (run,) = client.search_runs([store.experiments["exp"]], "tags.`handstill.student` = 'base-none'")
    client.create_registered_model("hands")
    client.create_model_version("hands", f"runs:/{run.info.run_id}/student", run.info.run_id)
    client.set_registered_model_alias("hands", "champion", "1")
    for name in ("models:/hands@champion", "models:/hands/1"):
        found = gate_of(store, baseline=name, students=["bad-hybrid"])
        assert found["passed"] is False
        assert f"1 mm worse than {name} (version 1, base-none)" in found["sentences"][0]


def test_before_the_first_winner_nobody_is_to_be_beaten(store: Store) -> None:
    uri = "models:/exp@champion"
    found = gate_of(store, first_of=uri, baseline=uri)
    assert (found["passed"], found["winner"]["student"]) == (True, "good-hybrid")
    assert found["sentences"] == [f"There is no {uri} yet: the first student that passes becomes it."]


def test_the_winner_is_a_seed_that_passes_by_itself(tmp_path: Path) -> None:
    store = Store(tmp_path)
    student(store, "a-none", 0, 9.0)
    best = student(store, "a-none", 1, 7.0)
    found = gate_of(store, limit=8.0)
    assert found["checks"][0]["value"] == 8.0
    assert (found["winner"]["seed"], found["winner"]["run_id"], found["winner"]["value"]) == (1, best, 7.0)
    assert "7 mm PA-MPJPE on val, 1 mm better than the limit (8 mm): passes." in found["winner"]["sentences"][0]


def test_whoever_passes_below_the_mean_pose_is_said_to_be_of_no_use(tmp_path: Path) -> None:
    """A baseline can be worse still, and a version of the registry must not look better than it is."""
    store = Store(tmp_path)
    for name, error in (("bad-none", 24.0), ("less-bad-hybrid", 21.0)):
        student(store, name, 0, error, error + NOISE - NOISE.mean())
    store.add({"kind": "teacher"}, {"val/pa_mpjpe_mm": 6.0, "mean_pose/val/pa_mpjpe_mm": 20.0}, {})
    found = gate_of(store, baseline="bad-none")
    (caveat,) = found["caveats"]
    assert (found["passed"], found["winner"]["student"]) == (True, "less-bad-hybrid")
    assert caveat.startswith("Beware: less-bad-hybrid (21 mm) is no better than answering the mean pose to every")
    assert found["sentences"][-1] == caveat
    assert found["winner"]["sentences"][-1].startswith("Beware: less-bad-hybrid (seed 0)")
    asked = gate_of(store, baseline="bad-none", better_than_mean_pose=True)
    assert (asked["passed"], asked["caveats"]) == (False, [])
    assert asked["sentences"][0].endswith("1 mm worse than the mean pose (20 mm): fails.")


@pytest.mark.parametrize("asks", [True, False])
def test_whoever_passes_hardly_above_the_mean_pose_is_said_to_be_trained_too_little(asks: bool, tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name, error in (("bad-none", 19.0), ("less-bad-hybrid", 18.2)):
        student(store, name, 0, error, error + NOISE - NOISE.mean())
    store.add({"kind": "teacher"}, {"val/pa_mpjpe_mm": 6.0, "mean_pose/val/pa_mpjpe_mm": 20.0}, {})
    found = gate_of(store, baseline="bad-none", better_than_mean_pose=asks)
    (caveat,) = found["caveats"]
    assert found["passed"]
    assert caveat.startswith(
        "Beware: less-bad-hybrid (18.2 mm) is only 9% better than answering the mean pose to every"
    )
    assert found["winner"]["sentences"][-1].startswith("Beware: less-bad-hybrid (seed 0)")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("models:/a-b@champion", ("a-b", "champion", "")),
        ("models:/a b/12", ("a b", "", "12")),
        ("models:/a@b@c", ("a@b", "c", "")),
        ("models:/a@b/3", ("a@b", "", "3")),
    ],
)
def test_names_of_registered_versions(name: str, parts: tuple[str, str, str]) -> None:
    assert split_registered(name) == parts
