"""How far a run is, as metrics of Ray: Prometheus scrapes them from the node on which the run's own process is.

handstill_done{pipeline, stage}              units of work that are done (views, steps, files, networks)
handstill_total{pipeline, stage}             units that there are to do
handstill_rate{pipeline, stage}              units a second
handstill_utilisation{pipeline, stage, of}   share of the cluster's cores that compute, of its GPUs that are held
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

from pipeline.events import told

_MEANINGS = {
    "handstill_done": "Units of work that are done in a stage",
    "handstill_total": "Units of work that a stage has to do",
    "handstill_rate": "Units of work a second",
    "handstill_utilisation": "Share of the cluster's cores that compute, or of its GPUs that are held",
}


def show_progress(stage: str, done: float, total: float, rate: float | None, utilisation: dict[str, float]) -> None:
    """Set the gauges, where this process is connected to Ray."""
    if not _connected():
        return
    tags = {"stage": stage, "pipeline": str(told().get("pipeline", ""))}
    _gauge("handstill_done").set(done, tags)
    _gauge("handstill_total").set(total, tags)
    if rate is not None:
        _gauge("handstill_rate").set(rate, tags)
    for of, share in utilisation.items():
        _gauge("handstill_utilisation", "of").set(share, tags | {"of": of})


def capacity() -> dict[str, float]:
    """The connected cluster's cores and GPUs, by Ray's names; nothing where there is none."""
    if not _connected():
        return {}
    import ray

    return {name: float(count) for name, count in ray.cluster_resources().items() if name in ("CPU", "GPU")}  # type: ignore[no-untyped-call]  # ray ships no types here


def _connected() -> bool:
    ray = sys.modules.get("ray")  # whoever is connected has imported it
    return ray is not None and bool(ray.is_initialized())


@lru_cache
def _gauge(name: str, *more: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, _MEANINGS[name], ("pipeline", "stage", *more))
