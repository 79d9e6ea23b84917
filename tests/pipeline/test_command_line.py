"""What scripts rely on: verbs and options, exit codes, the documents of --json, and nothing else on stdout."""

from __future__ import annotations

import argparse
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import build_parser
from pipeline.events import append_event
from pipeline.showing_sample import SHOWN_PX
from storage.reading import open_cache
from storage.snapshots import read_head
from tests.pipeline.commands import as_json, handstill
from tests.pipeline.lab import Lab, tree, work_of
from tests.tiny_experiment import events_of

GLOBAL = {"-h/--help", "-c/--config", "--json", "--log-format", "-v/--verbose"}
VERBS = {
    "check": {"--schema"},
    "plan": {"STAGE?", "--rehash", "--limit"},
    "run": {"STAGE?", "--rehash", "--limit"},
    "status": set(),
    "show": {"STAGE|PATH|SAMPLE_ID", "--view", "--picture"},
    "submit": {"STAGE?", "--limit", "--no-wait", "--follow", "--stop"},
    "verify": {"--no-teacher", "--no-sources"},
    "audit": {"--against", "--on"},
    "export": {"NAME|FOLDER", "--seed", "--to", "--with-hand-model", "--int8"},
    "compare": {"--experiment", "--filter", "--tracking-uri", "--out"},
    "predict": {
        "PATH+",
        "--network",
        "--mano-model",
        "--box",
        "--boxes",
        "--detector",
        "--out",
        "--rescale",
        "--focal-px",
        "--mesh",
    },
    "clean": {"--stale", "--yes", "--dry-run"},
}
"""The command line that people's scripts are written against. Add to it; what is here stays."""
STAGES = ["ingest", "teach", "train", "evaluate", "compare"]


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {
        "/".join(action.option_strings) or f"{action.metavar}{action.nargs or ''}"
        for action in parser._actions
        if not isinstance(action, argparse._SubParsersAction)
    }


