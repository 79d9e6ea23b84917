"""The code of a submitted job: what is packed, and the proof that a worker runs just that."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

from storage.errors import WorkError

PACKAGES = ("models", "pipeline", "stages", "storage", "trainer")
ROOT = Path(__file__).parents[1]
"""The folder that this process imports them from."""

JOB_CODE = "HANDSTILL_JOB_CODE"
"""Environment of a job and of its workers: `code_digest` of the code that was submitted."""
JOB_BASE = "HANDSTILL_JOB_BASE"
"""Environment of a job: where relative paths of its configuration start."""
JOB_NAME = "HANDSTILL_JOB"
"""Environment of a job: what `submit --stop` and `--follow` want."""
JOB_FILE = "HANDSTILL_JOB_FILE"
"""Environment of a job: the configuration that was submitted, for people; in the job it has another path."""


@cache
def code_digest() -> str:
    """sha256 over names and bytes of the Python files of the packages that this process imports."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(ROOT).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def check_job_code() -> None:
    """In a worker of a submitted job: raises WorkError where it imports another version of these packages."""
    wanted = os.environ.get(JOB_CODE)
    if wanted is not None and wanted != code_digest():
        raise WorkError(
            f"a worker on {os.uname().nodename} imports {', '.join(PACKAGES)} from {ROOT}, which is not the code "
            "that was submitted. Uninstall handstill from the nodes' image, and take its folder off PYTHONPATH there."
        )
