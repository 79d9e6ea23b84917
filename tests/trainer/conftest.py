from __future__ import annotations

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _a_process_that_never_saw_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other packages' tests load teachers into this process; training has a process of its own."""
    monkeypatch.delitem(sys.modules, "models.teacher", raising=False)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
