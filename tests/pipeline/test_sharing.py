"""Pipeline files that share caches or a workdir: nothing is made twice, and `clean` of one takes nothing of another."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.sharing import ShardClaims, alone, using, writing
from storage.durable import partial_path
from storage.errors import WorkError
from tests.pipeline.commands import as_json, handstill
from tests.pipeline.lab import NO_WORK, Lab, Work, tree
from tests.tiny_experiment import configure, events_of

SHARDS = 8
A_RUN = """
import sys, pytest
from tests.pipeline import inline
from pipeline.cli import main
with pytest.MonkeyPatch.context() as patch:
    inline.install(patch)
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def first(lab: Lab) -> Lab:
    """A finished experiment whose caches lie in a folder of their own."""
    shutil.move(lab.workdir / "cache", lab.folder / "caches")
    lab.configure({"cache.root": "caches"})
    assert lab.run() == NO_WORK
    return lab


@pytest.fixture
def second(first: Lab) -> Lab:
    """Another student on the same data sets and caches, with a workdir of its own."""
    return sharing(first, "second", {"students.hybrid!": None, "students.plain.lr": 2e-4, "students.plain.on!": None})


def sharing(first: Lab, name: str, changes: dict[str, Any]) -> Lab:
    folder = first.folder.parent / name
    folder.mkdir()
    shutil.copy(first.config, folder)
    where = {f"datasets.{name}.path": [str(path) for path in tars(first, name)] for name in ("alpha", "beta", "val")}
    where |= {"teacher.checkpoint": str(first.folder / "teacher/checkpoints/hamer.ckpt")}
    lab = Lab(folder / "pipeline.yaml")
    lab.configure({**where, "cache.root": str(first.folder / "caches"), **changes})
    return lab


def tars(lab: Lab, dataset: str) -> list[Path]:
    return sorted((lab.folder / "tars").glob(f"{dataset}-*.tar"))


def caches(lab: Lab) -> dict[str, str]:
    """Every file of the caches, but for who refers to them."""
    return {name: digest for name, digest in tree(lab.folder / "caches").items() if not name.startswith("references")}


def test_pipelines_with_the_same_teacher_and_data_share_the_cache(first: Lab, second: Lab) -> None:
    before = caches(first)
    assert second.run("ingest").scanned == ["alpha-000000.tar", "alpha-000001.tar", "beta-000000.tar", "val-000000.tar"]
    plan = second.plan()["teach"]
    assert (plan["total"], plan["todo"], plan["teacher_passes"], plan["bytes"]) == (SHARDS, 0, 0, 0)
    assert second.run() == Work(trained=["plain"], scored=["plain", "teacher"], reported=True)
    assert not (second.workdir / "cache").exists()
    assert caches(first) == before
    assert as_json(second.config, "verify")["shards"] == SHARDS
    assert as_json(second.config, "show", "teach")["path"] == str(first.folder / "caches")
    for lab in (first, second):
        assert lab.reasons() == {}
        assert lab.run() == NO_WORK


def test_two_states_of_a_data_set_do_not_disturb_each_other(first: Lab, second: Lab) -> None:
    second.configure({"datasets.alpha.path": [str(tars(first, "alpha")[0])]})
    second.run()
    for lab in (first, second, first, second):
        assert lab.reasons() == {}
        assert lab.run() == NO_WORK
    first.rewrite("alpha", 1, edits={0: 1})
    assert first.run().shards == {"alpha": 1}
    assert second.reasons() == {}
    assert second.run() == NO_WORK


