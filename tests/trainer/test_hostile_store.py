"""An MLflow server that anybody may write to: what it says is refused by name, or stays text."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.entities import FileInfo
from mlflow.tracking import MlflowClient

from storage.errors import DamageError
from tests.trainer.mlflow_store import Store, student
from trainer.cases import write_table
from trainer.compare import compare
from trainer.config import CompareConfig
from trainer.report import write_report
from trainer.runs import Selection

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow 3.17 on SQLAlchemy 2.1

IDS = pa.array([f"s{i:03d}" for i in range(40)])
ERRORS = pa.array(np.ones(40))
SAMPLES = "evaluation/val/samples.parquet"
CASES = "evaluation/val/cases.parquet"


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("mlflow"))


@dataclass
class Victim:
    """A student's run in a store; who may write to the server changes it."""

    store: Store
    run: str
    name: str

    def put(self, artifact: str, write: Callable[[Path], object]) -> None:
        """Put a file in an artifact's place."""
        folder, _, name = artifact.rpartition("/")
        path = self.store.folder / name
        write(path)
        self.store.client.log_artifact(self.run, str(path), folder)

    def compared(self) -> Any:
        wanted = Selection(("exp",), filter=f"tags.batch = '{self.name}'")
        return compare(self.store.uri, wanted, CompareConfig(bootstrap=100))


@pytest.fixture
def victim(whole_store: Store) -> Victim:
    name = secrets.token_hex(4)
    run = student(whole_store, "small-none", 0, 9.0)
    whole_store.client.set_tag(run, "batch", name)
    return Victim(whole_store, run, name)


def rows(**columns: pa.Array) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table({"sample_id": IDS} | columns), path)


def many_rows(path: Path) -> None:
    """A few hundred kilobytes that say three hundred million times the same."""
    one = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3_000_000, np.int32)), pa.array(["a"]))
    with pq.ParquetWriter(path, pa.schema([("sample_id", one.type)])) as writer:
        for _ in range(100):
            writer.write_table(pa.table({"sample_id": one}))


@pytest.mark.parametrize(
    ("artifact", "write", "why"),
    [
        (SAMPLES, lambda path: path.write_bytes(b"PAR1 no more"), "it cannot be read"),
        (SAMPLES, rows(pa_mpjpe_mm=pa.array(["x"] * 40)), "its column pa_mpjpe_mm holds string, wanted double"),
        (SAMPLES, rows(pa_mpjpe_mm=pa.array([None] * 40, pa.float64())), "it has holes"),
        (SAMPLES, rows(keypoints_2d=ERRORS), "its column keypoints_2d holds double, wanted fixed_size_list"),
        (SAMPLES, lambda path: pq.write_table(pa.table({"pa_mpjpe_mm": ERRORS}), path), "it has the columns"),
        (SAMPLES, lambda path: pq.write_table(pa.table({"sample_id": ["a", "a"]}), path), "it has a sample twice"),
        (SAMPLES, many_rows, "it has 300000000 rows|holds dictionary"),
        (CASES, rows(picture=pa.array([b"x"] * 40), error=ERRORS), "it has no column label_2d"),
        ("evaluation/evaluation.json", lambda path: path.write_text("[1]"), "it holds a list, wanted an object"),
        ("evaluation/evaluation.json", lambda path: path.write_text("{"), "it is no JSON"),
        ("evaluation/evaluation.json", lambda path: path.write_text("[" * 99999), "it is no JSON"),
        ("pictures/pictures.png", lambda path: path.write_text("<script>"), "it is no PNG"),
    ],
)
def test_an_artifact_that_is_none_of_ours_is_refused_by_name(
    victim: Victim, artifact: str, write: Callable[[Path], object], why: str
) -> None:
    victim.put(artifact, write)
    with pytest.raises(DamageError, match=why) as told:
        victim.compared()
    assert artifact in str(told.value)
    assert victim.run in str(told.value)


def test_pictures_that_are_none_are_refused(victim: Victim) -> None:
    columns = {"sample_id": np.array(IDS.to_pylist(), object), "error": np.ones(40), "label_2d": np.ones((40, 21, 3))}
    victim.put(CASES, lambda path: write_table(path, columns | {"picture": [b"\xff\xd8\xff"] * 40}))
    with pytest.raises(DamageError, match="a stored picture cannot be decoded"):
        victim.compared()


def test_what_a_listing_names_is_not_fetched_unless_it_is_ours(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, fetch = MlflowClient.list_artifacts, MlflowClient.download_artifacts
    asked: list[str] = []

    def everything(self: MlflowClient, run: str, path: str | None = None) -> list[FileInfo]:
        return [*listed(self, run, path), FileInfo("../../outside", False, 1)]

    def noted(self: MlflowClient, run: str, path: str, *more: str) -> str:
        asked.append(path)
        return fetch(self, run, path, *more)

    monkeypatch.setattr(MlflowClient, "list_artifacts", everything)
    monkeypatch.setattr(MlflowClient, "download_artifacts", noted)
    victim.compared()
    assert set(asked) == {SAMPLES}
    asked.clear()
    for wrong, why in (
        (FileInfo(SAMPLES, True, None), "it is a folder"),
        (FileInfo(SAMPLES, False, 1 << 40), "it has 1099511627776 bytes, at most"),
    ):
        monkeypatch.setattr(MlflowClient, "list_artifacts", lambda self, run, path=None, wrong=wrong: [wrong])
        with pytest.raises(DamageError, match=why):
            victim.compared()
    assert asked == []


NAMES = ("<script>alert(1)</script>", "../../outside", "a\x00b", r"\input{/etc/passwd}", r"$\frac$", "x" * 3000)


def test_names_that_a_server_says_stay_text(tmp_path: Path, victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    for at, name in enumerate(NAMES):
        run = student(victim.store, f"big{at}-none", 0, 9.0)
        for tag, value in (("batch", victim.name), *((f"handstill.{key}", name) for key in ("student", "backbone"))):
            victim.store.client.set_tag(run, tag, value)
    found = MlflowClient.search_runs

    def search(self: MlflowClient, *arguments: Any, **named: Any) -> Any:
        page = found(self, *arguments, **named)
        for run in page:
            for name in NAMES:  # MLflow refuses such metrics; a server need not be MLflow's
                run.data._metrics[f"{name}/pa_mpjpe_mm"] = 1.0
        return page

    monkeypatch.setattr(MlflowClient, "search_runs", search)
    comparison = victim.compared()
    assert len(comparison.document["students"]) == 1 + len(NAMES)
    assert set(comparison.document["students"][0]["metrics"]) == {"val"}
    report = tmp_path / "in" / "report"
    write_report(comparison, report)
    outside = [path for path in tmp_path.rglob("*") if report not in (path, *path.parents)]
    assert outside == [tmp_path / "in"]
    assert "<script" not in (report / "report.html").read_text()
    assert r"\input{" not in (report / "table.tex").read_text()
    assert json.loads((report / "comparison.json").read_text()) == comparison.document


def test_a_seed_that_is_no_number_is_told(victim: Victim) -> None:
    victim.store.client.set_tag(victim.run, "handstill.seed", "1e9")
    with pytest.raises(DamageError, match=rf"run {victim.run}: its tag handstill.seed is '1e9'"):
        victim.compared()
    victim.store.client.set_tag(victim.run, "handstill.kind", "mended")
