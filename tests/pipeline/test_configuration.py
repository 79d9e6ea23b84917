"""The configuration file: strict, every mistake at once by its dotted path, with what was meant."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.checking import check_inputs
from pipeline.config import PipelineConfig
from pipeline.experiment import open_experiment
from pipeline.loading import json_schema, load_config, parse_config, read_document
from storage.errors import InputError
from tests.shared import SHARED, needs_shared
from tests.tiny_experiment import CONFIG, configure

ROOT = Path(__file__).parents[2]
NOTHING = object()


def changed(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The tiny configuration with dotted keys changed; NOTHING takes a key out."""
    document = copy.deepcopy(CONFIG)
    for dotted, value in changes.items():
        *way, last = dotted.split(".")
        section = document
        for part in way:
            section = section.setdefault(part, {})
        if value is NOTHING:
            del section[last]
        else:
            section[last] = value
    return document


def problems(changes: Mapping[str, Any]) -> list[str]:
    """What the loader says of a changed configuration, one string a problem."""
    with pytest.raises(InputError) as caught:
        parse_config(changed(changes), "here.yaml")
    first, *lines = str(caught.value).splitlines()
    assert re.fullmatch(rf"here\.yaml: {len(lines)} problems?", first)
    return [line.strip() for line in lines]


def load(tmp_path: Path, text: str) -> PipelineConfig:
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    return load_config(path)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("workdirr", "workdir"),
        ("cache.feature", "features"),
        ("cache.features.gird", "grid"),
        ("teacher.checkpoint_sha", "checkpoint_sha256"),
        ("teacher.workers.cpu", "cpus"),
        ("train.batchsize", "batch_size"),
        ("train.loss.keypoints3d", "keypoints_3d"),
        ("datasets.alpha.pth", "path"),
        ("datasets.alpha.filtering.min_keypoint", "min_keypoints"),
        ("students.hybrid.backbon", "backbone"),
        ("students.hybrid.step", "steps"),
        ("students.hybrid.distil", "distill"),
        ("students.hybrid.distill.output", "outputs"),
        ("students.hybrid.distill.feature", "features"),
        ("evaluate.latency.warm_up", "warmup"),
        ("compare.gate.limits", "limit"),
    ],
)
def test_an_unknown_key_is_an_error_that_says_what_was_meant(key: str, meant: str) -> None:
    changes = {key: 1} | ({"compare.gate.dataset": "val"} if key.startswith("compare") else {})
    assert problems(changes) == [f"{key}: unknown key; did you mean {meant!r}?"]


