"""docs/format.md is true: its table is the code's, and its examples run against a real cache, warnings being errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import layout
from storage.config import FeatureEncoding, is_fitted
from tests.tiny_cache import write_tiny_cache

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def test_the_table_lists_every_array_as_it_is_written() -> None:
    for entry in layout.ENTRIES:
        kinds, dimensions = " or ".join(entry.dtypes), ", ".join(entry.dimensions)
        about = entry.about + (" (optional)" if entry.optional else "")
        assert f"| `{entry.path}` | {kinds} | {dimensions} | {entry.unit} | {about} |" in PAGE
    assert f"# The cache format, version {layout.FORMAT_VERSION}" in PAGE


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the examples are kept short
@pytest.mark.parametrize("encoding", ["float16", "int8", "pca12-int8", "codes4"])
def test_the_examples_run(tmp_path: Path, encoding: FeatureEncoding) -> None:
    write_tiny_cache(tmp_path, n=4, quarantined=1, samples_per_shard=2, encoding=encoding)  # an earlier snapshot
    cache = write_tiny_cache(tmp_path, n=5, quarantined=1, samples_per_shard=2, encoding=encoding)
    names: dict[str, Any] = {"cache": str(cache)}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
        exec(block, names)
    np.testing.assert_array_equal(names["one"]["pictures"][1], names["picture"])
    np.testing.assert_allclose(names["one"]["teacher/features"][1], names["features"], rtol=1e-5, atol=1e-5)
    assert names["photo_px"].shape == (21, 2)
    rows, views = [row for row in range(5) for _ in range(3)], list(range(3)) * 5
    everything = names["reader"].read(rows, views, ["teacher/features"], decoded=is_fitted(encoding) is False)
    np.testing.assert_allclose(names["deviation"], everything["teacher/features"].std((0, 1, 2)), rtol=1e-4)
    np.testing.assert_array_equal(names["one_camera"], names["one"]["teacher/cam"][1])
    assert names["teacher"]["features"].chunks[0] == (1, 2, 2), "the second of the samples was left out"
    assert names["counts"].to_pylist() == [
        {"dataset": "tiny", "reason": None, "count_all": 5},
        {"dataset": "tiny", "reason": "undecodable: made so by the test", "count_all": 1},
    ]
    assert names["left_out"] == [("tiny", "undecodable", 1), ("tiny", None, 5)]
    assert names["place"] == (names["sample"]["shard"], names["sample"]["row"])
    assert names["changed"] == [("tiny:000004#0", "moved"), ("tiny:000005#0", "new")]
    assert names["batch"]["sample_id"].tolist() == [names["reader"].ids[at] for at in (0, 2, 2)]
