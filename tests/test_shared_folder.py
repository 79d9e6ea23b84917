"""The shared folder is used whole or not at all."""

from __future__ import annotations

from tests.shared import REAL_HANDS, REFERENCE, needs_shared


@needs_shared
def test_every_golden_file_is_there() -> None:
    wanted = ["reference_tiny.npz", "reference_crops.npz", "reference_losses.npz", "evaluator_scores.json"]
    assert [name for name in wanted if not (REFERENCE / name).is_file()] == []
    assert sorted(path.parent.name for path in REAL_HANDS.glob("*/000000.tar")) == [
        "cocow-real",
        "freihand-real",
        "interhand26m-real",
    ]
