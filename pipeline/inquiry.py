"""Which samples of a shard kill their worker every time: found by bisection over the shard's rows (decision 021)."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import dataclass, field, replace

from stages.preparation import ShardJob

TIMES_ALONE = 3
"""How often a sample has to kill a worker that touches nothing else, before it is held to be the cause: a worker that
something else kills now and then does not convict a sample."""
CONTROL_AFTER = 2
"""Samples found before any trial has survived: then one from the other end is tried. If whatever is tried dies, of too
little memory or a broken driver, no sample is to be blamed."""


class _EverythingDiesError(Exception):
    """Ends a search."""


@dataclass
class Inquiry:
    """The search in one shard. Ask for a `trial`, run it, tell what became of it, until there is none."""

    job: ShardJob
    why: str
    """What the shard did that it is searched for."""
    found: dict[str, str] = field(default_factory=dict)
    """The poisonous samples with the reason for their quarantine."""
    survivals: int = 0
    """Trials whose worker lived."""
    trial: ShardJob | None = field(init=False, default=None)
    """The rows to be tried next, as a job; None: the search is over."""
    _search: Generator[tuple[int, int], str | None, bool] = field(init=False)

    def __post_init__(self) -> None:
        self._search = self._within(0, self.job.rows.num_rows, dies=self.job.rows.num_rows > 1)
        self._go_on(None)

    def survived(self) -> None:
        """The trial's worker lived."""
        self.survivals += 1
        self._go_on(None)

    def died(self, how: str) -> None:
        """The trial's worker died or hung; how: for people."""
        self._go_on(how)

    def outcome(self) -> ShardJob | None:
        """The shard's job without the samples that were found; None: no sample kills by itself."""
        assert self.trial is None
        return replace(self.job, left_out={**self.job.left_out, **self.found}) if self.found else None

    def _go_on(self, how: str | None) -> None:
        try:
            rows = next(self._search) if self.trial is None else self._search.send(how)
        except StopIteration:
            self.trial = None
        except _EverythingDiesError:
            self.found.clear()
            self.trial = None
        else:
            self.trial = self._part(*rows)

    def _within(self, first: int, last: int, *, dies: bool) -> Generator[tuple[int, int], str | None, bool]:
        """Yields rows to be tried, is sent how their worker died, if it did; returns whether a sample was found.

        dies: it is known that these rows kill, so they need not be tried as a whole.
        """
        if last - first == 1:
            return (yield from self._alone(first))
        if not dies and (yield first, last) is None:
            return False
        middle = (first + last) // 2
        left = yield from self._within(first, middle, dies=False)
        right = yield from self._within(middle, last, dies=not left)
        return left or right

    def _alone(self, row: int) -> Generator[tuple[int, int], str | None, bool]:
        how = None
        for _ in range(TIMES_ALONE):
            how = yield row, row + 1
            if how is None:
                return False
        sample = self.job.rows.slice(row, 1).select(["sample_id", "image_name"]).to_pylist()[0]
        self.found[sample["sample_id"]] = f"kills-its-worker: {sample['image_name']}, {how}"
        if len(self.found) >= CONTROL_AFTER and not self.survivals:
            last = self.job.rows.num_rows - 1
            if (yield last, last + 1) is not None:
                raise _EverythingDiesError
        return True

    def _part(self, first: int, last: int) -> ShardJob:
        """Some rows as a job of their own, which leaves no trace in the event log."""
        rows = self.job.rows.slice(first, last - first)
        name = hashlib.sha256("\n".join(rows["sample_id"].to_pylist()).encode()).hexdigest()
        return replace(self.job, rows=rows, input_hash=name, events=None)
