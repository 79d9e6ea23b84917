"""A short slice of the fuzz run: every parser of outside data, fifteen changed files each, always the same ones."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.containers import tar_changed, zip_changed
from tests.fuzz.guard import ForbiddenError, guarded
from tests.fuzz.parsers import PARSERS
from tests.tars import sample, write_tar

ROOT = Path(__file__).parents[2]


def test_every_parser_ends_in_its_documented_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.run", "--executions", "15", "--minutes", "0.5", "--seed", "1"]
    quiet = {"OPENCV_FFMPEG_LOGLEVEL": "-8", "OPENCV_LOG_LEVEL": "SILENT", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--findings", str(tmp_path / "findings")],
        cwd=ROOT,
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        check=False,
    )
    results = {line["parser"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, done.stderr[-4000:]
    assert results.keys() == PARSERS.keys()
    assert all(result["executions"] == 15 and not result["findings"] for result in results.values())
    assert sum(result["refused"] for result in results.values()) > 150, "most of what was changed is noticed"


def test_the_guided_run_reads_and_counts(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="the extra `fuzz` is not installed")
    command = [sys.executable, "-m", "tests.fuzz.guided", "boxes", "--minutes", "0.05", "--findings", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["executions"] == result["accepted"] + result["refused"] > 20
    assert result["covered"] > 5
    assert result["findings"] == []


def test_the_guard_sees_what_a_parser_does_and_hides(tmp_path: Path) -> None:
    def hides() -> None:
        try:
            (tmp_path / "written").write_text("x")
        except BaseException:
            return

    with pytest.raises(ForbiddenError, match=r"open .*written"), guarded():
        hides()
    assert not (tmp_path / "written").exists()
    (tmp_path / "written").write_text("x")  # the guard is down again


def test_containers_are_put_together_again(tmp_path: Path) -> None:
    """Many changed tars and zips get past their checksums: else only the first check would be tested."""
    rng, opened = Random(0), 0
    whole = write_tar(tmp_path / "a.tar", sample("a")).read_bytes()
    with zipfile.ZipFile(stored := io.BytesIO(), "w") as archive:
        archive.writestr("a", b"x" * 100)
    for _ in range(100):
        try:
            with tarfile.open(fileobj=io.BytesIO(tar_changed({})(whole, rng))) as tar:
                tar.getmembers()
            zipfile.ZipFile(io.BytesIO(zip_changed({})(stored.getvalue(), rng))).infolist()
            opened += 1
        except (tarfile.TarError, zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError):
            pass
    assert opened > 40
