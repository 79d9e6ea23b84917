"""Feed changed files to the parsers of outside data: `python -m tests.fuzz.run --minutes 10 [PARSER...]`.

Every input is a valid file with something changed in it (tests/fuzz/mutation.py). A parser must return, or raise what
its documentation names; and start nothing, write nothing, take at most 3 GiB and 20 seconds (tests/fuzz/guard.py).
What breaks that is a finding: printed, and its input kept in a folder of its own. One process at a time, a child that
may crash; then the next begins where it ended. Prints one JSON line a parser; exit code 1 when there are findings.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import mmap
import os
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.fuzz.guard import guarded, limit_memory, peak_bytes
from tests.fuzz.parsers import PARSERS, Case

_COUNTERS = struct.Struct("<QQQQd")
"""Executions, inputs that were accepted, refused, growth of peak memory in bytes, the slowest read in s."""
_KEPT_A_PLACE = 3
"""Inputs kept of findings at one place of the code."""


@dataclass
class Counters:
    """What a child has done, in memory that its parent shares."""

    shared: mmap.mmap

    def add(self, accepted: bool, refused: bool, growth: int, seconds: float) -> None:
        n, good, bad, most, slowest = self.values()
        _COUNTERS.pack_into(
            self.shared, 0, n + 1, good + accepted, bad + refused, max(most, growth), max(slowest, seconds)
        )

    def values(self) -> tuple[int, int, int, int, float]:
        n, good, bad, most, slowest = _COUNTERS.unpack_from(self.shared, 0)
        return n, good, bad, most, slowest


def fuzz(name: str, *, seconds: float, executions: int | None, seed: int, findings: Path) -> dict[str, Any]:
    """Feed one parser for so long, or so often; what came of it."""
    counters = Counters(mmap.mmap(-1, _COUNTERS.size))
    started, crashes = time.monotonic(), 0
    while (left := seconds - (time.monotonic() - started)) > 0:
        with tempfile.TemporaryDirectory() as folder:
            child = os.fork()
            if child == 0:
                _child(name, Path(folder), left, executions, seed + counters.values()[0], findings, counters)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status == 0:
                break
            crashes += 1
            _keep(Path(folder), findings / name / f"crash-{crashes}", f"the process ended with {status}")
            counters.add(accepted=False, refused=False, growth=0, seconds=0)
            if crashes == 20:
                break
    n, accepted, refused, growth, slowest = counters.values()
    return {
        "parser": name,
        "minutes": round((time.monotonic() - started) / 60, 2),
        "executions": n,
        "accepted": accepted,
        "refused": refused,
        "memory_growth_mib": growth >> 20,
        "slowest_s": round(slowest, 2),
        "findings": sorted(path.name for path in (findings / name).glob("*")),
    }


def _child(
    name: str, folder: Path, seconds: float, executions: int | None, seed: int, findings: Path, counters: Counters
) -> None:
    """Never returns: exit code 0 when its time is over."""
    try:
        faulthandler.enable()
        sys.dont_write_bytecode = True  # what a parser imports on its way may not count as writing
        torch.set_num_threads(1)
        make, rng = PARSERS[name](folder), Random(seed)
        limit_memory()
        memory, until = peak_bytes(), time.monotonic() + seconds
        while time.monotonic() < until and (executions is None or counters.values()[0] < executions):
            try_one(make(rng), findings / name, counters, memory)
    except BaseException:
        traceback.print_exc()
        os._exit(3)
    os._exit(0)


def try_one(case: Case, findings: Path, counters: Counters, memory: int) -> None:
    """Read one case under guard; count it, and keep it where it is a finding. memory: the peak before, in bytes."""
    for path, content in case.files.items():
        path.write_bytes(content)
    started, accepted, refused = time.monotonic(), False, False
    try:
        with guarded():
            case.read()
        accepted = True
    except case.allowed:
        refused = True
    except BaseException as error:  # a finding, whatever it is
        _found(case, error, findings)
    counters.add(accepted, refused, peak_bytes() - memory, time.monotonic() - started)


def _found(case: Case, error: BaseException, findings: Path) -> None:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    place = f"{type(error).__name__}-{Path(frames[-1].filename).stem}-{frames[-1].lineno}"
    known = len(list(findings.glob(f"{place}-*")))
    if known == _KEPT_A_PLACE:
        return
    folder = findings / f"{place}-{known}"
    folder.mkdir(parents=True)
    for number, (path, content) in enumerate(case.files.items()):
        (folder / f"{number}-{path.name}").write_bytes(content)
    text = "".join(traceback.format_exception(error))
    (folder / "traceback.txt").write_text(text, "utf-8", "replace")
    sys.stderr.write(f"FOUND {folder}\n{text[-1500:]}\n")


def _keep(source: Path, target: Path, why: str) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)
    (target / "traceback.txt").write_text(why)
    sys.stderr.write(f"FOUND {target}: {why}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parsers", nargs="*", metavar="PARSER", help=f"of: {', '.join(PARSERS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each parser")
    parser.add_argument("--executions", type=int, help="at most so many for each parser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.parsers) - set(PARSERS)):
        parser.error(f"no parser {unknown[0]!r}; want some of {', '.join(PARSERS)}")
    failed = False
    for name in options.parsers or PARSERS:
        result = fuzz(
            name,
            seconds=options.minutes * 60,
            executions=options.executions,
            seed=options.seed,
            findings=options.findings,
        )
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
        failed |= bool(result["findings"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
