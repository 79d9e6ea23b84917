"""One run at a time on an object store: whose lease stands still is dead, and nobody's clock is asked."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline import status as status_module
from pipeline import store_lease as module
from pipeline.status import _running, _Told
from pipeline.store_lease import read_lease, store_lease, was_ours
from pipeline.workdir import Claim, Workdir, claim_of, lease
from storage import objects
from storage.bucket import Bucket
from storage.errors import BusyError, WorkError
from storage.mirror import LEASE, Mirror
from tests.object_store import S3Server, misbehaving_server

URL = "s3://hands/work"
ELSEWHERE = {"pid": 7, "host": "far", "run": "theirs", "copy": "theirs", "process": "", "beat": 0, "released": False}


@pytest.fixture(scope="module")
def _server() -> Iterator[S3Server]:
    with misbehaving_server() as server:
        yield server


@pytest.fixture
def server(_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    monkeypatch.setattr(objects, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    monkeypatch.setattr(module, "LOOK_S", 0.2)
    monkeypatch.setattr(module, "TTL_S", 2.0)
    _server.misbehave()
    Bucket(URL).delete(Bucket(URL).below())
    return _server


def workdir(folder: Path) -> Workdir:
    return Workdir(folder, Mirror(folder, URL))


def holder(run: str) -> dict[str, Any]:
    return {"pid": os.getpid(), "host": "here", "since": "2026-11-23T01:02:03+00:00", "run": run}


def say(document: dict[str, Any]) -> None:
    Bucket(URL).write(LEASE, json.dumps(document).encode())


@contextmanager
def beating(document: dict[str, Any]) -> Iterator[None]:
    """Another machine's run that lives."""
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(0.1):
            say(document | {"beat": (number := number + 1)})

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("since", ["1999-01-01T00:00:00+00:00", "2099-01-01T00:00:00+00:00"])
def test_a_lease_that_changes_is_held_whatever_the_clocks_say(server: S3Server, tmp_path: Path, since: str) -> None:
    say(ELSEWHERE | {"since": since})
    with (
        beating(ELSEWHERE | {"since": since}),
        pytest.raises(BusyError, match=rf"another run holds {URL}: process 7 on far, since {since[:10]} 00:00:00 UTC"),
        store_lease(Mirror(tmp_path, URL), holder("ours")),
    ):
        pass


@pytest.mark.parametrize("since", ["1999-01-01T00:00:00+00:00", "2099-01-01T00:00:00+00:00"])
def test_a_lease_that_stands_still_is_taken_over(server: S3Server, tmp_path: Path, since: str) -> None:
    say(ELSEWHERE | {"since": since})
    began = time.monotonic()
    with store_lease(Mirror(tmp_path, URL), holder("ours")):
        assert time.monotonic() - began >= module.TTL_S - module.LOOK_S
        assert read_lease(Bucket(URL))[0]["run"] == "ours"
        before = read_lease(Bucket(URL))[0]["beat"]
        time.sleep(1)
        assert read_lease(Bucket(URL))[0]["beat"] > before
    assert read_lease(Bucket(URL))[0]["released"]


def test_a_process_of_this_machine_that_is_dead_is_not_waited_for(server: S3Server, tmp_path: Path) -> None:
    dead = module._this_process().rpartition(" ")[0] + " 1"  # our own number, of a process that began long ago
    say(ELSEWHERE | {"process": dead})
    began = time.monotonic()
    with store_lease(Mirror(tmp_path, URL), holder("ours")):
        assert time.monotonic() - began < module.TTL_S
    with (
        store_lease(Mirror(tmp_path, URL), holder("ours")),
        pytest.raises(BusyError, match="another run holds"),
        store_lease(Mirror(tmp_path / "other", URL), holder("second")),
    ):
        pass


def test_of_runs_that_begin_at_once_one_gets_it(server: S3Server, tmp_path: Path) -> None:
    got: list[str] = []
    done = threading.Barrier(4)

    def run(name: str) -> None:
        try:
            with store_lease(Mirror(tmp_path / name, URL), holder(name)):
                got.append(name)
                done.wait(60)
        except BusyError:
            done.wait(60)

    threads = [threading.Thread(target=run, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_a_run_whose_lease_was_taken_stops_and_its_workers_too(server: S3Server, tmp_path: Path) -> None:
    place = workdir(tmp_path)

    def run() -> None:
        claim = claim_of(place)
        with claim.held():
            (tmp_path / "manifests").mkdir()
            (tmp_path / "manifests" / "one").write_text("1")
        assert "manifests/one" in Bucket(URL).below()
        say(ELSEWHERE | {"since": "2026-11-23T01:02:03+00:00"})
        (tmp_path / "manifests" / "two").write_text("2")
        with pytest.raises(WorkError, match="this worker's run is over"):
            claim.check()
        threading.Event().wait(30)

    with pytest.raises(WorkError, match=f"another run took {URL}: process 7 on far"), lease(place):
        run()
    assert "manifests/two" not in Bucket(URL).below()
    assert read_lease(Bucket(URL))[0]["run"] == "theirs"


def test_a_beat_whose_answer_is_lost_loses_no_lease(server: S3Server, tmp_path: Path) -> None:
    with store_lease(Mirror(tmp_path, URL), holder("ours")) as held:
        for _ in range(3):
            server.misbehave(("PUT", LEASE, "lost", 1))
            time.sleep(0.5)
        assert held.lost == ""
        server.misbehave()


def test_a_worker_on_another_machine_has_what_it_needs_and_gives_what_it_made(server: S3Server, tmp_path: Path) -> None:
    here, far = workdir(tmp_path / "here"), workdir(tmp_path / "far")
    with lease(here):
        here.manifests.mkdir()
        (here.manifests / "one").write_text("1")
        here.settle()
        with Claim(far, claim_of(here).holder).held():
            assert (far.manifests / "one").read_text() == "1"
            (far.manifests / "two").write_text("2")
            far.events.parent.mkdir()
            far.events.write_text("a worker's own")
        here.settle()
        assert (here.manifests / "two").read_text() == "2"
        assert not here.events.exists()
    assert here.store is not None
    assert far.store is not None
    assert (was_ours(here.store), was_ours(far.store)) == (True, False)


def test_a_store_without_conditions_is_refused(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bucket, "write_if", lambda self, name, data, etag: self.write(name, data))
    with (
        pytest.raises(ValueError, match="does not honour conditional writes"),
        store_lease(Mirror(tmp_path, URL), holder("ours")),
    ):
        pass


def test_status_sees_a_run_on_another_machine_by_its_lease(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_module, "TTL_S", 2.0)
    told = _Told()  # no log has come here yet
    said = holder("theirs") | {"host": "elsewhere", "job": "handstill-tiny-1"}
    assert _running(workdir(tmp_path), told) is None
    with beating(said):
        time.sleep(0.3)
        running = _running(workdir(tmp_path), told)
    assert running == {key: said[key] for key in ("pid", "host", "since", "run", "job")} | {"nodes": {}}
    say(said | {"released": True})
    assert _running(workdir(tmp_path), told) is None
    say(said)
    time.sleep(3.5)  # longer than a lease lives here; the server says times in whole seconds
    assert _running(workdir(tmp_path), told) is None
