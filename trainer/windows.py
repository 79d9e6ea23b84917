"""Fetching the shards of coming windows while steps run, so that steps do not wait for an object store."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

from trainer.order import Ints, WindowEpochs

log = logging.getLogger("handstill")

SHARDS_AT_ONCE = 4
"""Shards that are fetched side by side: while one is being checked the others' bytes come in."""


class Fetches(Protocol):
    """A reader that can be told which shard will be needed."""

    def prefetch(self, shard: int) -> None: ...


class WindowFetcher:
    """Has the window that each source is in, and the next one, fetched; never more. Close it to stop."""

    def __init__(self, windows: Sequence[WindowEpochs], readers: Sequence[Fetches]) -> None:
        self._windows, self._readers = windows, readers
        self._asked = [(-1, -1)] * len(windows)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(SHARDS_AT_ONCE, thread_name_prefix="window")

    def __enter__(self) -> WindowFetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def reached(self, numbers: Sequence[Ints]) -> None:
        """Some step is about to read these draws (one array a source, ascending). Returns at once."""
        with self._lock:
            for i, (windows, drawn) in enumerate(zip(self._windows, numbers, strict=True)):
                if len(drawn):
                    first, last = windows.window_of(int(drawn[0])), windows.window_of(int(drawn[-1]))
                    for wanted in (first, last, windows.after(*last)):
                        self._ask(i, wanted)

    def _ask(self, i: int, wanted: tuple[int, int]) -> None:
        if wanted <= self._asked[i]:
            return
        self._asked[i] = wanted
        for shard in self._windows[i].shards(*wanted):
            self._pool.submit(self._readers[i].prefetch, shard).add_done_callback(_note_failure)


def _note_failure(fetched: Future[None]) -> None:
    """Whoever reads that shard tries again and raises; here it is only said."""
    if not fetched.cancelled() and (error := fetched.exception()) is not None:
        log.warning("a shard could not be fetched ahead: %s", error)