def test_clean_keeps_what_another_pipeline_refers_to(first: Lab, second: Lab) -> None:
    second.configure({"cache.features": {"encoding": "float16"}, "datasets.alpha.path": [str(tars(first, "alpha")[0])]})
    assert second.run("teach").shards == {"alpha": 2, "beta": 2, "val": 2}
    first.configure({"datasets.alpha.path": "tars/alpha-000000.tar"})
    first.run()
    whole = caches(first)
    document = as_json(first.config, "clean", "--stale")
    assert [place["config"] for place in document["kept_for"]] == [str(second.config)]
    stale = [Path(path).suffix for path in document["stale"] if "/caches/" in path]
    assert sorted(stale) == [".json", ".parquet", ".zarr", ".zarr"], "of the tar that went, and nothing of the other's"
    as_json(first.config, "clean", "--stale", "--yes")
    assert caches(first).items() < whole.items()
    for lab in (first, second):
        assert lab.reasons().keys() <= {"train", "evaluate", "compare"}
        assert lab.plan()["teach"]["todo"] == 0
    as_json(second.config, "verify", "--no-teacher")
    shutil.rmtree(second.workdir / "references")
    second.config.unlink()
    answer = handstill("clean", "--stale", "-c", first.config)
    (reference,) = [path for path in (first.folder / "caches/references").glob("*.json") if second_is_in(path)]
    assert f"kept for {second.config}, which is gone: delete {reference} if it will not return" in answer.out
    reference.unlink()
    stale = [path for path in as_json(first.config, "clean", "--stale", "--yes")["stale"] if "/caches/" in path]
    assert len(stale) == 2, "both float16 caches"
    assert first.run() == NO_WORK


def second_is_in(reference: Path) -> bool:
    return "second/pipeline.yaml" in reference.read_text()


