"""The winner in the model registry, and comparisons of other runs than the configuration's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag
from mlflow.tracking import MlflowClient
from PIL import Image

from models.student import STUDENT_FILES
from pipeline import promoting, registered, tracking
from pipeline.promoting import Alias, promote, version_behind
from pipeline.tracking import Tracker, TrackingTarget
from pipeline.tracking_uri import existing
from storage.errors import DamageError, InputError, WorkError
from tests.mlflow_server import MlflowServer
from tests.pipeline.commands import as_json, handstill
from tests.pipeline.lab import Lab
from tests.tiny_experiment import make_experiment
from tests.trainer.mlflow_store import Store, student

ALIAS = Alias("hands", "champion")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("mlflow"))
    for name, seed, experiment in (
        ("a-none", 0, "exp"),
        ("a-none", 1, "exp"),
        ("b-none", 0, "exp"),
        ("a-none", 0, "two"),
    ):
        run = student(store, name, seed, 8.0 + seed, experiment=experiment)
        model = store.client.create_logged_model(store.experiments[experiment], "student", run)
        store.client.finalize_logged_model(model.model_id, "READY")
    return store


def winner(store: Store, name: str = "a-none", seed: int = 0) -> dict[str, Any]:
    which = f"tags.`handstill.student` = '{name}' and tags.`handstill.seed` = '{seed}'"
    (run,) = store.client.search_runs([store.experiments["exp"]], which)
    identity = run.data.tags["handstill.identity"]
    return {
        "student": name,
        "seed": seed,
        "run_id": run.info.run_id,
        "identity": identity,
        "sentences": ["It is good."],
    }


def test_a_winner_is_registered_once_and_the_alias_follows(store: Store) -> None:
    target = TrackingTarget(store.uri, "exp")
    assert version_behind(target, ALIAS) is None
    first = promote(target, ALIAS, winner(store), None)
    assert (first["version"], first["sentence"]) == (
        "1", "models:/hands@champion is a-none (seed 0) now, version 1; it was nobody.",
    )  # fmt: skip
    again = promote(target, ALIAS, winner(store), "1")
    assert again["sentence"] == "models:/hands@champion is a-none (seed 0) already, version 1."
    second = promote(target, ALIAS, winner(store, seed=1), "1")
    assert (second["version"], version_behind(target, ALIAS)) == ("2", "2")
    version = store.client.get_model_version("hands", "2")
    assert version.tags["handstill.student"] == "a-none"
    assert version.description == "It is good."
    with pytest.raises(WorkError, match=r"went from version 1 to version 2 .* nothing was moved"):
        promote(target, ALIAS, winner(store, "b-none"), "1")
    assert version_behind(target, ALIAS) == "2"


def test_an_alias_that_cannot_be_moved_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    target, alias = TrackingTarget(store.uri, "exp"), Alias("others", "champion")

    def away(*_: Any) -> None:
        raise OSError("the server went away")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", away)
        with pytest.raises(WorkError, match="the server went away"):
            promote(target, alias, winner(store), None)
    assert version_behind(target, alias) is None
    assert promote(target, alias, winner(store), None)["version"] == "1", "what was registered is found again"


def test_a_run_without_a_model_cannot_win(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promoting, "model_of_run", lambda *_: None)
    with pytest.raises(InputError, match=r"tracking\.register_models"):
        promote(TrackingTarget(store.uri, "exp"), Alias("third", "champion"), winner(store), None)


def compared(tmp_path: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    nowhere = ["-c", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "out")]
    answer = handstill("compare", *nowhere, "--json", *arguments)
    assert answer.code == code, answer.err
    return answer.document


def test_other_experiments_are_compared_without_a_configuration(store: Store, tmp_path: Path) -> None:
    where = ("--tracking-uri", store.uri, "--experiment", "exp", "--experiment", "two")
    document = compared(tmp_path, *where)
    names = [(each["name"], each["seed"]) for each in document["students"]]
    assert names == [("exp/a-none", 0), ("exp/a-none", 1), ("b-none", 0), ("two/a-none", 0)]
    assert {(pair["student"], pair["baseline"]) for pair in document["paired"]} == {("exp/a-none", "two/a-none")}
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == document
    few = compared(tmp_path, *where, "--filter", "tags.`handstill.seed` = '1'")
    assert [(each["name"], each["seed"]) for each in few["students"]] == [("a-none", 1)]
    kinds = store.client.search_runs([store.experiments["exp"]], "tags.`handstill.kind` = 'comparison'")
    assert len(kinds) == 2
    assert {run.info.run_name for run in kinds} == {
        "b-none 8 mm PA-MPJPE: comparison of 3 students",
        "a-none 9 mm PA-MPJPE: comparison of 1 student",
    }
    ends = {run.info.run_id: run.info.end_time for run in kinds}
    compared(tmp_path, *where)
    again = store.client.search_runs([store.experiments["exp"]], "tags.`handstill.kind` = 'comparison'")
    assert {run.info.run_id: run.info.end_time for run in again} == ends, "its run is not begun again"
    tags = store.client.get_experiment(store.experiments["exp"]).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    view = json.loads(tags["mlflow.sharedViewState.handstill-scores"])
    state = json.loads(view["state"])
    assert (view["name"], state["orderByKey"]) == ("Scores and speed", "metrics.`val/pa_mpjpe_mm`")
    assert {"metrics.`val/f5`", "metrics.`fps`", "tags.`handstill.strategy`"} <= set(state["selectedColumns"])
    shown = store.client.search_runs([store.experiments["exp"]], state["searchFilter"])
    assert {run.data.tags["handstill.kind"] for run in shown} == {"student"}, "what the view asks MLflow understands"
    files = {found.path for found in store.client.list_artifacts(kinds[0].info.run_id)}
    assert {"report.html", "table.md", "table.tex", "differences.csv", "comparison.json", "figures"} <= files


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--filter", "tags.x = 1 and or"), "MLflow does not understand it"),
        (("--filter", "tags.x = 'y'"), "has no finished student that"),
        (("--experiment", "three"), "no experiment 'three'"),
    ],
)
def test_what_cannot_be_compared_is_the_users_mistake(
    store: Store, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    answer = compared(tmp_path, "--tracking-uri", store.uri, "--experiment", "exp", *arguments, code=2)
    assert told in answer["error"]


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("sqlite:///{there}/mlflow.db", "/nowhere/mlflow.db is not there; want the store that runs were written to"),
        ("{there}", "/nowhere is not there"),
        ("htp://mlflow", "found htp://mlflow, want an address of MLflow"),
    ],
)
def test_a_store_that_is_not_there_is_not_made(tmp_path: Path, uri: str, told: str) -> None:
    there = tmp_path / "nowhere"
    where = ("--tracking-uri", uri.format(there=there), "--experiment", "exp")
    assert told in compared(tmp_path, *where, code=2)["error"]
    assert not there.exists()


def test_without_a_configuration_the_server_and_the_experiment_are_to_be_named(tmp_path: Path) -> None:
    assert "none.yaml" in compared(tmp_path, "--experiment", "exp", code=2)["error"]
    answer = handstill("compare", "-c", str(tmp_path / "none.yaml"), "--out", str(tmp_path))
    assert (answer.code, "--experiment" in answer.err) == (2, True)


def predicted(tmp_path: Path, network: str, *arguments: str, code: int = 0) -> dict[str, Any]:
    """What `predict` says of a grey picture."""
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "grey.png")
    box = ("--box", "10,10,40,40", "--out", str(tmp_path / "hands"), "--network", network)
    answer = handstill("predict", str(tmp_path / "grey.png"), *box, "--json", *arguments)
    assert answer.code == code, answer.err
    return answer.document


def hands_of(tmp_path: Path, network: str, *arguments: str) -> Any:
    return predicted(tmp_path, network, *arguments)["inputs"][0]["hands"]


def test_the_winner_of_a_real_run_is_promoted_by_compare_and_not_by_run(lab: Lab, tmp_path: Path) -> None:
    gate = {"dataset": "val", "baseline": "models:/tiny@champion", "limit": 10_000.0}
    lab.configure({"compare.gate": gate, "compare.promote": {}})
    lab.run()
    target = TrackingTarget(f"sqlite:///{lab.workdir / 'mlflow.db'}", "tiny")
    assert version_behind(target, Alias("tiny", "champion")) is None
    first = as_json(lab.config, "compare")["gate"]
    assert first["promoted"]["version"] == version_behind(target, Alias("tiny", "champion")) == "1"
    assert "There is no models:/tiny@champion yet" in first["sentences"][0]
    (student,) = lab.workdir.glob(f"students/{first['winner']['student']}/seed-0/*/student")
    named = hands_of(tmp_path, "models:/tiny@champion", "-c", str(lab.config))
    written = json.loads(next((tmp_path / "hands").rglob("hands.json")).read_text())
    assert written["network"] == "models:/tiny/1", "the version, as an alias moves on"
    assert named == hands_of(tmp_path, str(student))
    exported = handstill("export", "models:/tiny/1", "--to", str(tmp_path / "winner"), "-c", str(lab.config), "--json")
    assert (exported.code, exported.document["student"]) == (0, first["winner"]["student"])
    known = json.loads((tmp_path / "winner/export.json").read_text())["provenance"]
    assert known["metrics"].keys() == known["mean_pose_metrics"].keys() == {"val"}, "the configuration knows its scores"
    assert known["teacher"] == {"teacher/checkpoints/hamer.ckpt": None}
    assert known["registered"] == "models:/tiny/1"
    assert (
        "no models:/tiny@second" in predicted(tmp_path, "models:/tiny@second", "-c", str(lab.config), code=2)["error"]
    )
    for wrong, hint in (
        ("models:/tiny@chapmion", "; did you mean 'champion'?"),
        ("models:/tinny/1", "; did you mean 'tiny'?"),
    ):
        assert predicted(tmp_path, wrong, "-c", str(lab.config), code=2)["error"].endswith(hint)
    again = as_json(lab.config, "compare")["gate"]
    assert again["promoted"]["sentence"].endswith("already, version 1.")
    lab.configure({"compare.gate": gate | {"limit": 0.0}})
    answer = handstill("compare", "-c", lab.config)
    assert answer.code == 1
    assert "gate: FAILED" in answer.out
    assert "models:/tiny@champion stays with version 1: who fails the gate is not registered." in answer.out
    assert version_behind(target, Alias("tiny", "champion")) == "1"
    client = MlflowClient(tracking_uri=target.uri)
    (version,) = client.search_model_versions("name = 'tiny'")
    assert version.tags["handstill.kind"] == "student"
    assert "better than the limit" in version.description
    report = (lab.workdir / "report" / "report.html").read_text()
    assert "The gate is failed." in report
    assert "mlflow artifacts download -r" in report, "each run says how to have it again"


def test_a_server_over_http_has_a_runs_students_their_comparison_and_the_winner(
    tmp_path: Path, inline_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MlflowServer(tmp_path / "server") as server:
        compare = {"bootstrap": 100, "gate": {"dataset": "val", "limit": 10_000.0}, "promote": {}}
        changes = {"train.steps": 1, "tracking.uri": server.uri, "compare": compare}
        config = make_experiment(tmp_path / "experiment", changes)
        as_json(config, "run")
        own = as_json(config, "compare")
        assert own["gate"]["promoted"]["version"] == "1"
        elsewhere = compared(tmp_path, "--tracking-uri", server.uri, "--experiment", "tiny")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        nowhere = ("-c", str(tmp_path / "none.yaml"))
        fetched = hands_of(tmp_path, "models:/tiny@champion", *nowhere)
        exported = handstill("export", "models:/tiny@champion", "--to", str(tmp_path / "winner"), *nowhere)
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        client = MlflowClient(tracking_uri=server.uri)
        tiny = client.get_experiment_by_name("tiny").experiment_id
        comparisons = client.search_runs([tiny], "tags.`handstill.kind` = 'comparison'")
        files = [{found.path for found in client.list_artifacts(run.info.run_id)} for run in comparisons]
    (winner,) = config.parent.glob(f"work/students/{own['gate']['winner']['student']}/seed-0/*/student")
    assert fetched == hands_of(tmp_path, str(winner))
    assert exported.code == 0, exported.err
    known = json.loads((tmp_path / "winner/export.json").read_text())["provenance"]
    scored = next(each for each in own["students"] if each["name"] == own["gate"]["winner"]["student"])
    assert known["student"] == {key: scored[key] for key in ("name", "seed", "identity")}
    assert known["metrics"] == scored["metrics"]
    assert known["mean_pose_metrics"] == own["teacher"]["mean_pose"]
    assert known["training"]["steps"] == "1"
    card = (tmp_path / "winner/README.md").read_text()
    assert "Version `models:/tiny/1` of the model registry." in card
    assert "Not evaluated" not in card
    assert "| data set alpha | not known: no pipeline file" in card
    assert elsewhere["students"] == own["students"]
    assert all({"report.html", "table.md", "differences.csv"} <= names for names in files)
    assert len(files) == 3, "of the run, of the command, and of the other one"
    assert b"<img" in (tmp_path / "out" / "report.html").read_bytes()


def test_what_a_registry_has_is_fetched_by_the_names_of_a_student_and_no_others(tmp_path: Path) -> None:
    source = tmp_path / "there/student"
    source.mkdir(parents=True)
    for name in (*STUDENT_FILES, "junk.bin"):
        (source / name).write_bytes(b"some")
    registered._fetch("sqlite://", "models:/x/1", source.as_uri(), str(tmp_path / "here"))
    assert {path.name for path in (tmp_path / "here").iterdir()} == set(STUDENT_FILES)
    (source / STUDENT_FILES[1]).write_bytes(b"")
    with pytest.raises(DamageError, match=r"models:/x/1 is no student of handstill: found 0 bytes at .*, want a file"):
        registered._fetch("sqlite://", "models:/x/1", source.as_uri(), str(tmp_path / "again"))


@pytest.mark.parametrize(
    "tags",
    [
        {"student": "/etc"}, {"student": ".."}, {"student": "a/b"}, {"student": ""},
        {"seed": "../0"}, {"seed": ""}, {"identity": "../../../../x"}, {"identity": "short"},
    ],
)  # fmt: skip
def test_tags_of_a_server_do_not_lead_out_of_the_workdir(tags: dict[str, str], tmp_path: Path) -> None:
    said = {"student": "plain", "seed": "0", "identity": "0123456789abcdef" * 4}
    folder = tmp_path / "students/plain/seed-0/0123456789abcdef/student"
    folder.mkdir(parents=True)

    def version(tags: dict[str, str]) -> ModelVersion:
        return ModelVersion("x", "1", 0, tags=[ModelVersionTag(f"handstill.{k}", v) for k, v in tags.items()])

    assert registered._trained_here(version(said), tmp_path / "students") == folder
    assert registered._trained_here(version(said | tags), tmp_path / "students") is None


def test_reading_from_a_store_that_is_not_there_makes_none(tmp_path: Path) -> None:
    config = make_experiment(tmp_path / "experiment")
    error = compared(tmp_path, "--experiment", "tiny", "-c", str(config), code=2)["error"]
    database = config.parent / "work/mlflow.db"
    assert f"a file in the workdir, which `handstill run` makes): {database} is not there" in error
    error = predicted(tmp_path, "models:/tiny@champion", "-c", str(config), code=2)["error"]
    assert error.startswith("tracking.uri (null: a file in the workdir")
    assert not database.exists()


@pytest.mark.parametrize(
    "uri", ["databricks", "databricks-uc", "http://a", "mysql+pymysql://a/b", "{}/a%20b", "{}/a:b"]
)
def test_addresses_that_mlflow_takes_are_taken(uri: str, tmp_path: Path) -> None:
    for name in ("a b", "a:b"):
        (tmp_path / name).mkdir()
    uri = uri.format(tmp_path.as_uri() if "%20" in uri else tmp_path)
    assert existing(uri, "here") == uri
    for wrong in ("htp://a", f"{tmp_path}/none", (tmp_path / "none").as_uri(), f"sqlite:///{tmp_path}/none.db"):
        with pytest.raises(InputError, match="here: "):
            existing(wrong, "here")


def test_who_moves_to_another_server_is_told_where_the_records_are(lab: Lab, tmp_path: Path) -> None:
    lab.configure({"tracking.uri": f"sqlite:///{tmp_path}/other.db"})
    answer = handstill("compare", "-c", lab.config)
    assert answer.code == 2
    assert "students' records are where tracking.uri pointed when they were trained" in answer.err


def test_who_copied_a_workdir_is_told_where_its_artefacts_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's store names that place by its absolute path; a copy would go on writing into the original."""
    said: list[str] = []
    monkeypatch.setattr(tracking.log, "warning", lambda text, *values: said.append(text % values))
    (tmp_path / "link").symlink_to(tmp_path / "first")
    for name in ("first", "first", "link", "copy", "copy"):
        database = f"sqlite:///{tmp_path / name}/mlflow.db"
        Tracker(TrackingTarget(database, "tiny", (tmp_path / name / "artifacts").as_uri()))
        if name != "copy":
            assert said == [], "another name of the same folder is no copy"
            shutil.copytree(tmp_path / "first", tmp_path / "copy", dirs_exist_ok=True)
    (once,) = said
    assert f"keeps its artefacts in {(tmp_path / 'first' / 'artifacts').as_uri()}, not beside it" in once
