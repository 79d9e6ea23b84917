"""An exponential moving average of the weights, which is validated and kept in place of the last ones."""

from __future__ import annotations

from typing import Any

from timm.utils.model_ema import ModelEmaV3

from trainer.learner import StudentUnderTraining


class WeightAverage:
    """Follows a student under training; with no decay it is that student itself."""

    def __init__(self, module: StudentUnderTraining, decay: float | None) -> None:
        """decay: of the weights so far, a step; the warm-up of timm's `ModelEmaV3` lets the first steps' go sooner."""
        self._trained = module
        self._average = None if decay is None else ModelEmaV3(module, decay, use_warmup=True)

    @property
    def module(self) -> StudentUnderTraining:
        """The student to validate and to keep."""
        if self._average is None:
            return self._trained
        averaged: StudentUnderTraining = self._average.module
        return averaged

    def update(self, step: int) -> None:
        """Take the weights after step `step` (from 0) into the average."""
        if self._average is not None:
            self._average.update(self._trained, step + 1)

    def state_dict(self) -> dict[str, Any] | None:
        """The average, for a checkpoint; None: there is none."""
        return None if self._average is None else self._average.module.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from what `state_dict` gave."""
        if self._average is not None and state is not None:
            self._average.module.load_state_dict(state)