def test_the_command_line_is_the_one_that_was_promised() -> None:
    parser = build_parser()
    (verbs,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    assert options_of(parser) == GLOBAL | {"--version"}
    assert {name: options_of(verb) - GLOBAL for name, verb in verbs.choices.items()} == VERBS
    assert all(options_of(verb) >= GLOBAL for verb in verbs.choices.values())


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS)], ids=lambda verb: " ".join(verb) or "alone")
def test_help_is_on_stdout(verb: list[str]) -> None:
    answer = handstill(*verb, "--help")
    assert answer.code == 0
    assert answer.out.startswith("usage: handstill")
    assert answer.err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bogus"],
        ["run", "bogus"],
        ["run", "--limit", "many"],
        ["run", "--train.lr", "1"],
        ["clean"],
        ["show"],
        ["predict"],
        ["predict", "nowhere.jpg"],
        ["check", "-c", "nowhere.yaml"],
        ["plan", "-c", "nowhere.yaml"],
    ],
    ids=" ".join,
)
def test_a_mistake_of_the_user_exits_with_2(arguments: list[str]) -> None:
    answer = handstill(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err
    assert "Traceback" not in answer.err


def test_a_mistake_in_the_command_line_is_a_document_too() -> None:
    answer = handstill("run", "bogus", "--json")
    assert answer.code == 2
    assert (answer.document["ok"], answer.document["exit_code"]) == (False, 2)
    assert "'bogus'" in answer.document["error"]
    assert answer.err.startswith("usage: handstill run")
    assert answer.document["error"] in answer.err


@pytest.mark.parametrize("limit", ["0", "-3"])
def test_a_limit_is_positive(lab: Lab, limit: str) -> None:
    answer = handstill("plan", "-c", lab.config, "--limit", limit)
    assert answer.code == 2
    assert f"found {limit}" in answer.err


def test_global_options_stand_before_and_after_the_verb(lab: Lab) -> None:
    wanted = as_json(lab.config, "plan")
    ways: tuple[list[str | Path], ...] = (
        ["-c", lab.config, "--json", "plan"],
        ["--json", "plan", "-c", lab.config],
        ["-c", "nowhere.yaml", "plan", "-c", lab.config, "--json"],
        ["-v", "plan", "--config", lab.config, "--json"],
    )
    for arguments in ways:
        answer = handstill(*arguments)
        assert (answer.code, answer.document) == (0, wanted)


def test_the_default_configuration_is_that_of_the_folder(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.folder)
    assert handstill("plan", "--json").document == as_json(lab.config, "plan")


def test_check(lab: Lab) -> None:
    document = as_json(lab.config, "check")
    assert document["train"]["weight_decay"] == 1e-4, "resolved: defaults are filled in"
    assert list(document)[:4] == ["schema_version", "name", "workdir", "seed"]
    schema = handstill("check", "--schema", "-c", "nowhere.yaml")
    assert (schema.code, schema.document["type"]) == (0, "object")


def test_plan(lab: Lab) -> None:
    lab.configure({"cache.views": 3})
    stages = as_json(lab.config, "plan")["stages"]
    assert list(stages) == STAGES
    for stage in stages.values():
        assert {"total", "todo", "reasons", "bytes", "teacher_passes", "gpu_hours"} <= stage.keys()
        assert list(stage["reasons"]) == ["new", "changed", "removed", "damaged"]
        assert all(isinstance(stage[key], int) for key in ("total", "todo", "bytes", "teacher_passes"))
    teach = stages["teach"]
    assert (teach["total"], teach["todo"], teach["teacher_passes"]) == (8, 6, 12 * 3)
    assert teach["bytes"] > 0
    assert teach["gpu_hours"] > 0
    assert list(as_json(lab.config, "plan", "teach")["stages"]) == ["ingest", "teach"]


def test_plan_knows_backbones_by_name_and_says_which_is_meant(lab: Lab) -> None:
    lab.configure({"students.plain.backbone": "mobilenetv3_smal_050"})
    answer = handstill("plan", "-c", lab.config)
    assert answer.code == 2
    assert "students.plain.backbone" in answer.err
    assert "mobilenetv3_small_050" in answer.err
    for known in ("mobilenetv3_small_050.lamb_in1k", "hamer"):
        lab.configure({"students.plain.backbone": known})
        assert handstill("plan", "-c", lab.config).code == 0


def test_plan_names_a_students_key_also_where_its_cache_is_to_be_made(lab: Lab) -> None:
    lab.configure({"cache.views": 3, "students.hybrid.lr": 0.5})
    train = as_json(lab.config, "plan")["stages"]["train"]
    assert train["estimated"] is True
    changes = {(change["of"], change["key"]): (change["old"], change["new"]) for change in train["changes"]}
    assert changes == {("hybrid-seed0", "students.hybrid.lr"): (1e-4, 0.5)}


def test_plan_does_not_promise_a_gpu_that_is_not_there(lab: Lab) -> None:
    lab.configure({"cache.views": 3, "teacher.workers": {"gpus": 0}})
    text = handstill("plan", "-c", lab.config).out
    assert "The teacher gets no GPU here: " in text
    assert as_json(lab.config, "plan")["stages"]["teach"]["on_gpu"] is False


def test_show_of_a_stage_says_what_its_outputs_are_of(lab: Lab) -> None:
    document = as_json(lab.config, "show", "teach")
    assert document["stage"] == "teach"
    assert {(cache["role"], *cache["snapshots"]) for cache in document["outputs"]} == {
        ("train", "alpha", "beta"),
        ("evaluate", "val"),
    }
    table = next(lab.workdir.glob("cache/*/snapshots/*.parquet"))
    named = as_json(lab.config, "show", table)["first_samples"]
    assert as_json(lab.config, "show", named[0])["sample_id"] == named[0]
    none = handstill("show", "synthesise", "-c", lab.config)
    assert (none.code, "no section `synthesise`" in none.err) == (2, True)
    text = handstill("show", "teach", "-c", lab.config).out
    assert text.startswith("teach: ")
    assert ": role train, alpha, beta, " in text
    assert {output["student"] for output in as_json(lab.config, "show", "train")["outputs"]} == {"plain", "hybrid"}
    assert {output["dataset"] for output in as_json(lab.config, "show", "ingest")["outputs"]} == {
        "alpha",
        "beta",
        "val",
    }


def test_what_a_plan_estimates_is_about_what_is_written(lab: Lab) -> None:
    (lab.workdir / "cache").rename(lab.workdir / "cache-of-before")
    estimated = lab.plan()["teach"]["bytes"]
    as_json(lab.config, "run", "teach")
    written = sum(path.stat().st_size for shard in lab.shards() for path in shard.rglob("*") if path.is_file())
    assert 0.2 < written / estimated < 5  # tiny shards: their headers weigh as much as their data


def test_run(finished: Path, lab: Lab) -> None:
    document = json.loads((finished / "run.json").read_text())
    assert document["ok"] is True
    assert list(document["stages"]) == STAGES
    for stage in document["stages"].values():
        assert {"done", "skipped", "samples_in", "samples_done", "quarantined", "seconds"} <= stage.keys()
    counts = {name: (stage["done"], stage["skipped"]) for name, stage in document["stages"].items()}
    assert counts == {"ingest": (4, 0), "teach": (8, 0), "train": (2, 0), "evaluate": (3, 0), "compare": (1, 0)}
    assert document["stages"]["teach"]["samples_done"] == 16
    again = as_json(lab.config, "run")["stages"]
    assert {name: (stage["done"], stage["skipped"]) for name, stage in again.items()} == {
        name: (0, done) for name, (done, _) in counts.items()
    }
    assert again["teach"]["samples_done"] == 16


def test_run_of_one_stage_ends_there(lab: Lab) -> None:
    assert list(as_json(lab.config, "run", "teach")["stages"]) == ["ingest", "teach"]
    answer = handstill("run", "synthesise", "-c", lab.config)
    assert answer.code == 2
    assert "no synthesise section" in answer.err


def test_status(lab: Lab) -> None:
    document = as_json(lab.config, "status")
    assert {name: stage["done"] for name, stage in document["stages"].items()} == {
        "ingest": 4,
        "teach": 8,
        "train": 2,
        "evaluate": 3,
        "compare": 1,
    }
    for stage in document["stages"].values():
        assert {"total", "done", "stale", "quarantined", "last_error"} <= stage.keys()
        assert stage["done"] == stage["total"]
        assert (stage["stale"], stage["quarantined"], stage["last_error"]) == (0, 0, None)
    lab.configure({"students.hybrid.lr": 1.0})
    assert as_json(lab.config, "status")["stages"]["train"]["stale"] == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"compare.bootstrap": 150}, "which was made before a change of the section `compare`"),
        ({"students.hybrid.lr": 1.0}, "which has scores that are to be made again"),
        ({"train.seeds": [0, 1]}, "which lacks hybrid-seed1, plain-seed1"),
        ({"train.seeds": [3]}, "which is about other students: another file with this workdir made it"),
    ],
)
def test_the_plan_says_why_the_report_is_to_be_made_again(lab: Lab, changes: dict[str, Any], told: str) -> None:
    assert "report" not in handstill("plan", "-c", lab.config).out.partition("compare:")[2]
    lab.configure(changes)
    assert f"changed: the report, {told}" in handstill("plan", "-c", lab.config).out


