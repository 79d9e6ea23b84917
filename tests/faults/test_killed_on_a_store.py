"""kill -9 of a whole run whose workdir, tars and teacher are on an object store, and another machine that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.bucket import Bucket
from storage.mirror import LEASE
from tests.object_store import SECRET, sound_server
from tests.pipeline.test_store_workdir import CHANGES, SHARDS, URL, cache_on_disk, cache_on_store, on_store
from tests.tiny_experiment import make_experiment

pytestmark = pytest.mark.slow

RUN = [sys.executable, "-m", "pipeline.cli", "run"]


def run(config: Path, *stage: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *stage, "-c", str(config)], capture_output=True, text=True, timeout=900, check=False)


def records() -> list[str]:
    return [name for name in Bucket(URL).below("cache/") if "/ledger/" in name]


@pytest.mark.timeout(2400)
def test_a_run_killed_in_the_middle_goes_on_elsewhere_and_then_has_nothing_to_do(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)  # MLflow keeps the artefacts of an SQLite store below the current folder
    local = make_experiment(tmp_path / "local", CHANGES)
    assert run(local, "teach").returncode == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    with sound_server(tmp_path_factory.mktemp("store")):
        config = on_store(tmp_path / "remote")
        victim = subprocess.Popen([*RUN, "-c", str(config)], start_new_session=True, stderr=subprocess.DEVNULL)
        while not records():
            assert victim.poll() is None
            time.sleep(0.05)
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
        kept = {name: Bucket(URL).etag(name) for name in records()}
        assert 0 < len(kept) < SHARDS
        assert b'"released": false' in Bucket(URL).read(LEASE)[0]

        time.sleep(3)  # its workers notice that it is gone
        (tmp_path / "machine").rename(tmp_path / "dead machine")  # another one, which never saw the first
        resumed = run(config)
        assert resumed.returncode == 0, resumed.stderr
        assert cache_on_store() == cache_on_disk(tmp_path / "local" / "work" / "cache")
        assert {name: Bucket(URL).etag(name) for name in kept} == kept

        before = {name: found.etag for name, found in Bucket(URL).below().items()}
        idle = run(config)
        assert idle.returncode == 0, idle.stderr
        after = {name: found.etag for name, found in Bucket(URL).below().items()}
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        assert {name.partition("/")[0] for name in changed} <= {LEASE, "logs", "summaries", "summary.json", "state"}
        said = [resumed.stdout + resumed.stderr + idle.stdout + idle.stderr]
        stored = [Bucket(URL).read(name)[0] for name in after]
    here = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [data for data in [*stored, *here, *(text.encode() for text in said)] if SECRET.encode() in data]
