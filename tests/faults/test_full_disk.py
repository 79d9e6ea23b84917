"""A disk that fills up: a clear error, nothing half-written under a final name, and once there is room it goes on."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.cache import CacheFolder
from storage.verification import verify_shard
from tests.faults.driver import Driver, read_events, run, workdir_of
from tests.faults.experiment import beside, cache_of, leftovers, prepare
from tests.stages import teaching


@pytest.mark.parametrize("limit_bytes", [500, 2_000, 20_000, 60_000])
def test_a_write_that_fails_leaves_nothing_half_written(tmp_path: Path, limit_bytes: int) -> None:
    """Files may not grow beyond a limit: the kernel stops a write in its midst, as on a full disk."""
    table = teaching.write_data(tmp_path)
    undisturbed = teaching.contents(teaching.run(tmp_path, tmp_path / "calm", table).root)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        try:
            teaching.run(tmp_path, tmp_path / "full", table)
        except OSError as error:
            os._exit(error.errno or 0)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == errno.EFBIG
    for root in (tmp_path / "full").iterdir():
        whole = teaching.contents(root)
        assert {name: undisturbed[name] for name in whole} == whole
    assert teaching.contents(teaching.run(tmp_path, tmp_path / "full", table).root) == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, where we may make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"may not mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1m", "9m"])
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(small_disk: Path, size: str) -> None:
    """Full of MLflow's file and the first manifests, and full in the midst of the shards: three megabytes of four."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True)
    calm = prepare(small_disk.parent)
    assert run(calm, "run", "teach")[0] == 0
    config = beside(calm, "full", {"workdir": str(small_disk)})
    workdir_of(config).symlink_to(small_disk)
    code, said = run(config, "run", "teach")
    assert code == 1
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert (size == "9m") == bool(list(small_disk.glob("cache/*/ledger/*.json")))
    for root in small_disk.glob("cache/*"):
        folder = CacheFolder(root)
        assert [damage for record in folder.finished().values() for damage in verify_shard(folder, record)] == []
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    code, said = run(config, "run", "teach")
    assert code == 0, said
    assert cache_of(config) == cache_of(calm)
    assert leftovers(config) == []


@pytest.mark.slow
def test_a_disk_that_may_not_be_written_to_is_the_users_to_change(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, said = run(beside(prepare(small_disk.parent), "readonly", {"workdir": str(small_disk / "work")}))
    assert code == 2
    assert f"cannot write to {small_disk / 'work'}: Read-only file system" in said
    assert "Traceback" not in said


@pytest.fixture
def freeze() -> Iterator[Callable[[Path], None]]:
    """Makes folders immutable, which holds for root too: a file system that is in use cannot be made read-only."""
    frozen: list[Path] = []

    def make_immutable(folder: Path) -> None:
        done = subprocess.run(["chattr", "+i", str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot make a folder immutable: {done.stderr.strip()}")
        frozen.append(folder)

    if shutil.which("chattr") is None:
        pytest.skip("there is no chattr")
    yield make_immutable
    for folder in frozen:
        subprocess.run(["chattr", "-i", str(folder)], check=True)


@pytest.mark.slow
def test_a_workdir_that_turns_read_only_in_the_midst(tmp_path: Path, freeze: Callable[[Path], None]) -> None:
    """Forty-five seconds: after the first shard none can be published; made writable again, the run goes on."""
    calm = prepare(tmp_path)
    assert run(calm, "run", "teach")[0] == 0
    config = beside(calm, "frozen")
    with Driver(config, ("run", "teach")) as driver:
        first = driver.wait_for("shard_committed")["unit"]
        (shards,) = [path.parent for path in workdir_of(config).glob(f"cache/*/shards/{first}.zarr")]
        freeze(shards)
        code, said = driver.finish(), driver.said
    if code == 0:
        pytest.skip("the run was done before the folder was immutable")
    assert code == 1
    assert "Operation not permitted" in said.splitlines()[-1]
    assert "Traceback" not in said
    subprocess.run(["chattr", "-i", str(shards)], check=True)
    code, said = run(config, "run", "teach")
    assert code == 0, said
    assert cache_of(config) == cache_of(calm)
    assert leftovers(config) == []
    committed = Counter(event["unit"] for event in read_events(config) if event["event"] == "shard_committed")
    assert set(committed.values()) == {1}
