"""Which code is at work: the package's version, and the git commit where it runs from a checkout."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@lru_cache(maxsize=1)
def provenance_tags() -> dict[str, str]:
    """The tags by which MLflow shows a run's source; `handstill.dirty` where files differ from the commit."""
    tags = {"mlflow.source.name": "handstill", "mlflow.source.type": "LOCAL", "handstill.version": version("handstill")}
    commit = _git("rev-parse", "HEAD") if (ROOT / ".git").exists() else None  # not of a repository around site-packages
    if commit is None:
        return tags
    tags["mlflow.source.git.commit"] = commit
    if _git("status", "--porcelain", "--untracked-files=no"):
        tags["handstill.dirty"] = "true"
    return tags


def _git(*arguments: str) -> str | None:
    """What git answers; None where there is no git, or where it refuses."""
    try:
        said = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() if said.returncode == 0 else None
