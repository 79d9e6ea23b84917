"""Something that is done again and again beside the work: notes, pushes, signs of life."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(work: Callable[[], object], every_s: float, name: str) -> Iterator[None]:
    """Call `work` every `every_s` seconds in a thread of that name, first after so long; leaving waits for it.

    What `work` raises ends the calls.
    """
    ended = threading.Event()

    def keep_on() -> None:
        while not ended.wait(every_s):
            work()

    thread = threading.Thread(target=keep_on, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