def test_an_option_that_a_verb_has_not_shows_what_it_has() -> None:
    answer = handstill("predict", "a.jpg", "--bx", "1,2,3,4", "--json")
    assert answer.code == 2
    assert "usage: handstill predict" in answer.err
    assert answer.document["error"] == "handstill predict: error: unrecognized arguments: --bx 1,2,3,4"


def test_the_version_is_told_without_a_verb() -> None:
    answer = handstill("--version")
    assert (answer.code, answer.out) == (0, f"handstill {version('handstill')}\n")


@pytest.mark.parametrize("scanned", [True, False])
def test_a_run_that_costs_too_much_is_refused(lab: Lab, scanned: bool) -> None:
    lab.configure({"cluster.max_gpu_hours": 1e-15, "cache.views": 3})
    if not scanned:
        shutil.rmtree(lab.workdir / "state")
    seen = len(events_of(lab.config))
    answer = handstill("run", "-c", lab.config)
    assert answer.code == 2
    assert "cluster.max_gpu_hours" in answer.err
    work = work_of(events_of(lab.config, seen))
    assert (work.shards, work.trained) == ({}, [])


def test_a_failure_is_a_document_too(lab: Lab, tmp_path: Path) -> None:
    answer = handstill("plan", "-c", tmp_path / "nowhere.yaml", "--json")
    assert answer.code == 2
    assert answer.document.keys() == {"ok", "error", "exit_code"}
    assert (answer.document["ok"], answer.document["exit_code"]) == (False, 2)
    assert "nowhere.yaml" in answer.document["error"]
    assert answer.document["error"] in answer.err
    assert handstill("plan", "-c", tmp_path / "nowhere.yaml").out == ""


