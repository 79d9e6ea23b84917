"""The same parsers, guided by coverage: `python -m tests.fuzz.guided --minutes 10 [PARSER...]`; wants atheris.

libFuzzer keeps every changed file that reaches a line of ours which none reached before, and changes it further, by the
same functions that know the format (tests/fuzz/mutation.py). So it gets through several checks one after the other,
where tests/fuzz/run.py has to pass all of them at once, and is several times slower. The guard and what counts as a
finding are those of run.py. Parsers that read several files at once (cache, student) have no coverage here: their
cases are drawn by the bytes.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

OURS = ["storage", "models", "stages", "pipeline", "trainer"]
LARGEST_BYTES = 1 << 20


def child(name: str, folder: Path, seconds: float, seed: int, findings: Path) -> None:
    """Fuzz one parser; prints one JSON line, and never returns."""
    import atheris

    with atheris.instrument_imports(include=OURS):
        from tests.fuzz import parsers, run
        from tests.fuzz.guard import limit_memory, peak_bytes

        make = parsers.PARSERS[name](folder)
    sys.dont_write_bytecode = True
    corpus = folder.parent / "corpus"
    corpus.mkdir()
    for number, data in enumerate(make.seeds if isinstance(make, parsers.OneFile) else [b"0"]):
        (corpus / str(number)).write_bytes(data)
    counters, until = run.Counters(mmap.mmap(-1, 64)), time.monotonic() + seconds
    memory = peak_bytes()

    def one(data: bytes) -> None:
        if time.monotonic() > until:
            n, accepted, refused, growth, slowest = counters.values()
            found = sorted(path.name for path in (findings / name).glob("*"))
            told = {"parser": name, "minutes": round(seconds / 60, 2), "executions": n, "accepted": accepted}
            told |= {"refused": refused, "memory_growth_mib": growth >> 20, "slowest_s": round(slowest, 2)}
            sys.stdout.write(json.dumps(told | {"findings": found}) + "\n")
            sys.stdout.flush()
            os._exit(0)
        case = make.of(data) if isinstance(make, parsers.OneFile) else make(Random(data))
        run.try_one(case, findings / name, counters, memory)

    def change(data: bytes, largest: int, number: int) -> bytes:
        rng = Random(number)
        if not isinstance(make, parsers.OneFile):
            return rng.randbytes(8)
        return make.mutator(data, rng)[:largest]

    limits = [
        f"-max_len={LARGEST_BYTES}",
        f"-seed={seed or 1}",
        "-rss_limit_mb=0",
        "-timeout=0",
        "-print_final_stats=0",
    ]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], one, custom_mutator=change)
    limit_memory()
    atheris.Fuzz()


def fuzz(name: str, seconds: float, seed: int, findings: Path) -> dict[str, object]:
    """What came of one parser; `covered`: edges of our code that some file reached. A crash is a finding."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "files"
        folder.mkdir()
        command = [sys.executable, "-m", "tests.fuzz.guided", name, "--minutes", str(seconds / 60), "--seed", str(seed)]
        done = subprocess.run(
            [*command, "--findings", str(findings.absolute()), "--folder", str(folder)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    sys.stderr.write("".join(line + "\n" for line in done.stderr.splitlines() if "FOUND" in line))
    covered = re.findall(r"cov: (\d+)", done.stderr)
    if done.returncode != 0:
        return {"parser": name, "findings": [f"the process ended with {done.returncode}"], "said": done.stderr[-2000:]}
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result | {"covered": int(covered[-1]) if covered else None}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parsers", nargs="*", metavar="PARSER")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each parser")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a child
    options = parser.parse_args(arguments)
    if options.folder is not None:
        child(options.parsers[0], options.folder, options.minutes * 60, options.seed, options.findings)
    failed = False
    for name in options.parsers or _names():
        result = fuzz(name, options.minutes * 60, options.seed, options.findings)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
        failed |= bool(result["findings"])
    return int(failed)


def _names() -> list[str]:
    from tests.fuzz.parsers import PARSERS  # not at the top: what a child imports, it instruments

    return list(PARSERS)


if __name__ == "__main__":
    sys.exit(main())
