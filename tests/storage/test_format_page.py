"""docs/format.md is true: its table is the code's, and its examples run against a real cache, warnings being errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import layout
from storage.config import FeatureEncoding
from tests.tiny_cache import write_tiny_cache

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def test_the_table_lists_every_array_as_it_is_written() -> None:
    for entry in layout.ENTRIES:
        kinds, dimensions = " or ".join(entry.dtypes), ", ".join(entry.dimensions)
        about = entry.about + (" (optional)" if entry.optional else "")
        assert f"| `{entry.path}` | {kinds} | {dimensions} | {entry.unit} | {about} |" in PAGE
    assert f"# The cache format, version {layout.FORMAT_VERSION}" in PAGE


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the examples are kept short
@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_the_examples_run(tmp_path: Path, encoding: FeatureEncoding) -> None:
    names: dict[str, Any] = {"cache": str(write_tiny_cache(tmp_path, n=5, quarantined=1, encoding=encoding))}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
        exec(block, names)
    np.testing.assert_array_equal(names["one"]["pictures"][1], names["picture"])
    np.testing.assert_array_equal(names["one"]["teacher/features"][1], names["features"])
    assert names["photo_px"].shape == (21, 2)
    assert names["batch"]["sample_id"].tolist() == [names["reader"].ids[at] for at in (0, 2, 2)]
