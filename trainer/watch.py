"""What watches a training run from inside: for losses that are no numbers, for its speed, and for SIGTERM."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch import Tensor

from storage.errors import WorkError
from trainer.data import PICTURES, Batch
from trainer.distributed import Group
from trainer.learner import Tensors


class Watch:
    """Stops a run whose loss is no number, and measures it between two reports.

    A step's loss is looked at when the next step was already sent to the GPU, so that looking costs no waiting; always
    before a report, and so before anything is saved.
    """

    def __init__(self, group: Group | None = None) -> None:
        """group: the workers that share each batch; what `note` is given of it is the whole batch's for each alike."""
        self._group = group or Group()
        self._pending: tuple[int, Batch, Tensor, Tensors, Tensor] | None = None
        self._start = time.perf_counter()
        self._waited_s = 0.0
        self._pictures = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for the loader."""
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    def note(self, step: int, batch: Batch, loss: Tensor, parts: Tensors, grad_norm: Tensor) -> None:
        """The outcome of a step (from 0); raises WorkError if the step before had no finite loss or gradient."""
        self._check()
        self._pending = (step, batch, loss, parts, grad_norm)
        self._pictures += len(batch[PICTURES]) * self._group.size

    def report(self, lr: float) -> dict[str, float]:
        """Losses of the last step, and rates since the last report."""
        self._check()
        assert self._pending is not None
        _, _, loss, parts, grad_norm = self._pending
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rates = {"pictures_per_s": self._pictures / seconds, "loader_wait_share": self._waited_s / seconds}
        self._start, self._waited_s, self._pictures = time.perf_counter(), 0.0, 0
        values = {"loss": float(loss), "grad_norm": float(grad_norm), "lr": lr}
        return values | {key: float(value) for key, value in parts.items()} | rates

    def _check(self) -> None:
        if self._pending is None:
            return
        step, batch, loss, parts, grad_norm = self._pending
        if math.isfinite(float(loss)) and math.isfinite(float(grad_norm)):
            return
        found = {"loss": float(loss), "grad_norm": float(grad_norm)} | {k: float(v) for k, v in parts.items()}
        wrong = [key for key, value in found.items() if not math.isfinite(value)]
        samples = b", ".join(self._group.gathered(", ".join(batch["sample_id"].tolist()).encode())).decode()
        raise WorkError(
            f"step {step + 1}: {', '.join(wrong)} not finite. The samples of the step: {samples}. "
            "Nothing of it was saved; lower train.lr, or look at them."
        )


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; outside the main thread, where signals cannot be caught, nothing does."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_sigterm(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
