from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from storage.errors import InputError
from tests.trainer.fakes import FakeReader
from trainer.data import Source, TrainMix, in_order
from trainer.order import BLOCK, held_out, quotas


def mix(seed: int = 0, batch_size: int = 7, fraction: float = 0.2, jitter: float = 0.0) -> TrainMix:
    return TrainMix(
        [Source("a", FakeReader("a", 50), 0.75), Source("b", FakeReader("b", 11, views=2), 0.25)],
        batch_size=batch_size,
        seed=seed,
        keys=(),
        validation_fraction=fraction,
        colour_jitter=jitter,
    )


def seen(m: TrainMix, steps: range) -> list[tuple[list[str], list[int]]]:
    return [(batch["sample_id"].tolist(), batch["view"].tolist()) for batch in map(m.batch, steps)]


def test_a_step_depends_on_seed_and_step_alone() -> None:
    m = mix()
    whole = seen(m, range(40))
    assert seen(mix(), range(25, 40)) == whole[25:]
    assert seen(mix(seed=1), range(40)) != whole
    for workers in (0, 1, 3):
        assert [(b["sample_id"].tolist(), b["view"].tolist()) for b in m.batches(5, 40, workers)] == whole[5:]


def test_an_epoch_shows_every_training_sample_once_and_epochs_its_views_in_turn() -> None:
    m = mix(batch_size=10)
    draws = [(i, v) for ids, views in seen(m, range(2 * BLOCK // 10)) for i, v in zip(ids, views, strict=True)]
    of_a = [draw for draw in draws if draw[0].startswith("a:")]
    size = len(m.training[0])
    for epoch in range(3):
        assert len({i for i, _ in of_a[epoch * size : (epoch + 1) * size]}) == size
    assert set(Counter(of_a[: 3 * size]).values()) == {1}  # three views, each once in three epochs


def test_weights_are_exact_over_a_block() -> None:
    counts = Counter(i[0] for ids, _ in seen(mix(batch_size=8), range(BLOCK // 8)) for i in ids)
    assert counts == {"a": 750, "b": 250}
    assert quotas([1, 1, 1]) == [334, 333, 333]
    assert sum(quotas([1e-9, 1, 3.3])) == BLOCK
    assert quotas([1e-9, 1, 3.3])[0] == 1


def test_validation_is_held_out_by_id_and_never_trained_on() -> None:
    m = mix()
    validation = {i for batch in m.validation_batches() for i in batch["sample_id"]}
    assert len(validation) == m.validation_size > 0
    assert all((batch["view"] == 0).all() for batch in m.validation_batches())
    assert validation.isdisjoint(i for ids, _ in seen(m, range(300)) for i in ids)


def test_a_new_sample_moves_no_old_one_into_validation() -> None:
    ids = [f"x:{i}#0" for i in range(500)]
    (before,), (after,) = held_out([ids], 0.1, 10_000), held_out([[*ids, "x:new#0"]], 0.1, 10_000)
    assert set(before) == set(after) - {500}
    assert 25 < len(before) < 90
    assert len(held_out([ids], 0.1, 8)[0]) == 8
    assert len(held_out([["x:0#0", "x:1#0"]], 1e-9, 8)[0]) == 1
    assert held_out([["x:0#0"]], 0.4, 8)[0].size == 0


def test_a_set_without_samples_is_the_users_mistake() -> None:
    with pytest.raises(InputError, match="data set empty"):
        TrainMix([Source("empty", FakeReader("empty", 0), 1)], batch_size=2, seed=0, keys=())


def test_jitter_is_the_same_in_every_run() -> None:
    once, again = mix(jitter=0.2).batch(3)["pictures"], mix(jitter=0.2).batch(3)["pictures"]
    assert np.array_equal(once, again)
    assert once.std() > 0


def test_an_error_is_raised_where_its_batch_was_due() -> None:
    made = in_order(lambda i: 1 // (3 - i), range(6), workers=2)
    assert [next(made) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(made)