def test_shards_of_a_run_that_was_killed_are_kept(first: Lab, second: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    second.configure({"cache.views": 3})
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.teaching._publish", interrupt)
        assert handstill("run", "teach", "-c", second.config).code == 130
    before = caches(first)
    as_json(first.config, "clean", "--stale", "--yes")
    assert caches(first) == before
    assert second.run("teach").shards == {}


def interrupt(state: object) -> None:
    raise KeyboardInterrupt


def test_two_pipeline_files_in_one_workdir(lab: Lab) -> None:
    other = lab.folder / "other.yaml"
    shutil.copy(lab.config, other)
    changes = {"datasets.alpha.path": "tars/alpha-000000.tar", "students.hybrid!": None, "students.plain.lr": 3e-4}
    configure(other, changes | {"cache.views": 3})
    assert as_json(other, "plan")["stages"]["ingest"]["reasons"]["removed"] == 0, "the other file names that tar"
    lab.run()
    as_json(other, "run")
    outputs = {name: digest for name, digest in tree(lab.workdir).items() if name.split("/")[0] in OUTPUTS}
    for config in (other, lab.config):
        assert as_json(config, "clean", "--stale", "--yes")["stale"] == {}
    assert {name: digest for name, digest in tree(lab.workdir).items() if name.split("/")[0] in OUTPUTS} == outputs
    assert lab.run() == Work(reported=True), "a workdir has one report"
    as_json(other, "run")
    other.unlink()
    (reference,) = [path for path in (lab.workdir / "references").glob("*.json") if "other.yaml" in path.read_text()]
    reference.unlink()
    stale = {
        path.split("/work/")[1].split("/")[0] for path in as_json(lab.config, "clean", "--stale", "--yes")["stale"]
    }
    assert stale == {"cache", "students", "evaluations"}
    assert lab.run() == Work(reported=True)


OUTPUTS = ("manifests", "cache", "students", "evaluations")


def test_a_damaged_reference_stops_clean_and_is_written_by_its_own_run(first: Lab, second: Lab) -> None:
    second.run("teach")
    (reference,) = [path for path in (first.folder / "caches/references").glob("*.json") if second_is_in(path)]
    whole = reference.read_bytes()
    reference.write_bytes(whole[:-9])
    answer = handstill("clean", "--stale", "-c", first.config)
    assert answer.code == 1
    assert str(reference) in answer.err
    second.run("teach")
    assert reference.read_bytes() == whole
    assert handstill("clean", "--stale", "-c", first.config).code == 0


@pytest.mark.parametrize("command", [("clean", "--stale", "--yes"), ("verify", "--no-teacher")], ids=lambda c: c[0])
def test_what_must_not_meet_a_run_of_another_workdir_waits(first: Lab, command: tuple[str, ...]) -> None:
    with using(first.folder / "caches/references"):
        answer = handstill(*command, "-c", first.config)
        assert first.run() == NO_WORK, "runs do meet"
    assert answer.code == 1
    assert "a run of another workdir is at work" in answer.err
    assert handstill(*command, "-c", first.config).code == 0


def test_a_live_writers_files_are_not_swept(first: Lab) -> None:
    cache = next(path for path in (first.folder / "caches").iterdir() if path.name != "references")
    half = partial_path(cache / "shards" / "x.zarr")
    half.mkdir()
    with writing(first.folder / "caches/references", lambda: None):
        first.run("teach")
        assert half.is_dir()
    first.run("teach")
    assert not half.exists()


def test_a_folder_that_cannot_be_written_to_is_the_users_to_change(lab: Lab) -> None:
    (lab.folder / "file").write_text("not a folder")
    lab.configure({"cache.root": "file/caches"})
    answer = handstill("run", "-c", lab.config)
    assert answer.code == 2
    assert "cache.root: cannot write to" in answer.err


def test_alone_is_alone(tmp_path: Path) -> None:
    with using(tmp_path), using(tmp_path), pytest.raises(WorkError, match="Wait for it"), alone(tmp_path, "clean"):
        pass
    with alone(tmp_path, "clean"), pytest.raises(WorkError), alone(tmp_path, "clean"):
        pass


def test_a_shard_that_another_run_makes_comes_last_and_only_if_it_must(tmp_path: Path) -> None:
    records = [tmp_path / "cache" / "ledger" / f"{name}.json" for name in ("a", "b", "c", "d")]
    records[0].parent.mkdir(parents=True)
    said, says = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        with ShardClaims(tmp_path) as claims:
            turns = claims.take_turns(records[:2], lambda record: record)
            says.send((next(turns).stem, next(turns).stem))
            time.sleep(60)
        os._exit(0)
    assert said.recv() == ("a", "b")
    made: list[str] = []
    done: dict[str, threading.Timer] = {}

    def the_other_finishes_one_and_dies() -> None:
        records[0].write_text("finished")
        os.kill(child, 9)
        os.waitpid(child, 0)

    with ShardClaims(tmp_path) as claims:
        for record in claims.take_turns(records, lambda record: record):
            made.append(record.stem)
            record.write_text("finished")
            if record.stem == "d":
                done["d"] = threading.Timer(0.2, the_other_finishes_one_and_dies)
                done["d"].start()
    assert made == ["c", "d", "b"]


def test_a_run_does_not_wait_for_another_for_ever(tmp_path: Path) -> None:
    record = tmp_path / "cache" / "ledger" / "a.json"
    said, says = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        with ShardClaims(tmp_path) as claims:
            says.send(next(claims.take_turns([record], lambda item: item)).stem)
            time.sleep(60)
        os._exit(0)
    assert said.recv() == "a"
    with ShardClaims(tmp_path, patience_s=0.1) as claims:
        assert list(claims.take_turns([record], lambda item: item)) == [record]
    os.kill(child, 9)
    os.waitpid(child, 0)


def test_two_runs_at_once_make_every_shard_once(first: Lab, second: Lab) -> None:
    """Real processes, a real race; whoever comes first to a shard makes it."""
    labs = [sharing(first, "third", {"cache.views": 3}), sharing(first, "fourth", {"cache.views": 3})]
    for lab in labs:
        lab.run("ingest")
    runs = [
        subprocess.Popen([sys.executable, "-c", A_RUN, "run", "teach", "-c", str(lab.config)], cwd=Path.cwd())
        for lab in labs
    ]
    assert [run.wait(240) for run in runs] == [0, 0]
    made = [event["unit"] for lab in labs for event in events_of(lab.config) if event["event"] == "shard_committed"]
    assert max(Counter(made).values()) == 1
    assert len(made) == 6
    for lab in labs:
        assert lab.plan()["teach"]["todo"] == 0
        assert as_json(lab.config, "verify", "--no-teacher")["ok"]
    assert not list((first.folder / "caches").rglob("*.partial"))
