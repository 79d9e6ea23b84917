"""The search for samples that kill their worker, against workers that are only said to die."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.inquiry import TIMES_ALONE, Inquiry
from stages.preparation import ShardJob, TeachSettings
from storage.config import CacheConfig

WHY = "teachers died 4 times"


def job_of(count: int) -> ShardJob:
    rows = pa.table(
        {
            "sample_id": [f"alpha:{row:03d}#0" for row in range(count)],
            "image_name": [f"{row}.jpg" for row in range(count)],
        }
    )
    return ShardJob(
        "alpha", "ab" * 32, rows, TeachSettings.of("train", CacheConfig(), 4, 0), Path("c"), Path("b"), Path("e")
    )


def search(count: int, kills: Callable[[list[int]], bool]) -> tuple[Inquiry, list[list[int]]]:
    """The finished inquiry and what it tried. kills: whether a worker dies of these rows."""
    inquiry, tried = Inquiry(job_of(count), WHY), []
    while inquiry.trial is not None:
        assert inquiry.trial.events is None
        assert inquiry.trial.input_hash != inquiry.job.input_hash
        rows = [int(name[6:9]) for name in inquiry.trial.sample_ids]
        tried.append(rows)
        if kills(rows):
            inquiry.died("the teacher dies")
        else:
            inquiry.survived()
    return inquiry, tried


@pytest.mark.parametrize("poison", [[0], [511], [200], [3, 4], [0, 100, 300, 511], [*range(16)]])
def test_every_poisonous_sample_is_found_and_no_other(poison: list[int]) -> None:
    inquiry, tried = search(512, lambda rows: bool(set(rows) & set(poison)))
    assert inquiry.found == {f"alpha:{row:03d}#0": f"kills-its-worker: {row}.jpg, the teacher dies" for row in poison}
    outcome = inquiry.outcome()
    assert outcome is not None
    assert outcome.left_out == inquiry.found
    assert outcome.input_hash == inquiry.job.input_hash, "what is left out does not make it another shard"
    assert len(tried) <= len(poison) * (2 * 9 + TIMES_ALONE)
    alone = [rows[0] for rows in tried if len(rows) == 1 and rows[0] in poison]
    assert sorted(alone) == sorted(poison * TIMES_ALONE)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_small_shards(count: int) -> None:
    for poison in range(count):
        assert len(search(count, lambda rows, poison=poison: poison in rows)[0].found) == 1  # type: ignore[misc]


def test_what_dies_only_together_convicts_nobody() -> None:
    inquiry, _ = search(16, lambda rows: {3, 12} <= set(rows))
    assert inquiry.outcome() is None


@pytest.mark.parametrize("seed", range(20))
def test_workers_that_something_else_kills_convict_nobody(seed: int) -> None:
    """One in ten dies of itself: thrice in a row, of the same single sample, hardly one in a thousand."""
    draw = random.Random(seed)
    inquiry, _ = search(64, lambda rows: draw.random() < 0.1)
    assert inquiry.found == {}


def test_where_everything_dies_no_sample_is_to_blame() -> None:
    """Too little memory for the batch size kills every trial; a whole data set must not be quarantined for that."""
    inquiry, tried = search(512, lambda rows: True)
    assert inquiry.outcome() is None
    assert len(tried) <= 9 + 2 * TIMES_ALONE + 1


def test_what_was_left_out_before_stays_out() -> None:
    first, _ = search(8, lambda rows: 2 in rows)
    known = first.outcome()
    assert known is not None
    again = Inquiry(known, WHY)
    while again.trial is not None:
        assert again.trial.left_out == known.left_out
        if "alpha:005#0" in again.trial.sample_ids:
            again.died("the teacher hangs")
        else:
            again.survived()
    both = again.outcome()
    assert both is not None
    assert sorted(both.left_out) == ["alpha:002#0", "alpha:005#0"]