def test_status_says_what_is_running(lab: Lab) -> None:
    assert handstill("status", "-c", lab.config).out.endswith("nothing is running\n")
    append_event(lab.workdir / "logs" / "events.jsonl", "stage_started", stage="teach")
    assert handstill("status", "-c", lab.config).out.endswith("running now: teach\n")


def test_status_has_the_last_error_until_the_stage_succeeds(lab: Lab) -> None:
    tar = lab.rewrite("beta", edits={0: 1})
    with tar.open("r+b") as handle:
        handle.truncate(700)
    answer = handstill("run", "-c", lab.config)
    assert answer.code == 2
    assert "beta-000000.tar" in as_json(lab.config, "status")["stages"]["ingest"]["last_error"]
    lab.rewrite("beta")
    as_json(lab.config, "run", "ingest")
    assert as_json(lab.config, "status")["stages"]["ingest"]["last_error"] is None


def test_show(lab: Lab) -> None:
    shard = lab.shards("alpha")[0]
    document = as_json(lab.config, "show", shard)
    arrays = {array["name"]: array for array in document["arrays"]}
    features = arrays["teacher/features"]
    assert (features["shape"], features["dtype"]) == ([2, 2, 8, 8, 24], "int8")
    assert features["dimensions"][:2] == ["sample", "view"]
    assert arrays["teacher/keypoints_3d"]["unit"] == "m"
    assert document["attributes"]
    student = next(lab.workdir.glob("students/plain/*/*"))
    assert as_json(lab.config, "show", student)["kind"] == "student"
    manifest = next(lab.workdir.glob("manifests/alpha/*.parquet"))
    assert as_json(lab.config, "show", manifest)["rows"] == 4
    for stage in STAGES:
        assert as_json(lab.config, "show", stage)["outputs"], stage
    answer = handstill("show", "bogus", "-c", lab.config)
    assert answer.code == 2
    assert "'bogus'" in answer.err


def test_show_a_sample(lab: Lab, tmp_path: Path) -> None:
    """Its views as stored beside the same made again, for scripts, for a person, and as a picture."""
    cache = next(path for path in lab.workdir.glob("cache/*") if "alpha" in read_head(path))
    reader = open_cache(cache)
    sample_id = reader.ids[3]
    document = as_json(lab.config, "show", sample_id, "--picture", tmp_path / "views.png")
    (found,) = document["caches"]
    assert (found["role"], found["row"], found["made_again"], found["reason"]) == ("train", 1, "yes", None)
    assert (cache / "shards" / f"{found['shard']}.zarr").is_dir()
    sample = reader[sample_id]
    assert [view["rotation_deg"] for view in found["views"]] == sample["views/rotation_deg"].tolist()
    assert [view["colour"] for view in found["views"]] == sample["views/colour"].tolist()
    assert all(view["remade"]["identical_picture"] for view in found["views"])
    assert [view["remade"]["differences"] for view in found["views"]] == [[], []]
    with Image.open(tmp_path / "views.png") as page:
        assert page.size == (2 * SHOWN_PX, 2 * SHOWN_PX)
        pixels = np.asarray(page)
    for view, half in enumerate((pixels[:SHOWN_PX], pixels[SHOWN_PX:])):
        left, right = half[:, :SHOWN_PX], half[:, SHOWN_PX:]
        caption = slice(0, 24)
        assert not np.array_equal(left[caption], right[caption]), "which is which stands there"
        assert np.array_equal(left[24:], right[24:]), "stored and made again look the same"
        plain = Image.fromarray(sample["pictures"][view]).resize((SHOWN_PX, SHOWN_PX))
        assert 0.5 < (left == np.asarray(plain)).mean() < 1, "joints are drawn over the picture"
    text = handstill("show", sample_id, "-c", lab.config, "--view", "1").out
    assert text.count("the same to the bit") == 1
    shutil.rmtree(lab.folder / "tars")
    (found,) = as_json(lab.config, "show", sample_id, "--view", "0", "--picture", tmp_path / "one.png")["caches"]
    assert (found["made_again"], [view["remade"] for view in found["views"]]) == ("no: its source is not there", [None])
    with Image.open(tmp_path / "one.png") as page:
        assert page.size == (2 * SHOWN_PX, SHOWN_PX)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["alpha:nobody#0"], "alpha:nobody#0 is in no current snapshot"),
        (["{}", "--view", "2"], "want one of 0 to 1"),
        (["{}", "--picture", "{folder}/nowhere/x.png"], "cannot write"),
        (["teach", "--view", "1"], "--view and --picture are for samples"),
    ],
)
def test_show_says_what_is_wrong_with_a_sample(lab: Lab, arguments: list[str], told: str) -> None:
    cache = next(path for path in lab.workdir.glob("cache/*") if "alpha" in read_head(path))
    filled = [item.format(open_cache(cache).ids[0], folder=lab.folder) for item in arguments]
    answer = handstill("show", *filled, "-c", lab.config)
    assert answer.code == 2
    assert told in answer.err


