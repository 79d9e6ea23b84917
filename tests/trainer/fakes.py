"""A cache in memory: what `storage.reading.CacheReader` gives, with made-up numbers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from storage.reading import Indices


class FakeReader:
    def __init__(self, dataset: str, samples: int, views: int = 3, shard_size: int = 8) -> None:
        self.ids = [f"{dataset}:{i:04d}#0" for i in range(samples)]
        self.n_views = views
        self.shards = np.arange(samples, dtype=np.int32) // shard_size
        self.prefetched: list[int] = []

    def prefetch(self, shard: int) -> None:
        self.prefetched.append(shard)

    def read(
        self, rows: Indices, views: Indices, keys: Collection[str] | None = None, *, decoded: bool = True
    ) -> dict[str, Any]:
        pictures = np.zeros((len(rows), 4, 4, 3), np.uint8) + 100
        return {
            "sample_id": np.array([self.ids[r] for r in rows]),
            "row": np.asarray(rows),
            "view": np.asarray(views),
            "pictures": pictures,
        }
