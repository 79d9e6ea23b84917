"""A finished experiment to change things in, and what `plan` and `run` then make of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.pipeline.commands import as_json
from tests.tiny_experiment import configure, events_of, tar_path, write_hands

NOTHING: dict[str, int] = {"new": 0, "changed": 0, "removed": 0, "damaged": 0}


@dataclass(frozen=True)
class Work:
    """What one run computed, by its event log."""

    scanned: list[str] = field(default_factory=list)
    """Names of the source files."""
    shards: dict[str, int] = field(default_factory=dict)
    """Shards committed, by data set."""
    trained: list[str] = field(default_factory=list)
    """Students."""
    scored: list[str] = field(default_factory=list)
    reported: bool = False


NO_WORK = Work()


@dataclass(frozen=True)
class Lab:
    config: Path

    @property
    def folder(self) -> Path:
        return self.config.parent

    @property
    def workdir(self) -> Path:
        return self.folder / "work"

    def configure(self, changes: Mapping[str, Any]) -> None:
        configure(self.config, changes)

    def rewrite(self, dataset: str, index: int = 0, **how: Any) -> Path:
        """Write a data set's tar anew; see `write_hands`."""
        return write_hands(tar_path(self.folder, dataset, index), dataset, index, **how)

    def plan(self, *options: str) -> dict[str, Any]:
        """Each stage of `plan --json`, which must not write a byte."""
        before = tree(self.folder)
        stages: dict[str, Any] = as_json(self.config, "plan", *options)["stages"]
        assert tree(self.folder) == before
        return stages

    def reasons(self, *options: str) -> dict[str, dict[str, int]]:
        """The stages that have something to do or to forget, and how many units for which reason."""
        named = {
            name: {reason: count for reason, count in stage["reasons"].items() if count}
            for name, stage in self.plan(*options).items()
        }
        return {name: reasons for name, reasons in named.items() if reasons}

    def run(self, *arguments: str) -> Work:
        """Run, and say what was computed."""
        seen = len(events_of(self.config))
        as_json(self.config, "run", *arguments)
        return work_of(events_of(self.config, seen))

    def shards(self, dataset: str | None = None) -> list[Path]:
        """The shards of a data set, or all."""
        return [
            path
            for path in sorted(self.workdir.glob("cache/*/shards/*.zarr"))
            if dataset is None or f'"{dataset}"' in (path / "zarr.json").read_text()
        ]


def work_of(events: list[dict[str, Any]]) -> Work:
    def units(event: str) -> list[str]:
        return sorted(item["unit"] for item in events if item["event"] == event)

    return Work(
        scanned=[Path(unit).name for unit in units("ingest_done")],
        shards=dict(Counter(item["dataset"] for item in events if item["event"] == "shard_committed")),
        trained=[unit.removesuffix("-seed0") for unit in units("train_done")],
        scored=[unit.removesuffix("-seed0") for unit in units("evaluate_done")],
        reported=any(item["event"] == "stage_done" and item["stage"] == "compare" and item["done"] for item in events),
    )


def tree(folder: Path) -> dict[str, str]:
    """The digest of every file under a folder, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
