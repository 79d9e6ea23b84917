"""How long a teacher may take for a shard before it counts as hung."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FACTOR = 10.0
"""Times the slowest so far: noisy neighbours and cold disks make a shard three times as slow, a hang has no limit."""
LEAST_S = 300.0
"""No false alarm about shards of seconds on a machine that is busy for a while."""
LEAST_FIRST_S = 1800.0
"""A teacher's first shard: it loads 2.7 GB, perhaps compiles, perhaps over a slow network."""
UNKNOWN_VIEW_S = 30.0
"""Before anything was seen: 26 times what ViT-H takes for a view on one CPU core (FACTS 8: 1.15 s)."""
UNKNOWN_S = 3600.0


@dataclass
class Patience:
    """Learns from the shards of a run. first: whether it is the first of its teacher, which has to load the network."""

    timeout_s: float | Literal["auto"] = "auto"
    _slowest_view_s: dict[bool, float] = field(default_factory=dict)
    """By `first`."""

    def saw(self, views: int, seconds: float, *, first: bool) -> None:
        """A shard took so long."""
        self._slowest_view_s[first] = max(self._slowest_view_s.get(first, 0.0), seconds / max(views, 1))

    def expects(self, views: int) -> float | None:
        """Seconds that a shard has taken at most so far; None: none was seen."""
        slowest_s = self._slowest_view_s.get(False, self._slowest_view_s.get(True))
        return None if slowest_s is None else slowest_s * views

    def allows(self, views: int, *, first: bool) -> float:
        """Seconds after which a shard's teacher hangs."""
        if self.timeout_s != "auto":
            return self.timeout_s
        seen = self._slowest_view_s
        slowest_s = max(seen.values(), default=None) if first or False not in seen else seen[False]
        if slowest_s is None or (first and True not in seen):
            return max(UNKNOWN_S, UNKNOWN_VIEW_S * views)
        return max(LEAST_FIRST_S if first else LEAST_S, FACTOR * slowest_s * views)
