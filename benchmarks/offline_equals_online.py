"""Whether a student learns the same from the cache as with the teacher live in every step, and what each way costs.

    python benchmarks/offline_equals_online.py [--quick] [--json FILE] [--folder FOLDER]

One student (MobileNetV3-S, hybrid distillation, one seed) is trained several times by the trainer's own loop
(`trainer.loop.train`), on the same views in the same order: online, where the demo's teacher looks at each batch's
pictures (eval mode, float32, its whole map), and from caches of those views in every encoding, on the grids that serve
it. Synthesised hands and, where ../shared/data/real-hands is there, those of its photographs. What is compared, step by
step, worst step of all (`tests.online.Agreement`):

    total, features, others   |difference| / online: the whole loss, the feature loss, all the rest
    bound                     what of `features` the encoding explains at most, by the triangle inequality from its own
                              error on the live teacher's features: (2 sqrt(L) e + e^2) / L
    over bound                |difference of the feature losses| / bound at that step
    unexplained               what is left of `features` once the live targets are put through the encoding too
    targets                   distance of the cache's targets from the live ones through the encoding, over their size

Controls: `shuffled rows` reads the teacher's answers of other samples and must fail every check by far; `last bits` is
online training again with the teacher's answers moved by their last bit, so the least that any two trainings differ by.
Exits with 1 when a cache fails a check, or a control passes one. Losses do not depend on the machine's load, times do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # what the tests hold the trainer to

from models.teacher import Teacher, load_teacher  # noqa: E402
from stages.config import HamerTarDataset, SynthesiseConfig, SynthesiseSet  # noqa: E402
from stages.ingest import scan_source  # noqa: E402
from stages.synthesise import run_unit, synthesise_units  # noqa: E402
from storage.config import CacheConfig, FeatureEncoding, FeatureGrid, FeaturesConfig  # noqa: E402
from tests.online import (  # noqa: E402
    Agreement,
    Answers,
    Run,
    compare,
    in_the_loop,
    job_of,
    run,
    same_inputs,
    shuffled,
    write_cache,
)

TEACHER = ROOT / "models/assets/demo_teacher/checkpoints/hamer.ckpt"
REAL_HANDS = ROOT.parent / "shared/data/real-hands"
FEATURE_WEIGHT, VIEWS, TEACHER_BATCH = 1.8, 3, 16
RECIPE: dict[str, Any] = {
    "backbone": "mobilenetv3_small_100",
    "head": "light",
    "batch_size": 8,
    "lr": 1e-4,  # the default; without the warm-up Adam's first steps make thousandths of last bits (docs/log.md)
    "warmup_steps": 15,
}
PRESETS: dict[str, dict[str, Any]] = {
    "corrected": {},
    "corrected, geometric": {"alignment": "geometric"},
    "paper": {"preset": "paper"},
}
GRIDS: dict[str, FeatureGrid] = {
    "corrected": "8x8-paper",
    "corrected, geometric": "8x6-geometric",
    "paper": "8x8-paper",
}
"""Beside `full`, which serves all of them."""
ENCODINGS: tuple[FeatureEncoding, ...] = ("float16", "int8", "pca128-int8", "codes16")
TOLERANCE = 1e-3
"""Of a training from float16; and, for every encoding, of what its error does not explain."""
FAR = 10.0
"""So many times the tolerance a control must be."""


@dataclass(frozen=True)
class Row:
    """One training beside the online one of its preset."""

    preset: str
    way: str
    agreement: Agreement
    step_s: float
    control: bool = False

    def problems(self) -> list[str]:
        """What is not as it must be; of a control, that it passed."""
        found = self.agreement
        if self.control:
            checked = {"total": found.total, "unexplained": found.unexplained, "targets": found.targets}
            return [f"passes {name}" for name, value in checked.items() if value < FAR * TOLERANCE]
        exact = {"total": found.total, "features": found.features} if self.way.endswith("float16") else {}
        near = {"unexplained": found.unexplained, "targets": found.targets} | exact
        wrong = [f"{name} {value:.2g}" for name, value in near.items() if value > TOLERANCE]
        if found.others > max(TOLERANCE, found.bound):  # no encoding touches them: they move as the student does
            wrong.append(f"others {found.others:.2g}")
        # Float16's own bound is below what last bits grow to in two trainings.
        return wrong + ([f"over bound {found.over_bound:.2g}"] if not exact and found.over_bound > 1 else [])


def hands(folder: Path, count: int) -> tuple[dict[str, pa.Table], dict[str, float]]:
    """Manifests of the data sets, and their weights in the mix."""
    sets = {"synthesised": HamerTarDataset(format="hamer_tar", path="hands.tar")}
    config = SynthesiseConfig(sets={"synthesised": SynthesiseSet(hands=count, seed=21)})
    for unit in synthesise_units(config, sets, folder):
        run_unit(unit)
    real = sorted(REAL_HANDS.glob("*/*.tar"))
    sets |= {tar.parent.name: HamerTarDataset(format="hamer_tar", path=str(tar)) for tar in real}
    tables = {name: scan_source(name, dataset, folder / str(dataset.path), folder) for name, dataset in sets.items()}
    usable = {name: table.filter(table["reason"].is_null()) for name, table in tables.items()}
    return usable, {name: 0.7 if name == "synthesised" else 0.1 for name in usable}


def last_bits(teacher: Teacher) -> Answers:
    """The teacher, its answers one step of float32 further from 0."""

    def answers(images: Tensor) -> Mapping[str, Tensor]:
        return {name: torch.nextafter(value, value * 2) for name, value in teacher(images).items()}

    return answers


class Bench:
    """The data, the teacher, and trainings on them."""

    def __init__(self, folder: Path, count: int, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.teacher = load_teacher(TEACHER, "open-hand", "cpu", "fp32")
        self.tables, self.weights = hands(folder, count)
        self._trained = 0

    def cache(self, grid: FeatureGrid, encoding: FeatureEncoding) -> Path:
        """Taught, or found."""
        config = CacheConfig(views=VIEWS, features=FeaturesConfig(grid=grid, encoding=encoding))
        return write_cache(self.folder, self.folder / "caches", self.tables, config, self.teacher, TEACHER_BATCH)

    def train(self, cache: Path, preset: str, **how: Any) -> Run:
        """A student from the first step."""
        self._trained += 1
        distill = {"outputs": 0.3, "features": FEATURE_WEIGHT} | PRESETS[preset]
        recipe = RECIPE | {"steps": self.steps, "distill": distill}
        return run(job_of(cache, self.folder / f"student-{self._trained}", recipe, self.weights), **how)

    def rows(self, preset: str, encodings: tuple[FeatureEncoding, ...], *, whole: bool) -> Iterator[Row]:
        """All ways of one preset, online first. whole: every encoding on the full grid too, and both controls."""
        float16 = self.cache("full", "float16")
        with in_the_loop(self.teacher) as live:
            online = self.train(float16, preset)

        def row(way: str, found: Run, control: bool = False) -> Row:
            return Row(preset, way, compare(found, online, live, FEATURE_WEIGHT), found.step_s, control)

        yield row("online", online)
        with in_the_loop(last_bits(self.teacher)):
            yield row("online, last bits", self.train(float16, preset))
        for encoding in encodings if whole else encodings[:1]:
            yield row(f"full {encoding}", self.train(self.like(float16, "full", encoding), preset))
        for encoding in encodings:
            grid = GRIDS[preset]
            yield row(f"{grid} {encoding}", self.train(self.like(float16, grid, encoding), preset))
        for encoding in (encodings[0], encodings[-1]) if whole else encodings[:1]:
            wrong = self.train(self.cache("full", encoding), preset, opener=shuffled)
            yield row(f"full {encoding}, shuffled rows", wrong, control=True)

    def like(self, other: Path, grid: FeatureGrid, encoding: FeatureEncoding) -> Path:
        """A cache of the same pictures as another one, byte for byte."""
        cache = self.cache(grid, encoding)
        assert same_inputs(cache, other), f"{grid} {encoding}: not the pictures of the other caches"
        return cache


HEADINGS = ("total", "features", "bound", "over_bound", "unexplained", "others", "targets")


def line(row: Row) -> str:
    """One line of the table of docs/log.md."""
    values = [f"{getattr(row.agreement, name):.2g}" for name in HEADINGS]
    return f"| {row.preset} | {row.way} | {' | '.join(values)} | {row.step_s:.2f} |"


def report(quick: bool, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Train and compare; the document, and what is not as it must be. The table goes to stderr, line by line."""
    bench = Bench(folder, *((16, 10) if quick else (96, 30)))
    encodings = ("float16", "int8", "codes4") if quick else ENCODINGS
    rows: list[Row] = []
    print(f"| preset | way | {' | '.join(HEADINGS)} | step, s |\n|{' --- |' * (len(HEADINGS) + 3)}", file=sys.stderr)
    for preset in ("corrected", "paper") if quick else PRESETS:
        for row in bench.rows(preset, encodings, whole=preset == "corrected" and not quick):
            rows.append(row)
            print(line(row), file=sys.stderr, flush=True)
    return _document(rows, bench), [f"{row.preset}, {row.way}: {problem}" for row in rows for problem in row.problems()]


