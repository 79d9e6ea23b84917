"""Where the project's golden numbers and real photographs lie: tests on them skip only where the folder is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
REFERENCE = SHARED / "reference"
REAL_HANDS = SHARED / "data" / "real-hands"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared (golden numbers, real photographs) is missing")
