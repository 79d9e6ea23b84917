"""Which code is at work: the package's version, and the git commit where it runs, or was submitted, from a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
JOB_PROVENANCE = "HANDSTILL_JOB_PROVENANCE"
"""In the environment of a submitted job, whose code came without its repository: what `provenance_tags` said there."""


@lru_cache(maxsize=1)
def provenance_tags() -> dict[str, str]:
    """The tags by which MLflow shows a run's source; `handstill.dirty` where files differ from the commit."""
    if told := os.environ.get(JOB_PROVENANCE):
        return {str(key): str(value) for key, value in json.loads(told).items()}
    tags = {"mlflow.source.name": "handstill", "mlflow.source.type": "LOCAL", "handstill.version": _version()}
    commit = _git("rev-parse", "HEAD") if (ROOT / ".git").exists() else None  # not of a repository around site-packages
    if commit is None:
        return tags
    tags["mlflow.source.git.commit"] = commit
    if _git("status", "--porcelain", "--untracked-files=no"):
        tags["handstill.dirty"] = "true"
    return tags


def _version() -> str:
    try:
        return version("handstill")
    except PackageNotFoundError:  # run from its folder, without having been installed
        project = ROOT / "pyproject.toml"
        document: dict[str, Any] = tomllib.loads(project.read_text()) if project.is_file() else {}
        return str(document.get("project", {}).get("version", "unknown"))


def _git(*arguments: str) -> str | None:
    """What git answers; None where there is no git, or where it refuses."""
    try:
        said = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() if said.returncode == 0 else None
