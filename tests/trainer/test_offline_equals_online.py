"""Training from the cache is training with the teacher live in the loop, a control that must fail included.

`benchmarks/offline_equals_online.py` is the same at the size of the demo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from models.teacher import Teacher, load_teacher
from stages.config import HamerTarDataset
from stages.ingest import scan_source
from storage.cache import open_cache
from storage.config import CacheConfig, FeatureEncoding, FeatureGrid, FeaturesConfig
from tests.online import (
    LiveTeacher,
    Opener,
    Run,
    compare,
    in_the_loop,
    job_of,
    run,
    same_inputs,
    shuffled,
    write_cache,
)
from tests.tiny_experiment import write_hands
from tests.tiny_networks import write_tiny_teacher

WEIGHT = 1.8
RECIPE: dict[str, Any] = {
    "backbone": "test_efficientnet", "head": "light", "steps": 6, "batch_size": 4, "lr": 1e-4, "warmup_steps": 3,
}  # fmt: skip
DISTILL: dict[str, dict[str, Any]] = {
    "corrected": {},
    "geometric": {"alignment": "geometric"},
    "paper": {"preset": "paper"},
}
TOLERANCE = 1e-3
"""How near the losses of each step must be, relative: from float16, and beyond what another encoding explains."""


Online = Callable[[str], tuple[Run, LiveTeacher]]
"""A preset's online run, and what its teacher said."""


@dataclass(frozen=True)
class Lab:
    """Twelve hands and a teacher; caches of what it says of them."""

    folder: Path
    table: pa.Table
    teacher: Teacher

    def cache(self, grid: FeatureGrid, encoding: FeatureEncoding) -> Path:
        config = CacheConfig(views=2, features=FeaturesConfig(grid=grid, encoding=encoding))
        return write_cache(self.folder, self.folder / "caches", {"hands": self.table}, config, self.teacher, 8)

    def train(self, cache: Path, preset: str, opener: Opener = open_cache, **options: Any) -> Run:
        """A student from the first step, in a folder of its own."""
        out_dir = self.folder / f"out-{len(list(self.folder.glob('out-*')))}"
        recipe = RECIPE | {"distill": {"outputs": 0.3, "features": WEIGHT} | DISTILL[preset]}
        return run(job_of(cache, out_dir, recipe | options), opener)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("online")
    dataset = HamerTarDataset(format="hamer_tar", path="hands.tar")
    write_hands(folder / "hands.tar", "hands", count=12)
    checkpoint, hand_model = write_tiny_teacher(folder / "teacher")
    table = scan_source("hands", dataset, folder / "hands.tar", folder)
    return Lab(folder, table, load_teacher(checkpoint, hand_model))


@pytest.fixture(scope="module")
def online(lab: Lab) -> Online:
    found: dict[str, tuple[Run, LiveTeacher]] = {}

    def of(preset: str) -> tuple[Run, LiveTeacher]:
        if preset not in found:
            with in_the_loop(lab.teacher) as live:
                found[preset] = lab.train(lab.cache("full", "float16"), preset), live
        return found[preset]

    return of


@pytest.mark.parametrize(
    ("preset", "grid", "encoding"),
    [
        ("corrected", "8x8-paper", "float16"), ("corrected", "full", "int8"), ("corrected", "8x8-paper", "pca12-int8"),
        ("geometric", "8x6-geometric", "float16"),
        ("paper", "full", "float16"), ("paper", "8x8-paper", "codes2"),
    ],
)  # fmt: skip
def test_training_from_a_cache_is_training_with_the_teacher_in_the_loop(
    lab: Lab, online: Online, preset: str, grid: FeatureGrid, encoding: FeatureEncoding
) -> None:
    with_teacher, live = online(preset)
    cache = lab.cache(grid, encoding)
    assert same_inputs(cache, lab.cache("full", "float16"))
    found = compare(lab.train(cache, preset), with_teacher, live, WEIGHT)
    assert found.targets < 1e-4, "the cache holds what the teacher says, through the encoding"
    assert found.over_bound < 1, "the loss moves by no more than the encoding's error can move it"
    assert found.unexplained < TOLERANCE, "and for no other reason"
    assert found.others < max(TOLERANCE, found.bound), "what no encoding touches moves only as the student does"
    if encoding == "float16":
        assert max(found.total, found.features) < TOLERANCE
    else:
        assert found.features > 1e-5, "it went through the encoding"


@pytest.mark.parametrize(("preset", "encoding"), [("corrected", "float16"), ("paper", "codes2")])
def test_another_samples_answers_are_found_out(
    lab: Lab, online: Online, preset: str, encoding: FeatureEncoding
) -> None:
    with_teacher, live = online(preset)
    found = compare(lab.train(lab.cache("full", encoding), preset, opener=shuffled), with_teacher, live, WEIGHT)
    assert found.targets > 0.5
    assert min(found.total, found.unexplained) > 10 * TOLERANCE
    if encoding == "float16":
        assert found.over_bound > 10


def test_student_and_teacher_see_the_stored_pixels_unless_jitter_is_asked_for(lab: Lab, online: Online) -> None:
    cache = lab.cache("full", "float16")
    stored = _stored_pictures(cache)
    _, live = online("corrected")
    assert all(picture.tobytes() in stored for batch in live.pictures for picture in batch)
    with in_the_loop(lab.teacher) as other:
        lab.train(cache, "corrected", steps=1, colour_jitter=0.2)
    assert not any(picture.tobytes() in stored for picture in other.pictures[0])


def _stored_pictures(cache: Path) -> set[bytes]:
    reader = open_cache(cache)
    return {picture.tobytes() for row in range(len(reader)) for picture in reader[row]["pictures"]}
