"""The state of the caches is read once a process, and again when it may have changed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pipeline.caches import cache_state, forget_caches
from pipeline.experiment import open_experiment
from pipeline.run import plan_all
from storage import cache, verification
from storage.ledger import ShardRecord, read_record
from tests.pipeline.lab import Lab


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each record was read and each shard's files were looked at."""
    counts: Counter[str] = Counter()
    quick_check = verification.quick_check

    def counted_read(path: Path) -> ShardRecord:
        counts[path.stem] += 1
        return read_record(path)

    def counted_check(folder: cache.CacheFolder, record: ShardRecord) -> list[verification.Damage]:
        counts[record.input_hash] += 1
        return quick_check(folder, record)

    monkeypatch.setattr(cache, "read_record", counted_read)
    monkeypatch.setattr(verification, "quick_check", counted_check)
    return counts


def test_a_plan_reads_every_record_once_and_looks_at_every_shard_once(lab: Lab, looked_at: Counter[str]) -> None:
    plan_all(open_experiment(lab.config))
    assert looked_at == {path.stem: 2 for path in lab.shards()}


def test_a_run_with_nothing_to_do_looks_no_more_often(lab: Lab, looked_at: Counter[str]) -> None:
    lab.run()
    assert looked_at == {path.stem: 2 for path in lab.shards()}


def test_a_state_is_kept_until_it_is_forgotten(lab: Lab) -> None:
    experiment = open_experiment(lab.config)
    state = cache_state(experiment, "train")
    assert cache_state(experiment, "train") is state
    state.folder.withdraw(next(iter(state.records)))
    assert len(cache_state(experiment, "train").records) == 6
    forget_caches(experiment)
    assert len(cache_state(experiment, "train").records) == 5
