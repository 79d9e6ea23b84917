"""Every door through which a file comes in, with files at it that would run something: nothing runs, and it is told.

The doors are the keys of pipeline.yaml that are text and the arguments of the verbs: a new one fails the first two
tests until it is listed here, with what is put before it or with why it takes no file.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli import build_parser
from pipeline.loading import json_schema
from tests import hostile_pickles
from tests.pipeline.commands import handstill
from tests.pipeline.lab import Lab
from tests.tars import picture, sample
from tests.tiny_experiment import tar_path

NO_FILE = {
    "cache.features.encoding": "a word",
    "cluster.address": "Ray's, trusted",
    "cluster.jobs": "Ray's, trusted",
    "cluster.job_python": "a program of the user's own image",
    "compare.gate.dataset": "a name in this file",
    "compare.gate.students[]": "names in this file",
    "datasets.*.licence": "text for a card",
    "compare.gate.baseline": "a name in MLflow",
    "compare.promote.alias": "a name in MLflow",
    "compare.promote.model": "a name in MLflow",
    "notify.command[]": "a program that the user's own file names",
    "notify.url": "a server that is told, and not listened to",
    "retention.pinned[]": "names of outputs",
    "evaluate.on[]": "names in this file",
    "name": "a name",
    "students.*.backbone": "a name; models are never fetched",
    "students.*.on[]": "names in this file",
    "teacher.checkpoint_sha256": "a digest",
    "teacher.licence": "text for a card",
    "tracking.experiment": "a name",
    "tracking.uri": "a server; nothing that it says is loaded",
    "train.on[]": "names in this file",
    "workdir": "written by us; its files: tests/fuzz, `cache`",
    "cache.root": "written by us; its files: tests/fuzz, `cache`",
}
KEYS = {
    "datasets.*.path": ["tar of labels", "tar of links", "npz of objects"],
    "datasets.*.path[]": ["tar of labels"],
    "datasets.*.image_dir": ["names that lead out"],
    "datasets.*.truth_xyz": ["deep truth"],
    "datasets.*.truth_verts": ["deep vertices"],
    "students.*.weights": ["weights"],
    "students.*.prior.mocap": ["mocap of a student"],
    "synthesise.hand_model": ["hand to render"],
    "teacher.checkpoint": ["checkpoint", "model_config"],
    "teacher.mano_model": ["hand model", "hand model npz"],
    "train.prior.mocap": ["mocap"],
}
NO_FILE_ARGUMENTS = {
    *(
        "--json",
        "--verbose",
        "--help",
        "--version",
        "--schema",
        "--rehash",
        "--limit",
        "--view",
        "--no-teacher",
        "--no-sources",
    ),
    *("--on", "--seed", "--with-hand-model", "--int8", "--no-wait", "--follow", "--stop", "--stale", "--yes"),
    *(
        "--box",
        "--rescale",
        "--focal-px",
        "--mesh",
        "STAGE",
        "--tracking-uri",
        "--experiment",
        "--filter",
        "--dry-run",
        "--log-format",
    ),
    *("--out", "--to", "--picture"),  # written, not read
}
ARGUMENTS = {
    "--config": ["configuration"],
    "STAGE|PATH|SAMPLE_ID": ["shown checkpoint", "shown table", "shown json", "shown shard"],
    "--against": ["another cache"],
    "NAME|FOLDER": ["exported folder"],
    "PATH": ["photograph"],
    "--network": ["network", "student folder"],
    "--mano-model": ["hand of a checkpoint"],
    "--boxes": ["boxes"],
    "--detector": ["wheel"],
}


def text_keys() -> set[str]:
    """Dotted keys of pipeline.yaml that take any text, `*` for a name that the user gives."""
    schema, found = json_schema(), set()

    def walk(node: dict[str, Any], path: str) -> None:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node
        for member in (*node.get("anyOf", []), *node.get("oneOf", [])):
            walk(member, path)
        if node.get("type") == "string" and "enum" not in node and "const" not in node:
            found.add(path)
        for key, member in node.get("properties", {}).items():
            walk(member, f"{path}.{key}" if path else key)
        if "items" in node:
            walk(node["items"], f"{path}[]")
        others = [node["additionalProperties"]] if isinstance(node.get("additionalProperties"), dict) else []
        for member in (*node.get("patternProperties", {}).values(), *others):
            walk(member, f"{path}.*")

    walk(schema, "")
    return found


def arguments_of_verbs() -> set[str]:
    """The long name of every option, and what stands for each argument."""
    parser = build_parser()
    verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    actions = [action for verb in verbs.choices.values() for action in verb._actions] + parser._actions
    named = [action for action in actions if not isinstance(action, argparse._SubParsersAction)]
    return {action.option_strings[-1] if action.option_strings else str(action.metavar) for action in named}


def test_every_key_of_the_configuration_is_listed() -> None:
    assert text_keys() == NO_FILE.keys() | KEYS.keys()


def test_every_argument_is_listed() -> None:
    assert arguments_of_verbs() == NO_FILE_ARGUMENTS | ARGUMENTS.keys()


# ---- hostile files --------------------------------------------------------------------------------------------------


def _npy(data: bytes) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def _zipped(path: Path, **entries: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "/").replace("_npy", ".npy").replace("_pkl", ".pkl"), content)
    return path


def _checkpoint(path: Path, evil: bytes) -> Path:
    return _zipped(path, archive__data_pkl=evil, archive__version=b"3")


def _mocap(path: Path, evil: bytes) -> Path:
    return _zipped(path, hand_pose_npy=_npy(evil), betas_npy=_npy(evil))


Command = tuple[str, ...]
Door = Callable[[Lab, bytes], Command]
"""Puts a file before the door; the command that opens it."""


def _set(changes: Callable[[Lab, bytes], dict[str, Any]], *command: str) -> Door:
    def door(lab: Lab, evil: bytes) -> Command:
        lab.configure(changes(lab, evil))
        return command

    return door


def _labels(lab: Lab, evil: bytes) -> Command:
    members = sample("a") | sample("b") | {"b.data.pyd": evil}
    with tarfile.open(tar_path(lab.folder, "alpha"), "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return ("run", "ingest", "--json")


def _links(lab: Lab, evil: bytes) -> Command:
    with tarfile.open(tar_path(lab.folder, "alpha"), "w") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    return ("run", "ingest")


def _evaluation(lab: Lab, **dataset: Any) -> dict[str, Any]:
    return {"datasets.val": {"format": "hamer_npz", "path": "val.npz", "image_dir": "pictures"} | dataset}


def _objects(lab: Lab, evil: bytes) -> dict[str, Any]:
    _zipped(lab.folder / "val.npz", imgname_npy=_npy(evil))
    return _evaluation(lab)


def _sound_npz(lab: Lab, name: str = "a.jpg") -> None:
    (lab.folder / "pictures").mkdir(exist_ok=True)
    (lab.folder / "pictures/a.jpg").write_bytes(picture())
    boxes = {"center": np.full((1, 2), 20.0), "scale": np.full((1, 2), 30.0)}
    np.savez(lab.folder / "val.npz", imgname=np.array([name]), **boxes)


def _leads_out(lab: Lab, evil: bytes) -> Command:
    _sound_npz(lab, "../tars/../pictures/a.jpg")
    lab.configure(_evaluation(lab))
    return ("run", "ingest", "--json")


def _truth(key: str) -> Callable[[Lab, bytes], dict[str, Any]]:
    def changes(lab: Lab, evil: bytes) -> dict[str, Any]:
        _sound_npz(lab)
        (lab.folder / "truth.json").write_bytes(b"[" * 100_000)
        return _evaluation(lab, **{key: "truth.json"})

    return changes


def _teacher(lab: Lab, evil: bytes) -> dict[str, Any]:
    return {"teacher.checkpoint": str(_checkpoint(lab.folder / "teacher/checkpoints/evil.ckpt", evil))}


def _tagged_model_config(lab: Lab, evil: bytes) -> Command:
    path = lab.folder / "teacher/model_config.yaml"
    path.write_text(path.read_text() + f"X: !!python/object/apply:os.system ['touch {lab.folder / 'ran'}']\n")
    return ("plan",)


def _file(lab: Lab, name: str, content: bytes) -> str:
    (lab.folder / name).write_bytes(content)
    return str(lab.folder / name)


def _prior(key: str) -> Callable[[Lab, bytes], dict[str, Any]]:
    return lambda lab, evil: {
        key: {"weight": 0.1, "mocap": str(_mocap(lab.folder / "m.npz", evil))},
    }


def _show(name: str, content: Callable[[bytes], bytes]) -> Door:
    return lambda lab, evil: ("show", _file(lab, name, content(evil)))


def _student(lab: Lab, evil: bytes) -> str:
    found: Path = sorted(lab.workdir.glob("students/plain/seed-0/*/student"))[0]
    (found / "weights.safetensors").write_bytes(evil)
    return str(found)


def _shard(lab: Lab, evil: bytes) -> Command:
    shard = lab.shards()[0]
    document = json.loads((shard / "teacher/features/zarr.json").read_bytes())
    document["codecs"] = [{"name": "pickle", "configuration": {"x": evil.hex()}}]
    document["shape"] = [2**62] * 5
    (shard / "teacher/features/zarr.json").write_text(json.dumps(document))
    return ("show", str(shard))


def _predict(*options: str) -> Callable[[Lab], Command]:
    def command(lab: Lab) -> Command:
        photo = _file(lab, "photo.jpg", picture())
        return ("predict", photo, "--out", str(lab.folder / "out"), *options)

    return command


def _bomb(evil: bytes) -> bytes:
    """A PNG of 30,000 x 30,000 pixels in a few bytes."""
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + evil


DOORS: dict[str, Door] = {
    "configuration": lambda lab, evil: (
        "check",
        "-c",
        _file(lab, "evil.yaml", f"x: !!python/object/apply:os.system ['touch {lab.folder / 'ran'}']".encode()),
    ),
    "tar of labels": _labels,
    "tar of links": _links,
    "npz of objects": _set(_objects, "run", "ingest"),
    "names that lead out": _leads_out,
    "deep truth": _set(_truth("truth_xyz"), "run", "ingest"),
    "deep vertices": _set(_truth("truth_verts"), "run", "ingest"),
    "checkpoint": _set(_teacher, "run", "teach"),
    "model_config": _tagged_model_config,
    "hand model": _set(lambda lab, evil: {"teacher.mano_model": _file(lab, "MANO_RIGHT.pkl", evil)}, "run", "teach"),
    "hand model npz": _set(
        lambda lab, evil: {"teacher.mano_model": str(_zipped(lab.folder / "hand.npz", v_template_npy=_npy(evil)))},
        *("run", "teach"),
    ),
    "hand to render": _set(
        lambda lab, evil: {
            "synthesise": {
                "hand_model": _file(lab, "hand.pkl", evil),
                "sets": {"alpha": {"samples": 4}},
            }
        },
        *("run", "synthesise"),
    ),
    "weights": _set(
        lambda lab, evil: {"students.plain.weights": str(_checkpoint(lab.folder / "w.pth", evil))}, "run", "train"
    ),
    "mocap": _set(_prior("train.prior"), "run", "train"),
    "mocap of a student": _set(_prior("students.plain.prior"), "run", "train"),
    "shown checkpoint": lambda lab, evil: ("show", str(_checkpoint(lab.folder / "teacher/checkpoints/x.ckpt", evil))),
    "shown table": _show("x.parquet", lambda evil: b"PAR1" + evil + len(evil).to_bytes(4, "little") + b"PAR1"),
    "shown json": _show("x.json", lambda evil: b"[" * 100_000),
    "shown shard": _shard,
    "another cache": lambda lab, evil: ("audit", "--against", str(Path(_file(lab, "cache.json", evil)).parent)),
    "exported folder": lambda lab, evil: ("export", _student(lab, evil), "--to", str(lab.folder / "out")),
    "photograph": lambda lab, evil: (
        *("predict", _file(lab, "photo.png", _bomb(evil)), "--box", "1,1,9,9"),
        *("--out", str(lab.folder / "out")),
    ),
    "network": lambda lab, evil: _predict(
        "--box", "1,1,9,9", "--network", str(_checkpoint(lab.folder / "teacher/checkpoints/n.ckpt", evil))
    )(lab),
    "student folder": lambda lab, evil: _predict("--box", "1,1,9,9", "--network", _student(lab, evil))(lab),
    "hand of a checkpoint": lambda lab, evil: _predict(
        *("--box", "1,1,9,9", "--network", str(lab.folder / "teacher/checkpoints/hamer.ckpt")),
        *("--mano-model", _file(lab, "MANO_RIGHT.pkl", evil)),
    )(lab),
    "boxes": lambda lab, evil: _predict("--boxes", _file(lab, "boxes.json", b'{"photo.jpg": ' + b"[" * 100_000))(lab),
    "wheel": lambda lab, evil: _predict(
        "--detector", str(_zipped(lab.folder / "mediapipe.whl", mediapipe__palm_detection_full=evil))
    )(lab),
}
QUARANTINED = ("tar of labels",)
"""Doors behind which one hand is left out and the rest goes on."""
DAMAGED = {"shown table", "shown json", "shown shard", "another cache", "exported folder", "student folder"}
"""Files that handstill itself wrote: the work fails with exit code 1, and the message says how they are made again."""
PICKLES = ("os.system", "exec in a value", "NEWOBJ")


def test_every_door_is_tried() -> None:
    assert {door for doors in (KEYS | ARGUMENTS).values() for door in doors} == DOORS.keys()


@pytest.fixture
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("name", DOORS)
def test_nothing_runs_and_it_is_told(lab: Lab, name: str) -> None:
    marker = lab.folder / "ran"
    for pickled in PICKLES[: 1 if name in DAMAGED else len(PICKLES)]:
        evil = hostile_pickles.running(marker)[pickled]
        command = DOORS[name](lab, evil)
        answer = handstill(*command, *(() if "-c" in command else ("-c", lab.config)))
        assert not marker.exists(), f"{name}: {pickled} ran"
        assert "Traceback" not in answer.err
        if name in QUARANTINED:
            assert answer.code == 0, answer.err
            assert answer.document["stages"]["ingest"]["quarantined"] >= 1
            break
        assert answer.code == (1 if name in DAMAGED else 2), (name, answer.code, answer.err)
        assert len(answer.err) > 40, "what was found, what was wanted, what to do"