def _document(rows: list[Row], bench: Bench) -> dict[str, Any]:
    caches = [row for row in rows if not row.control and not row.way.startswith("online")]
    controls = [row for row in rows if row.control]
    values = [
        (f"{row.preset}, {row.way}: {name}", getattr(row.agreement, name), "1") for row in rows for name in HEADINGS
    ]
    values += [(f"{row.preset}, {row.way}: median step", row.step_s, "s") for row in rows]
    float16 = [row.agreement for row in caches if row.way.endswith("float16")]
    counts = ", ".join(f"{len(table)} of {name}" for name, table in bench.tables.items())
    offline = float(np.median([row.step_s for row in caches]))
    online = float(np.median([row.step_s for row in rows if row.way == "online"]))
    return {
        "name": "offline_equals_online",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread, torch {torch.__version__}; "
        f"{bench.steps} steps of {RECIPE['batch_size']}; hands: {counts}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rows": [{"what": what, "value": float(f"{value:.4g}"), "unit": unit} for what, value, unit in values],
        "ratios": {
            "float16_worst_step": max(max(found.total, found.features) for found in float16),
            "encodings_worst_over_bound": max(
                row.agreement.over_bound for row in caches if not row.way.endswith("float16")
            ),
            "worst_unexplained": max(row.agreement.unexplained for row in caches),
            "control_least_unexplained": min(row.agreement.unexplained for row in controls),
            "online_step_over_cached": round(online / offline, 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where everything is written, and removed (a temporary folder)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="offline_equals_online-", dir=arguments.folder))
    try:
        document, problems = report(arguments.quick, folder)
    finally:
        shutil.rmtree(folder)
    text = json.dumps(document, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    if problems:
        sys.exit("not as it must be:\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