def test_compare(lab: Lab) -> None:
    document = as_json(lab.config, "compare")
    assert {"pa_mpjpe_mm", "auc"} <= document["teacher"]["metrics"]["val"].keys()
    assert {"params_m", "latency_ms"} <= document["teacher"].keys()
    assert {student["name"] for student in document["students"]} == {"plain", "hybrid"}
    for student in document["students"]:
        assert {"seed", "run_id", "backbone", "strategy", "params_m", "metrics", "latency_ms", "fps"} <= student.keys()
        assert student["metrics"]["val"]["pa_mpjpe_mm"] > 0
        assert student["latency_ms"]["1"] > 0
    assert document["gate"]["passed"] is True


@pytest.mark.parametrize(("limit", "code"), [(0.0, 1), (10_000.0, 0)])
def test_the_gate_decides_the_exit_code(lab: Lab, limit: float, code: int) -> None:
    lab.configure({"compare.gate": {"dataset": "val", "limit": limit}})
    answer = handstill("compare", "-c", lab.config, "--json")
    assert answer.code == code
    assert answer.document["gate"]["passed"] is (code == 0)


def test_clean_lists_and_deletes_only_what_is_stale(lab: Lab) -> None:
    assert as_json(lab.config, "clean", "--stale")["stale"] == {}
    kept = tree(lab.workdir / "cache")
    lab.configure({"cache.views": 3, "train.on": ["alpha"]})
    assert handstill("clean", "--stale", "--yes", "-c", lab.config).code == 2, "what can go is not known yet"
    as_json(lab.config, "run", "teach")
    both = tree(lab.workdir / "cache")
    listed = as_json(lab.config, "clean", "--stale")
    assert listed["deleted"] is False
    assert listed["bytes"] == sum(listed["stale"].values()) > 0
    assert tree(lab.workdir / "cache") == both
    deleted = as_json(lab.config, "clean", "--stale", "--yes")
    assert deleted["stale"].keys() == listed["stale"].keys()
    left = tree(lab.workdir / "cache")
    assert not any(Path(path).exists() for path in deleted["stale"])
    assert left.items() < both.items()
    assert not kept.items() <= left.items()
    assert as_json(lab.config, "clean", "--stale")["stale"] == {}
    assert as_json(lab.config, "verify")["ok"] is True


@pytest.mark.parametrize(
    "arguments",
    [
        ["check"],
        ["plan"],
        ["run"],
        ["status"],
        ["show", "teach"],
        ["verify"],
        ["audit"],
        ["compare"],
        ["clean", "--stale"],
    ],
    ids=" ".join,
)
def test_for_a_person_there_is_text(lab: Lab, arguments: list[str]) -> None:
    answer = handstill(*arguments, "-c", lab.config)
    assert answer.code == 0
    assert answer.out.strip()
    with pytest.raises(ValueError, match=r"Expecting|Extra data"):
        json.loads(answer.out)


@pytest.mark.parametrize(("flag", "traced"), [([], False), (["-v"], True)])
def test_a_traceback_is_shown_on_request_only(lab: Lab, flag: list[str], traced: bool) -> None:
    lab.configure({"train.lr": -1.0})
    answer = handstill("plan", "-c", lab.config, *flag)
    assert answer.code == 2
    assert ("Traceback" in answer.err) is traced
    assert "train.lr" in answer.err
