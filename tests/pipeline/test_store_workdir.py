"""An experiment whose workdir, tars and teacher are on an object store: the same cache, byte for byte."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.store_lease import is_held
from stages.preparation import SourceChangedError, read_photo
from storage import bucket as bucket_module
from storage import inputs, objects
from storage.bucket import Bucket
from storage.errors import WorkError
from storage.mirror import Mirror
from tests.object_store import SECRET, misbehaving_server, sound_server
from tests.pipeline.commands import as_json, handstill
from tests.pipeline.lab import NO_WORK, work_of
from tests.pipeline.test_verify import write_npz_of
from tests.tiny_experiment import configure, make_experiment, tar_path

URL = "s3://hands/runs/tiny"
CHANGES = {"students.hybrid.on": ["alpha"], "students.plain!": None, "train.on": ["alpha"], "datasets.beta!": None}
SHARDS = 6


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with sound_server(tmp_path_factory.mktemp("store")) as endpoint:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
        monkeypatch.chdir(tmp_path)  # MLflow keeps the artefacts of an SQLite store below the current folder
        yield endpoint


def on_store(folder: Path) -> Path:
    """The same experiment with everything on the store; the configuration alone is here."""
    config = make_experiment(folder, CHANGES)
    bucket = Bucket("s3://hands/inputs")
    for path in [*folder.rglob("*.tar"), *(path for path in (folder / "teacher").rglob("*") if path.is_file())]:
        bucket.write(path.relative_to(folder).as_posix(), path.read_bytes())
    shutil.rmtree(folder / "tars")
    shutil.rmtree(folder / "teacher")
    return configure(
        config,
        {
            "workdir": URL,
            "datasets.alpha.path": "s3://hands/inputs/tars/alpha-{000000..000001}.tar",
            "datasets.val.path": "s3://hands/inputs/tars/val-000000.tar",
            "teacher.checkpoint": "s3://hands/inputs/teacher/checkpoints/hamer.ckpt",
            "tracking.uri": f"sqlite:///{folder}/ml.db",
        },
    )


def cache_on_disk(folder: Path) -> dict[str, str]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items() if "/snapshots/" not in name}


def cache_on_store() -> dict[str, str]:
    bucket = Bucket(f"{URL}/cache")
    names = [name for name in bucket.below() if "/snapshots/" not in name]
    return {name: hashlib.sha256(bucket.read(name)[0]).hexdigest() for name in names}


def test_a_run_on_a_store_makes_the_same_cache_and_says_nothing_of_the_credentials(
    server: str, tmp_path: Path, inline_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = make_experiment(tmp_path / "local", CHANGES)
    as_json(local, "run", "teach")
    config = on_store(tmp_path / "remote")
    answers = []

    recorded = Mirror._recorded
    monkeypatch.setattr(Mirror, "_recorded", _dies_at(3, recorded))  # after the objects, before the record
    answers.append(handstill("-v", "run", "teach", "-c", config))
    assert answers[-1].code == 1
    assert len([name for name in cache_on_store() if "/ledger/" in name]) == 2
    monkeypatch.setattr(Mirror, "_recorded", recorded)
    [mirror] = [Mirror(path, URL) for path in (tmp_path / "machine" / "handstill" / "workdirs").iterdir()]
    assert len(mirror.orphans()) == 1
    assert not is_held(mirror)

    shutil.rmtree(tmp_path / "machine")  # another one goes on
    plan = as_json(config, "plan", "teach")["stages"]["teach"]
    assert (plan["todo"], plan["total"]) == (SHARDS - 2, SHARDS)
    as_json(config, "check")
    as_json(config, "status")
    copied = [path.name for path in (tmp_path / "machine" / "handstill" / "inputs").rglob("*") if path.is_file()]
    assert copied == ["model_config.yaml"]
    answers.append(handstill("run", "teach", "-c", config))
    assert answers[-1].code == 0, answers[-1].err
    assert cache_on_store() == cache_on_disk(tmp_path / "local" / "work" / "cache")
    events = _events(tmp_path / "machine")
    assert sum(work_of(events).shards.values()) == 2 + SHARDS - 2

    as_json(config, "run", "teach")
    assert work_of(_events(tmp_path / "machine")[len(events) :]) == NO_WORK
    sample = as_json(config, "show", "val:000000#0")
    assert sample["caches"][0]["views"][0]["remade"]["identical_picture"]
    assert as_json(config, "status")["stages"]["teach"]["done"] == SHARDS
    assert as_json(config, "verify", "--no-teacher")["ok"]
    assert as_json(config, "clean", "--stale")["stale"] == {}
    for arguments, told in ((["audit"], "copy the workdir to a disk"), (["export", "hybrid", "-c"], "not trained")):
        answers.append(handstill(*[item for item in arguments if item != "-c"], "-c", config))
        assert (answers[-1].code, told in answers[-1].err) == (2, True), answers[-1].err

    everything = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    everything += [Bucket(URL).read(name)[0] for name in Bucket(URL).below()]
    everything += [(answer.out + answer.err).encode() for answer in answers]
    assert not [data for data in everything if SECRET.encode() in data]


def test_a_run_through_a_stores_faults_makes_the_same_cache_and_computes_nothing_twice(
    tmp_path: Path, inline_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = make_experiment(tmp_path / "local", CHANGES)
    as_json(local, "run", "teach")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    monkeypatch.setattr(objects, "FIRST_WAIT_S", 0.02)
    for module in (objects, bucket_module):
        monkeypatch.setattr(module, "SILENCE_TIMEOUT_S", 1.0)  # the server stalls for five
    with misbehaving_server() as server:
        config = on_store(tmp_path / "remote")
        server.misbehave(
            ("GET", "inputs/tars", "truncate", 2),
            ("GET", "inputs/teacher", "503", 3),
            ("PUT", "/teacher/", "500", 4),
            ("PUT", "/pictures/", "503", 3),
            ("PUT", "/labels/", "stall", 1),
            ("PUT", "/ledger/", "lost", 2),
            ("PUT", "lease.json", "lost", 1),
            ("GET", "/ledger/", "truncate", 1),
            ("GET", "", "503", 2),
        )
        answer = handstill("run", "teach", "-c", config)
        assert answer.code == 0, answer.err
        assert server.left() == 0  # every fault was met
        assert cache_on_store() == cache_on_disk(tmp_path / "local" / "work" / "cache")
        assert sum(work_of(_events(tmp_path / "machine")).shards.values()) == SHARDS

        server.misbehave(("PUT", "/cache/", "503", 10**6))  # one that lasts
        configure(config, {"cache.views": 3})
        monkeypatch.setattr(objects, "ATTEMPTS", 3)
        answer = handstill("run", "teach", "-c", config)
        assert answer.code == 1
        assert "3 attempts failed, the last with 503" in answer.err
        server.misbehave()
        plan = as_json(config, "plan", "teach")["stages"]["teach"]
        assert (plan["todo"], plan["total"]) == (SHARDS - 2, SHARDS)  # evaluation has one view whatever that says
        assert as_json(config, "verify", "--no-teacher")["ok"]


def test_an_npz_and_its_pictures_are_the_same_on_every_machine(
    server: str, tmp_path: Path, inline_workers: None
) -> None:
    config, local = on_store(tmp_path / "remote"), tmp_path / "local"
    make_experiment(local, CHANGES)
    write_npz_of(local, tar_path(local, "val"))
    bucket = Bucket("s3://hands/inputs")
    for path in [path for path in (local / "val").rglob("*") if path.is_file()]:
        bucket.write(path.relative_to(local).as_posix(), path.read_bytes())
    npz = {"path": "s3://hands/inputs/val/val.npz", "image_dir": "s3://hands/inputs/val/rgb"}
    configure(config, {"datasets.val": {"format": "hamer_npz"} | npz})
    as_json(config, "run", "teach")

    shutil.rmtree(tmp_path / "machine")
    plan = as_json(config, "plan", "teach")["stages"]
    assert {name: stage["todo"] for name, stage in plan.items()} == dict.fromkeys(plan, 0)
    before = len(_events(tmp_path / "machine"))
    as_json(config, "run", "teach")
    assert work_of(_events(tmp_path / "machine")[before:]) == NO_WORK

    *_, picture = sorted(bucket.below("val/rgb/"))
    bucket.write(picture, bucket.read(min(bucket.below("val/rgb/")))[0])
    assert as_json(config, "plan", "ingest")["stages"]["ingest"]["reasons"]["changed"] == 1


def test_a_machine_with_an_older_copy_reads_what_was_ingested(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket("s3://hands/inputs")
    bucket.write("1.jpg", b"old")
    path = inputs.copy_of("s3://hands/inputs/1.jpg")
    row = {"image_offset": -1, "image_path": str(path), "image_name": "1.jpg"}
    assert read_photo(row | {"image_sha256": hashlib.sha256(b"old").hexdigest()}, Path("/")) == b"old"
    bucket.write("1.jpg", b"new")
    monkeypatch.setattr(inputs, "_on_store", {})  # another process
    assert read_photo(row | {"image_sha256": hashlib.sha256(b"new").hexdigest()}, Path("/")) == b"new"
    with pytest.raises(SourceChangedError, match=r"1\.jpg has changed since it was ingested"):
        read_photo(row | {"image_sha256": hashlib.sha256(b"older").hexdigest()}, Path("/"))


def test_damage_on_the_store_is_found_and_made_again_and_orphans_are_swept(
    server: str, tmp_path: Path, inline_workers: None
) -> None:
    config = on_store(tmp_path / "remote")
    as_json(config, "run", "teach")
    before = cache_on_store()
    bucket = Bucket(f"{URL}/cache")
    victims = [name for name in before if "teacher/features/c." in name][:2]
    bucket.write(victims[0], b"other bytes")
    lost = victims[1].partition("teacher/")[0]
    bucket.delete(bucket.below(lost))
    answer = handstill("verify", "--no-teacher", "--no-sources", "-c", config, "--json")
    assert answer.code == 1
    assert any("has 11 bytes" in line for line in answer.document["damaged"])
    plan = as_json(config, "plan", "teach")["stages"]["teach"]
    assert plan["reasons"]["damaged"] + plan["reasons"]["changed"] + plan["reasons"]["new"] == 2
    as_json(config, "run", "teach")
    assert cache_on_store() == before
    fingerprint = victims[0].partition("/")[0]
    bucket.write(f"{fingerprint}/shards/{'0' * 64}.zarr/zarr.json", b"{}")
    stale = as_json(config, "clean", "--stale")["stale"]
    assert [Path(name).name for name in stale] == [f"{'0' * 64}.zarr"]
    assert as_json(config, "clean", "--stale", "--yes")["deleted"]
    assert cache_on_store() == before


def test_a_workdir_on_a_store_needs_a_tracking_server_and_its_own_caches(server: str, tmp_path: Path) -> None:
    config = make_experiment(tmp_path, {"workdir": URL})
    told = handstill("plan", "-c", config)
    assert (told.code, "tracking.uri: not set, and the workdir is on an object store" in told.err) == (2, True)
    configure(config, {"tracking.uri": f"sqlite:///{tmp_path}/ml.db", "cache.root": "caches"})
    told = handstill("plan", "-c", config)
    assert (told.code, "leave cache.root out" in told.err) == (2, True)
    configure(config, {"cache!": None, "workdir": "gs://hands/work"})
    told = handstill("plan", "-c", config)
    assert (told.code, "only s3:// can be written to" in told.err) == (2, True)
    configure(config, {"workdir": URL, "datasets.alpha.path": "s3://hands/inputs/gone-{0..4}.tar"})
    told = handstill("plan", "-c", config)
    assert told.code == 2
    assert "not on the object store: s3://hands/inputs/gone-0.tar" in told.err
    assert "and 2 more" in told.err
    assert Bucket(URL).below() == {}


def _dies_at(number: int, method):  # type: ignore[no-untyped-def]  # a method in the place of another
    count = [0]

    def dying(*arguments):  # type: ignore[no-untyped-def]
        count[0] += 1
        if count[0] == number:
            raise WorkError("the worker is gone")
        return method(*arguments)

    return dying


def _events(machine: Path) -> list[dict[str, object]]:
    [log] = machine.glob("handstill/workdirs/*/logs/events.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()]
