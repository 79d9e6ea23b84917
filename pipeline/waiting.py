"""How the threads that share a product wait for each other."""

from __future__ import annotations

import os


def wait_asleep() -> None:
    """Let this process and those it starts wait without spinning, unless the environment says how; before torch.

    OpenMP's threads by default keep the core while they wait, from another that could go on. Where anything else runs
    on the machine that made a training three times as slow; where nothing does it makes no difference (docs/log.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
