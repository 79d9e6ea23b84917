"""Whatever file of a cache is harmed: `verify` names it, `run` makes what it belongs to again, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipeline.commands import as_json, handstill
from tests.pipeline.lab import NO_WORK, Lab, Work, tree

Harm = Callable[[Path], None]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


HARMS: dict[str, Harm] = {"flipped": flip, "cut": cut, "appended": append, "deleted": Path.unlink}
OF_EACH_KIND = {
    "shards/*/zarr.json": "flipped",
    "shards/*/views/zarr.json": "cut",
    "shards/*/teacher/features/zarr.json": "flipped",
    "shards/*/teacher/features/c.*": "flipped",
    "shards/*/pictures/bytes/c.*": "appended",
    "shards/*/labels/betas/c.*": "deleted",
    "shards/*/sample_id/c.*": "flipped",
    "ledger/*.json": "flipped",
    "snapshots/*.parquet": "flipped",
    "snapshots/*.json": "deleted",
    "HEAD.json": "deleted",
    "cache.json": "flipped",
    "hand_model.safetensors": "flipped",
}
"""One file of each kind and a harm to it; the slow test below does all to all."""


def cache_of(lab: Lab, dataset: str) -> Path:
    return lab.shards(dataset)[0].parent.parent


def broken_and_repaired(lab: Lab, dataset: str, path: Path, harm: Harm) -> None:
    cache, before = cache_of(lab, dataset), tree(lab.workdir / "cache")
    harm(path)
    answer = handstill("verify", "-c", lab.config, "--json", "--no-teacher", "--no-sources")
    assert answer.code == 1, path
    assert any(str(path) in line for line in answer.document["damaged"]), answer.document
    inside_a_shard = path.is_relative_to(cache / "shards")
    assert lab.run() == (Work(shards={dataset: 1}) if inside_a_shard else NO_WORK), path
    assert tree(lab.workdir / "cache") == before, path


@pytest.mark.parametrize("pattern", OF_EACH_KIND)
def test_run_repairs_one_file_of_each_kind_and_nothing_else(lab: Lab, pattern: str) -> None:
    cache = cache_of(lab, "val")
    broken_and_repaired(lab, "val", sorted(cache.glob(pattern))[-1], HARMS[OF_EACH_KIND[pattern]])
    assert as_json(lab.config, "verify")["ok"] is True


@pytest.mark.slow
def test_run_repairs_every_file_from_every_harm(lab: Lab) -> None:
    """Every file of a shard and of the cache around it, four harms each: about four hundred repairs."""
    places = list(every_place(lab))
    assert len(places) > 250
    for path, harm in places:
        broken_and_repaired(lab, "beta", path, HARMS[harm])
    assert as_json(lab.config, "verify")["ok"] is True


def every_place(lab: Lab) -> Iterator[tuple[Path, str]]:
    shard = lab.shards("beta")[0]
    around = [path for path in cache_of(lab, "beta").rglob("*") if path.is_file() and "shards" not in path.parts]
    for path in [*sorted(around), *sorted(path for path in shard.rglob("*") if path.is_file())]:
        yield from ((path, harm) for harm in HARMS)


def test_many_harms_at_once_cost_their_own_shards_only(lab: Lab) -> None:
    before = tree(lab.workdir / "cache")
    harmed = [lab.shards("alpha")[0], lab.shards("alpha")[3], lab.shards("val")[1]]
    for shard, name in zip(harmed, ("teacher/cam", "pictures/length", "labels/right"), strict=True):
        for path in (shard / name).iterdir():
            flip(path)
    for path in (*lab.workdir.glob("cache/*/HEAD.json"), *lab.workdir.glob("cache/*/hand_model.safetensors")):
        path.unlink()
    document = handstill("verify", "-c", lab.config, "--json").document
    assert {line.split(".zarr")[0][-64:] for line in document["damaged"] if ".zarr" in line} == {s.stem for s in harmed}
    assert document["rows_rechecked"] == document["rows_replayed"] == 0, "nothing is read through a damaged cache"
    assert lab.plan()["teach"]["todo"] == 3
    assert lab.run() == Work(shards={"alpha": 2, "val": 1})
    assert tree(lab.workdir / "cache") == before