def test_all_mistakes_are_told_at_once() -> None:
    found = problems(
        {
            "schema_version": 2,
            "bogus": 1,
            "cache.views": 0,
            "cache.features.encoding": "int4",
            "teacher.checkpoint": NOTHING,
            "train.lr": -1,
            "train.on": ["alhpa"],
            "students.hybrid.distill.output": 0.3,
            "students.plain.on": ["beta", "gamma"],
            "evaluate.on": ["vla"],
            "datasets.alpha.format": "hamer_tra",
            "compare.gate": {"dataset": "alpha", "students": ["hybird"]},
        }
    )
    assert [line.split(":")[0] for line in found] == [
        "schema_version",
        "datasets.alpha.format",
        "teacher.checkpoint",
        "cache.views",
        "cache.features.encoding",
        "train.lr",
        "students.hybrid.distill.output",
        "bogus",
        "train.on",
        "evaluate.on",
        "students.plain.on",
        "compare.gate.dataset",
        "compare.gate.students",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.on": ["alhpa"]}, "train.on: no data set is named 'alhpa'; did you mean 'alpha'?"),
        ({"students.hybrid.on": ["bta"]}, "students.hybrid.on: no data set is named 'bta'; did you mean 'beta'?"),
        ({"evaluate.on": ["xyz"]}, "evaluate.on: no data set is named 'xyz'; known: alpha, beta, val"),
        (
            {"synthesise": {"sets": {"alfa": {"hands": 1}}}},
            "synthesise.sets: no data set is named 'alfa'; did you mean 'alpha'?",
        ),
        (
            {"tracking": {"uri": "https://me:hush@mlflow.example"}},
            "tracking.uri: the address holds a password, which logs, records and job servers would show; take it out. "
            "A server's goes into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or ~/.mlflow/credentials, a "
            "database's into its client's own file (~/.pgpass)",
        ),
        ({"students": {}}, "students: names no student; want at least one"),
        (
            {"cache.features.grid": 16**5000},  # as YAML's hexadecimals may be; Python prints 4,300 digits at most
            "cache.features.grid: Input should be 'full', '8x8-paper' or '8x6-geometric'; "
            "found a number of thousands of digits",
        ),
        (
            {"compare.gate": {"dataset": "val", "baseline": "hybird"}},
            "compare.gate.baseline: no student is named 'hybird'; did you mean 'hybrid'?",
        ),
        (
            {
                "compare": {"gate": {"dataset": "val", "limit": 1}, "promote": {}},
                "tracking": {"register_models": False},
            },
            "compare.promote: the winner's model is what is registered, and tracking.register_models is false",
        ),
    ],
)
def test_references_have_to_exist(changes: dict[str, Any], said: str) -> None:
    assert problems(changes) == [said]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"datasets.alpha.format": "hamer_tra"}, ["datasets.alpha.format", "'hamer_tra'", "did you mean 'hamer_tar'"]),
        ({"datasets.alpha.format": NOTHING}, ["datasets.alpha.format", "missing", "hamer_tar or hamer_npz"]),
        ({"datasets.alpha.path": NOTHING}, ["datasets.alpha.path", "missing"]),
        ({"students.plain": None}, ["students.plain", "mapping", "None"]),
        ({"datasets": []}, ["datasets", "mapping", "[]"]),
        ({"train.steps": "100"}, ["train.steps", "integer", "'100'"]),
        ({"train.steps": True}, ["train.steps", "integer", "True"]),
        ({"train.steps": 1.5}, ["train.steps", "integer", "1.5"]),
        ({"train.lr": "fast"}, ["train.lr", "number", "'fast'"]),
        ({"train.lr": float("nan")}, ["train.lr", "finite", "nan"]),
        ({"train.on": "alpha"}, ["train.on", "list", "'alpha'"]),
        ({"train.channels_last": "yes"}, ["train.channels_last", "boolean", "'yes'"]),
        ({"students.hybrid.steps": "many"}, ["students.hybrid.steps", "integer", "'many'"]),
        ({"students.hybrid.distill.outputs": -1}, ["students.hybrid.distill.outputs", "greater", "-1"]),
        ({"train.seeds": [0, 0]}, ["train.seeds", "more than once"]),
        ({"train.on": ["alpha", "beta", "alpha"]}, ["train.on", "alpha", "more than once"]),
        ({"name": "a/b"}, ["name", "'a/b'"]),
        ({"students": {"../up": {"backbone": "x"}}}, ["students.../up", "'../up'"]),
        ({"teacher.checkpoint_sha256": "abc"}, ["teacher.checkpoint_sha256", "'abc'"]),
        ({"cluster.address": "nowhere"}, ["cluster.address", "'nowhere'"]),
        ({"cache.features": {"encoding": "int4"}}, ["cache.features.encoding", "'int4'", "pca<k>-int8", "codes<b>"]),
        ({"cache.features": {"encoding": "codes65"}}, ["cache.features.encoding", "'codes65'", "1 to 64"]),
        ({"cache.features": {"encoding": 8}}, ["cache.features.encoding", "string", "8"]),
        ({"cache.calibration": {"views": 0}}, ["cache.calibration.views", "0"]),
        ({"students.hybrid.seeds": [1]}, ["students.hybrid.seeds", "unknown key"]),
        (
            {"students.hybrid.distill": {"features": 1.0, "alignment": "geometric"}},
            ["students.hybrid", "grid 8x8-paper", "8x6-geometric or full"],
        ),
        ({"cache.features": {"grid": "8x6-geometric"}}, ["students.hybrid", "grid 8x6-geometric", "8x8-paper or full"]),
        (
            {"students.hybrid.distill": {"features": 1.0, "preset": "papr"}},
            ["students.hybrid.distill.preset", "'papr'", "did you mean 'paper'?"],
        ),
        (
            {"students.hybrid.distill": {"features": 1.0, "alignment": "geometrc"}},
            ["students.hybrid.distill.alignment", "'geometrc'", "did you mean 'geometric'?"],
        ),
        (
            {"students.hybrid.distill": {"strategy": "hybrid"}},
            ["students.hybrid.distill.strategy", "unknown key", "outputs, features"],
        ),
        ({"students.plain.head": "lihgt"}, ["students.plain.head", "'lihgt'", "did you mean 'light'?"]),
        ({"students.plain.vit": {"depth": 4}}, ["students.plain", "backbone hamer", "mobilenetv3_small_050"]),
        ({"students.plain.decoder": {"depth": 4}}, ["students.plain", "head (light)", "leave one of them out"]),
        (
            {"students.hybrid.distill": {"preset": "paper", "alignment": "geometric", "features": 1.0}},
            ["students.hybrid.distill", "preset paper"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said_with_path_and_value(changes: dict[str, Any], words: list[str]) -> None:
    (line,) = problems(changes)
    for word in words:
        assert word in line


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = yaml.safe_dump(CONFIG).replace("'on':", "on:").replace("lr: 0.0001", "lr: 1e-4")
    assert "\n  on:" in text
    assert "lr: 1e-4" in text
    config = load(tmp_path, text)
    assert config.train.on == ["alpha", "beta"]
    assert config.train.lr == 1e-4
    assert load(tmp_path, text.replace("1e-4", "2.5E+1")).train.lr == 25.0
    assert load(tmp_path, text.replace("name: tiny", "name: off")).name == "off"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {lr: 1, lr: 2}", "key 'lr' stands twice"),
        ("name: a\nseed: 1\nname: b", "line 3: key 'name' stands twice"),
        ("just words", "want a mapping"),
        ("", "want a mapping"),
        ("a: [1, 2", "not valid YAML"),
        ("a: !!python/object/apply:os.system [id]", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("seed: 0x" + "f" * 5000, r"not valid YAML: a number of 5,002 digits"),
    ],
)
def test_what_is_no_configuration(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load(tmp_path, text)


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No such file.*\n.*-c FILE"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(tmp_path / "binary.yaml")


@needs_shared
def test_the_designs_example_is_a_configuration(tmp_path: Path) -> None:
    page = (SHARED / "DESIGN.md").read_text()
    example = re.search(r"```yaml\n(.*?)```", page, re.S)
    assert example is not None
    config = load(tmp_path, example[1])
    assert config.train.lr == 1e-4
    assert config.students["mobilenetv3-hybrid"].distill.strategy == "hybrid"
    assert config.datasets["freihand-val"].protocol == "freihand"


def test_a_student_overrides_any_key_of_train() -> None:
    config = parse_config(changed({"students.hybrid.loss": {"betas": 1.0}, "students.hybrid.steps": 9}), "f")
    recipe = config.students["hybrid"].resolve(config.train)
    assert (recipe.steps, recipe.loss.betas, recipe.loss.keypoints_2d) == (9, 1.0, 0.01)
    assert config.students["plain"].resolve(config.train).steps == CONFIG["train"]["steps"]


def test_nothing_can_be_changed_after_loading() -> None:
    config = parse_config(changed({}), "f")
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 1


def missing(finished: Path, tmp_path: Path, changes: Mapping[str, Any]) -> str:
    """What `check` says of the finished experiment's configuration with these changes, its files in their place."""
    config = tmp_path / "pipeline.yaml"
    config.write_text((finished / "pipeline.yaml").read_text())
    there = {
        "teacher.checkpoint": str(finished / "teacher/checkpoints/hamer.ckpt"),
        "datasets.alpha.path": str(finished / "tars/alpha-000000.tar"),
        "datasets.beta.path": str(finished / "tars/beta-000000.tar"),
        "datasets.val.path": str(finished / "tars/val-000000.tar"),
    }
    configure(config, there | dict(changes))
    with pytest.raises(InputError) as caught:
        check_inputs(open_experiment(config))
    return str(caught.value)


def test_a_student_of_the_teachers_own_network_wants_a_grid_that_serves_it(finished: Path, tmp_path: Path) -> None:
    hamer = {"backbone": "hamer", "vit": {"embed_dim": 48, "depth": 1, "num_heads": 3}, "distill": {"features": 1.0}}
    (line,) = missing(finished, tmp_path, {"students": {"own": hamer}}).splitlines()[1:]
    assert "students.own.backbone" in line
    assert "map of 16x12 tokens; set cache.features.grid to full" in line


def test_a_misspelt_backbone_is_told_with_close_names(finished: Path, tmp_path: Path) -> None:
    said = missing(
        finished,
        tmp_path,
        {
            "datasets.val.path": str(finished / "tars/val-{000000..000001}.tar"),
            "students.plain.backbone": "mobilnetv3_small_050",
            "students.hybrid.weights": "nowhere.safetensors",
            "students.plain.weights": str(finished / "tars"),
        },
    )
    assert re.search(r"students\.plain\.backbone: .*mobilnetv3_small_050.*mobilenetv3_small_050", said)
    assert re.search(r"students\.hybrid\.weights: no file .*nowhere\.safetensors", said)
    assert re.search(r"students\.plain\.weights: no file .*tars; it is a folder", said)
    assert re.search(r"datasets\.val: .*val-000001\.tar", said)


def test_the_file_for_the_real_job_is_valid() -> None:
    config = load_config(ROOT / "docs/hamer.yaml")
    mix = {name: config.datasets[name].weight for name in config.datasets_of("train")}
    assert len(mix) == 10
    assert sum(mix.values()) == pytest.approx(1.0)
    published = config.students["as-published"].resolve(config.train)
    assert (published.batch_size, published.steps, published.lr, published.schedule) == (8, 1_000_000, 1e-5, "constant")
    weights = [config.students[name].distill.features or 0 for name in ("as-published", "corrected")]
    assert weights[0] / published.batch_size == pytest.approx(weights[1])


def test_the_schema_in_docs_is_current() -> None:
    """To write it again: handstill check --schema > docs/pipeline.schema.json"""
    assert json.loads((ROOT / "docs/pipeline.schema.json").read_text()) == json_schema()


@pytest.mark.parametrize("default", [True, False])
def test_the_schema_takes_what_the_loader_takes(default: bool) -> None:
    document = read_document(ROOT / "pipeline.yaml") if default else changed({})
    jsonschema.Draft202012Validator.check_schema(json_schema())
    jsonschema.Draft202012Validator(json_schema()).validate(document)
    parse_config(document, "f")
    document["cache"]["viws"] = 1
    with pytest.raises(jsonschema.ValidationError, match="viws"):
        jsonschema.Draft202012Validator(json_schema()).validate(document)


def test_a_batch_that_workers_cannot_share_is_told_for_each_student() -> None:
    changes = {"train.workers": {"count": 3}, "students.plain.batch_size": 6, "students.hybrid.workers": {"cpus": 2}}
    (said,) = problems(changes)
    assert said == "students.hybrid: a batch_size of 4 cannot be shared equally by 3 workers; change one of them"
    assert "workers.count" in problems({"students.plain.workers": {"count": 0}})[0]


def test_the_resolved_configuration_is_a_configuration() -> None:
    config = parse_config(changed({}), "f")
    again = parse_config(config.model_dump(mode="json"), "resolved")
    assert again == config
    assert again.students["plain"].resolve(again.train) == config.students["plain"].resolve(config.train)
