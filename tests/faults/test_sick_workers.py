"""Samples that kill whoever touches them, workers that hang, teachers that want too much memory: on real workers.

The default test takes 110 s on two idle cores, forty of which it waits for a worker that hangs; the slow ones one to
two minutes each.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.cache import CacheFolder, open_cache
from storage.manifest import read_manifest
from tests.faults.driver import read_events, run, sick, workdir_of
from tests.faults.experiment import SHARDS, beside, cache_of, leftovers, prepare

TEACH = ("run", "teach")
FEW_DEATHS = {"cluster.max_retries": 1}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = prepare(tmp_path_factory.mktemp("sick"))
    code, said = run(config, *TEACH)
    assert code == 0, said
    return config


def sample(config: Path, position: int) -> dict[str, Any]:
    """A row of the first tar of alpha, as the manifest has it: 24 hands, eight a shard."""
    for path in (workdir_of(config) / "manifests").rglob("*.parquet"):
        rows = read_manifest(path, ["sample_id", "image_name", "image_sha256", "source", "ordinal"]).to_pylist()
        if rows[0]["source"].endswith("alpha-000000.tar"):
            return dict(rows[position])
    raise AssertionError("no such manifest")


def trained_on(config: Path) -> CacheFolder:
    (root,) = [path for path in (workdir_of(config) / "cache").iterdir() if len(list(path.glob("ledger/*"))) > 1]
    return CacheFolder(root)


def shards_of(config: Path) -> dict[str, str]:
    """Sample id -> input hash of its shard, of all that is cached for training."""
    reader = open_cache(trained_on(config).root)
    return {name: reader.shard_path(position).stem for position, name in enumerate(reader.ids)}


def counted(config: Path) -> dict[str, int]:
    """What the last run of the teach stage counted."""
    done = [event for event in read_events(config) if event["event"] == "stage_done" and event["stage"] == "teach"][-1]
    return {name: done[name] for name in ("done", "samples_in", "samples_done", "quarantined")}


def finished(config: Path) -> Counter[str]:
    return Counter(event["unit"] for event in read_events(config) if event["event"] == "shard_committed")


def test_poison_is_quarantined_and_hung_workers_are_replaced(calm: Path, tmp_path: Path) -> None:
    """In one run: a sample that kills whoever decodes it, one whose storing hangs once."""
    poison, hung = sample(calm, 3), sample(calm, 20)
    config = beside(calm, "sick", FEW_DEATHS | {"cluster.shard_timeout_s": 40.0})
    illness = sick(
        {"at": "decode", "sample": poison["image_sha256"], "how": "die"},
        {"at": "store", "sample": hung["sample_id"], "how": "hang", "once": str(tmp_path / "hung")},
    )
    code, said = run(config, *TEACH, environment=illness)
    assert code == 0, said
    assert "Searching for the samples that do it" in said
    reason = f"kills-its-worker: {poison['image_name']}, its decoding dies"
    assert_only_its_shard_differs(calm, config, {poison["sample_id"]: reason})
    assert counted(config) == {"done": SHARDS, "samples_in": 52, "samples_done": 51, "quarantined": 1}

    events = read_events(config)
    (one,) = [event for event in events if event["event"] == "teacher_hung"]
    assert one["unit"] == shards_of(calm)[hung["sample_id"]]
    (inquiry,) = [event for event in events if event["event"] == "inquiry_done"]
    assert (inquiry["unit"], inquiry["found"]) == (shards_of(calm)[poison["sample_id"]], {poison["sample_id"]: reason})
    assert finished(config) == dict.fromkeys(finished(calm), 1)

    code, said = run(config, *TEACH)
    assert code == 0, said
    again = [event["event"] for event in read_events(config)[len(events) :] if "_started" in event["event"]]
    assert again == ["run_started"], "nothing is to be done: what was quarantined is settled"


def assert_only_its_shard_differs(calm: Path, config: Path, reasons: dict[str, str]) -> None:
    """The other shards have the same bytes; in its own the other samples have the same values."""
    touched = {shards_of(calm)[name] for name in reasons}
    wanted, found = cache_of(calm), cache_of(config)
    same = [name for name in wanted if not any(unit in name for unit in touched) and "snapshots" not in name]
    assert {name: found.get(name) for name in same if "HEAD" not in name} == {
        name: wanted[name] for name in same if "HEAD" not in name
    }
    assert leftovers(config) == []
    records, before = trained_on(config).finished(), trained_on(calm).finished()
    assert records.keys() == before.keys(), "input hashes are of what goes in"
    left_out = {one.sample_id: one.reason for record in records.values() for one in record.quarantined}
    assert left_out == reasons
    healthy, reader = open_cache(trained_on(calm).root), open_cache(trained_on(config).root)
    assert reader.ids == [name for name in healthy.ids if name not in reasons]
    for name in reader.ids:
        mine, theirs = reader[name], healthy[name]
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert np.array_equal(mine[key], theirs[key]), (name, key)


@pytest.mark.slow
def test_a_sample_that_kills_its_teacher(calm: Path) -> None:
    """Two in one shard and one in another: every trial costs a teacher."""
    poison = [sample(calm, position) for position in (8, 13, 23)]
    config = beside(calm, "deadly", {"cluster.max_retries": 0})
    illness = sick(*({"at": "store", "sample": one["sample_id"], "how": "die"} for one in poison))
    code, said = run(config, *TEACH, environment=illness)
    assert code == 0, said
    reasons = {one["sample_id"]: f"kills-its-worker: {one['image_name']}, the teacher dies" for one in poison}
    assert_only_its_shard_differs(calm, config, reasons)
    assert counted(config) == {"done": SHARDS, "samples_in": 52, "samples_done": 49, "quarantined": 3}
    assert finished(config) == dict.fromkeys(finished(calm), 1)


@pytest.mark.slow
def test_a_decoder_that_hangs_is_ended_with_its_teacher(calm: Path, tmp_path: Path) -> None:
    config = beside(calm, "stuck", {"cluster.shard_timeout_s": 40.0})
    stuck = sample(calm, 10)
    illness = {"at": "decode", "sample": stuck["image_sha256"], "how": "hang", "once": str(tmp_path / "stuck")}
    code, said = run(config, *TEACH, environment=sick(illness))
    assert code == 0, said
    assert cache_of(config) == cache_of(calm)
    hung = [event["unit"] for event in read_events(config) if event["event"] == "teacher_hung"]
    assert hung == [shards_of(calm)[stuck["sample_id"]]]
    assert finished(config) == dict.fromkeys(finished(calm), 1)


@pytest.mark.slow
def test_a_slow_first_shard_is_no_alarm(calm: Path) -> None:
    """Eight seconds for the first shards, which is fifteen times what the same shards took in the calm run."""
    config = beside(calm, "slow")
    first = [{"at": "decode", "sample": sample(calm, position)["image_sha256"], "how": "slow"} for position in range(8)]
    code, said = run(config, *TEACH, environment=sick(*first))
    assert code == 0, said
    assert cache_of(config) == cache_of(calm)
    assert {event["event"] for event in read_events(config)} & {"teacher_hung", "teacher_died"} == set()


@pytest.mark.slow
def test_a_teacher_out_of_memory_says_which_batch_size_fits(calm: Path) -> None:
    """The allocator's own refusal: a teacher may take 700 MB more than it has, and 1024 views want more."""
    config = beside(calm, "greedy", {"teacher.batch_size": 1024})
    code, said = run(config, *TEACH, environment=sick({"at": "memory", "bytes": 700_000_000}))
    assert code == 1
    last = said.splitlines()[-1]
    assert "the teacher ran out of memory at batch size 1024: set teacher.batch_size: " in last
    assert "which fits (tried just now)" in last
    assert "Traceback" not in said
    assert finished(config) == {}
    size = int(last.split("set teacher.batch_size: ")[1].split(",")[0])
    assert size in (128, 256, 512)
    smaller = beside(calm, "modest", {"teacher.batch_size": size})
    code, said = run(smaller, *TEACH, environment=sick({"at": "memory", "bytes": 700_000_000}))
    assert code == 0, said
    assert len(finished(smaller)) == SHARDS
