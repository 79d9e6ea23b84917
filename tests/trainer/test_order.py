from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest

from tests.trainer.fakes import FakeReader
from trainer.config import StudentRecipe
from trainer.data import Source, TrainMix
from trainer.order import BLOCK, VALIDATION_SHARDS, WindowEpochs, held_out
from trainer.windows import WindowFetcher

SHARDS = np.repeat(np.arange(11, dtype=np.int32), [5, 7, 3, 8, 8, 1, 6, 4, 8, 2, 5])


def epochs(seed: int = 0, window_shards: int = 4) -> WindowEpochs:
    return WindowEpochs(seed, "a", SHARDS, window_shards)


def windowed(batch_size: int = 7, seed: int = 0) -> TrainMix:
    return TrainMix(
        [Source("a", FakeReader("a", 90), 0.75), Source("b", FakeReader("b", 11, views=2), 0.25)],
        batch_size=batch_size,
        seed=seed,
        keys=(),
        validation_fraction=0.1,
        shuffle="window",
        window_shards=3,
    )


def test_an_epoch_shows_every_row_once_window_by_window() -> None:
    places = np.arange(len(SHARDS))
    for epoch in range(3):
        order = epochs().picks(epoch, places)
        assert sorted(order) == places.tolist()
        of_windows = [epochs().window_of(epoch * len(SHARDS) + place) for place in places.tolist()]
        assert of_windows == sorted(of_windows)
        seen: list[int] = []
        for window in range(epochs().n_windows):
            now = np.array([at == (epoch, window) for at in of_windows])
            shards = epochs().shards(epoch, window)
            assert set(SHARDS[order[now]]) == set(shards)
            assert len(shards) in (3, 4)
            assert list(SHARDS[order[now]]) != sorted(SHARDS[order[now]])  # mixed
            seen += shards
        assert sorted(seen) == list(range(11))
    assert not np.array_equal(epochs().picks(0, places), epochs().picks(1, places))
    assert not np.array_equal(epochs().picks(0, places), epochs(seed=1).picks(0, places))
    assert np.array_equal(epochs().picks(1, places[20:30]), epochs().picks(1, places)[20:30])


def test_a_step_depends_on_seed_and_step_alone() -> None:
    def seen(mix: TrainMix, steps: range) -> list[tuple[list[str], list[int]]]:
        return [(batch["sample_id"].tolist(), batch["view"].tolist()) for batch in map(mix.batch, steps)]

    whole = seen(windowed(), range(40))
    assert seen(windowed(), range(25, 40)) == whole[25:]
    assert seen(windowed(seed=1), range(40)) != whole
    for workers in (0, 3):
        assert [(b["sample_id"].tolist(), b["view"].tolist()) for b in windowed().batches(5, 40, workers)] == whole[5:]


def test_views_take_turns() -> None:
    mix = windowed(batch_size=10)
    draws = [
        (i, v)
        for step in range(2 * BLOCK // 10)
        for i, v in zip(*(mix.batch(step)[key].tolist() for key in ("sample_id", "view")), strict=True)
    ]
    of_a = [draw for draw in draws if draw[0].startswith("a:")]
    assert set(Counter(of_a[: 3 * len(mix.training[0])]).values()) == {1}  # three views, each once in three epochs


def test_this_window_and_the_next_are_fetched_and_no_more() -> None:
    reader = FakeReader("a", 400, shard_size=8)
    windows = WindowEpochs(0, "a", reader.shards, 5)
    with WindowFetcher([windows], [reader]) as fetcher:
        fetcher.reached([np.array([0, 1])])
        fetcher.reached([np.array([2, 3])])
        fetcher._pool.shutdown(wait=True)
    assert sorted(reader.prefetched) == sorted(windows.shards(0, 0) + windows.shards(0, 1))
    with WindowFetcher([windows], [reader]) as fetcher:
        reader.prefetched.clear()
        fetcher.reached([np.arange(38, 42)])  # a step on the border
        fetcher._pool.shutdown(wait=True)
        assert windows.window_of(38) != windows.window_of(41) == (0, 1)
    assert sorted(reader.prefetched) == sorted(shard for window in range(3) for shard in windows.shards(0, window))
    assert windows.after(0, windows.n_windows - 1) == (1, 0)


def test_a_prefetch_that_fails_is_said_and_the_step_decides(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(FakeReader):
        def prefetch(self, shard: int) -> None:
            raise OSError("no store")

    with WindowFetcher([WindowEpochs(0, "a", SHARDS, 4)], [Failing("a", len(SHARDS))]) as fetcher:
        fetcher.reached([np.array([0])])
        fetcher._pool.shutdown(wait=True)
    assert "could not be fetched ahead: no store" in caplog.text


def test_steps_do_not_wait_for_the_next_window() -> None:
    gate = threading.Event()

    class Slow(FakeReader):
        def prefetch(self, shard: int) -> None:
            assert gate.wait(10)

    mix = TrainMix([Source("a", Slow("a", 90), 1)], batch_size=4, seed=0, keys=(), shuffle="window", window_shards=3)
    batches = mix.batches(0, 10, 1)
    assert len(next(batches)["sample_id"]) == 4
    gate.set()
    assert len(list(batches)) == 9


def test_samples_to_validate_on_come_from_few_shards() -> None:
    ids = [f"a:{i}#0" for i in range(40 * 50)]
    shards = np.repeat(np.arange(50, dtype=np.int32), 40)
    (rows,) = held_out([ids], 0.1, 10**6, [shards])
    assert len(set(shards[rows])) == VALIDATION_SHARDS
    assert 150 < len(rows) < 250
    (wide,) = held_out([ids], 0.1, 10**6)
    assert len(rows) == len(wide)
    few = held_out([ids[:40], ids[40:80]], 0.1, 10**6, [shards[:40], shards[:40]])
    everywhere = held_out([ids[:40], ids[40:80]], 0.1, 10**6)
    assert [list(one) for one in few] == [list(one) for one in everywhere]  # a small cache: nothing changes


def test_the_kind_of_shuffle_is_part_of_a_students_identity() -> None:
    recipe = StudentRecipe.model_validate({"on": ["a"], "backbone": "b"})
    assert recipe.shuffle_of(remote=False) == "global"
    assert recipe.shuffle_of(remote=True) == "window"
    named = recipe.model_copy(update={"shuffle": "global"})
    assert named.shuffle_of(remote=True) == "global"
    assert named.identity() == recipe.identity() != recipe.identity(remote=True)
    wider = recipe.model_copy(update={"window_shards": 99, "disk_cache_gb": 1.0})
    assert wider.identity() == recipe.identity()
    assert wider.identity(remote=True) != recipe.identity(remote=True)
