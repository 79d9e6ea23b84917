"""What distillation is worth on the embedded default: backbones by strategies at equal budgets, then ablations.

    python benchmarks/experiment.py TABLE [--size quick|cpu|gpu] [--folder FOLDER] [--strongest BACKBONE] [--json FILE]

Tables: `screen` (three backbones by four strategies, one seed), `confirm` (the strongest backbone, three seeds),
`budget` (the strongest without a teacher on five times the steps), and ablations of the strongest, hybrid:
`encodings`, `views`, `alignment`, `projection`, `heads`, `teacher-mode`. `all` makes every one of them, in this order.

Each variant is a pipeline file in FOLDER, run by `handstill run`: stopped and started again a table goes on where it
was, and what two tables share (caches, students) is computed once. It prints a Markdown table; `screen` and `confirm`
draw FOLDER/<table>.png as well. Size cpu is meant for two cores, and its students look at 128 pixels: `screen` takes
about fourteen hours where they have no bfloat16 products (reckoned from 118 views a second of MobileNetV3-S, 27 of
ConvNeXt-atto and 20 of RepViT-M0.9), and all tables more than a day. Size gpu is meant for one GPU, at 256 pixels;
quick only shows that it works. Every student starts from random weights, as nothing can be downloaded: at size cpu
they are undertrained, and the table's column `of mean pose` says how far they came.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the online teacher that the tests hold the trainer to

from models.sizes import IMAGE_SIZE  # noqa: E402
from models.teacher import Teacher, load_teacher  # noqa: E402
from models.vit import Vit  # noqa: E402
from pipeline.caches import cache_state  # noqa: E402
from pipeline.experiment import open_experiment  # noqa: E402
from pipeline.loading import read_document  # noqa: E402
from tests.online import in_the_loop, job_of  # noqa: E402
from trainer.evaluate import EvaluateJob, EvaluationSet, evaluate_student  # noqa: E402
from trainer.loop import train  # noqa: E402
from trainer.optimizing import has_bfloat16  # noqa: E402

DATASET, METRIC = "open-val", "pa_mpjpe_mm"
BACKBONES = {"mobilenetv3": "mobilenetv3_small_100", "repvit": "repvit_m0_9", "convnext": "convnext_atto"}
FAST_IN_BFLOAT16 = ("repvit", "convnext")
"""On a CPU that has bfloat16 products; MobileNetV3 is slower in them there. On a GPU all are bf16."""
OUTPUTS, FEATURES = 0.3, 0.225
"""Fast-HaMeR's relative weights, beside label losses that are means over the batch."""
STRATEGIES: dict[str, dict[str, Any]] = {
    "none": {},
    "outputs": {"outputs": OUTPUTS},
    "features": {"features": FEATURES},
    "hybrid": {"outputs": OUTPUTS, "features": FEATURES},
}
DROP_PATH = 0.55
"""Of HaMeR's last block in training mode, rising from 0 at its first: what the published loop leaves switched on."""
ABLATIONS = ("encodings", "views", "alignment", "projection", "heads", "teacher-mode")
TABLES = ("screen", "confirm", "budget", *ABLATIONS)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    hands: int
    held_out: int
    steps: int
    batch_size: int
    seeds: int
    input_px: int = 256
    """What students look at. At 128 they are compared with the teacher at stride 16, where their map has 8x8 tokens."""
    workers: Mapping[str, Any] = field(default_factory=dict)


SIZES = {
    "quick": Size(hands=48, held_out=16, steps=4, batch_size=4, seeds=2, input_px=128, workers={"cpus": 1}),
    "cpu": Size(hands=12_000, held_out=1_000, steps=2_000, batch_size=64, seeds=3, input_px=128, workers={"cpus": 1}),
    "gpu": Size(hands=40_000, held_out=2_000, steps=60_000, batch_size=64, seeds=3),
}


@dataclass(frozen=True)
class Variant:
    """One pipeline file: its students, and what differs from the others."""

    name: str
    students: Mapping[str, Mapping[str, Any]]
    cache: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 1


@dataclass(frozen=True)
class Lab:
    """Where the experiment lives and how large it is."""

    folder: Path
    size: Size
    strongest: str

    def student(self, backbone: str, strategy: str, **keys: Any) -> dict[str, Any]:
        """An entry of `students`. `distill`: further keys of that section."""
        distill = STRATEGIES[strategy] | keys.pop("distill", {})
        if self.size.input_px < IMAGE_SIZE:
            keys = {"input_px": self.size.input_px, **keys}
            distill |= {"at_stride": 16} if distill.get("features") else {}
        bf16 = backbone in FAST_IN_BFLOAT16 and has_bfloat16(torch.device("cpu")) and not torch.cuda.is_available()
        precision = "bf16" if bf16 else "auto"
        entry = {"backbone": BACKBONES[backbone], "head": "light", "precision": precision, **keys}
        return entry | ({"distill": distill} if distill else {})

    def strategies(self, backbone: str) -> dict[str, dict[str, Any]]:
        return {f"{backbone}-{strategy}": self.student(backbone, strategy) for strategy in STRATEGIES}

    def hybrid(self, name: str, **keys: Any) -> dict[str, dict[str, Any]]:
        """The strongest backbone's hybrid under a name of its own."""
        return {f"{self.strongest}-hybrid{name}": self.student(self.strongest, "hybrid", **keys)}

    def write(self, variant: Variant) -> Path:
        """The variant's pipeline file."""
        size, path = self.size, self.folder / f"{variant.name}.yaml"
        document = read_document(ROOT / "benchmarks/open-hand.yaml")
        document |= {"name": f"experiment-{variant.name}", "workdir": "."}
        tars = f"data/open-train/{{000000..{max(0, size.hands // 500 - 1):06d}}}.tar"
        document["datasets"]["open-train"]["path"] = tars
        for key in ("path", "image_dir", "truth_xyz", "truth_verts"):
            held_out = document["datasets"][DATASET]
            held_out[key] = held_out[key].replace("../runs/bench/", "")
        document["synthesise"]["sets"]["open-train"]["hands"] = size.hands
        document["synthesise"]["sets"][DATASET]["hands"] = size.held_out
        document["teacher"]["checkpoint"] = str(ROOT / "models/assets/demo_teacher/checkpoints/hamer.ckpt")
        document["cache"] |= variant.cache
        every = max(1, size.steps // 4)
        document["train"] |= {
            "steps": size.steps,
            "batch_size": size.batch_size,
            "warmup_steps": size.steps // 20,
            "seeds": list(range(variant.seeds)),
            "validate_every": every,
            "checkpoint_every": min(every, 500),
            "log_every": max(1, size.steps // 40),
            "workers": dict(size.workers),
        }
        document["students"] = {name: dict(student) for name, student in variant.students.items()}
        document["evaluate"]["latency"] = {"batch_sizes": [1], "warmup": 3, "iterations": 10}
        document["tracking"]["experiment"] = f"experiment-{variant.name}"
        path.write_text(json.dumps(document, indent=1), encoding="utf-8")  # which is YAML too
        return path

    def run(self, variant: Variant) -> dict[str, Any]:
        """`handstill run` on the variant; what its comparison says."""
        path = self.write(variant)
        line = [sys.executable, "-m", "pipeline.cli", "run", "-c", str(path)]
        subprocess.run(line, check=True, cwd=ROOT, stdout=sys.stderr)
        line = [sys.executable, "-m", "pipeline.cli", "compare", "--json", "-c", str(path)]
        answer = subprocess.run(line, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        comparison: dict[str, Any] = json.loads(answer.stdout)
        return comparison


Row = dict[str, Any]


def variants_of(table: str, lab: Lab) -> list[Variant]:
    """The pipeline files of a table."""
    light = {"views": 3, "features": {"grid": "8x8-paper", "encoding": "int8"}}

    def cache(**keys: Any) -> dict[str, Any]:
        return light | keys

    def encoded(encoding: str, grid: str = "8x8-paper") -> dict[str, Any]:
        return cache(features={"grid": grid, "encoding": encoding})

    if table == "screen":
        students = {name: entry for backbone in BACKBONES for name, entry in lab.strategies(backbone).items()}
        return [Variant("screen", students)]
    if table == "confirm":
        return [Variant("confirm", lab.strategies(lab.strongest), seeds=lab.size.seeds)]
    if table == "budget":
        longer = lab.student(lab.strongest, "none", steps=5 * lab.size.steps)
        return [Variant("budget", {f"{lab.strongest}-none-5x": longer, **lab.strategies(lab.strongest)})]
    if table == "encodings":
        encodings = ("float16", "int8", "pca64-int8", "codes16")
        return [Variant(f"encodings-{each}", lab.hybrid(f"-{each}"), encoded(each)) for each in encodings]
    if table == "views":
        return [Variant(f"views-{count}", lab.hybrid(f"-{count}-views"), cache(views=count)) for count in (1, 2, 3, 8)]
    if table == "alignment":
        ways = ("paper", "geometric")
        students = {k: v for way in ways for k, v in lab.hybrid(f"-{way}", distill={"alignment": way}).items()}
        return [Variant("alignment", students, encoded("int8", "full"))]
    if table == "projection":
        ways = ("trained", "frozen")
        students = {k: v for way in ways for k, v in lab.hybrid(f"-{way}", distill={"projection": way}).items()}
        return [Variant("projection", students)]
    assert table == "heads"
    students = {k: v for head in ("light", "paper") for k, v in lab.hybrid(f"-{head}", head=head).items()}
    return [Variant("heads", students)]


def rows_of(comparison: Mapping[str, Any]) -> list[Row]:
    """One a student: its error, beside those of the plain one, the teacher and the mean pose."""
    teacher = comparison["teacher"]
    nothing = teacher["mean_pose"][DATASET][METRIC]
    rows = [_row("mean pose", nothing, nothing), _row("teacher", teacher["metrics"][DATASET][METRIC], nothing)]
    for group in comparison["by_student"]:
        row = _row(group["name"], group["metrics"][DATASET][METRIC], nothing)
        row |= {"std": group["std"][DATASET][METRIC], "seeds": group["seeds"]}
        row |= {"params_m": group["params_m"], "fps": group["fps"]}
        for pair in comparison["paired"]:
            if pair["student"] == group["name"] and pair["dataset"] == DATASET and pair["baseline"] != "teacher":
                row |= {"against_none": [pair["difference"], pair["low"], pair["high"]]}
        rows.append(row)
    return rows


def _row(name: str, error: float, nothing: float) -> Row:
    return {"what": name, "value": error, "unit": "mm", "of_mean_pose": error / nothing}


class _DroppingVit(torch.nn.Module):
    """The teacher's backbone with its residual branches dropped at random, as in training mode: DROP_PATH."""

    def __init__(self, vit: Vit, generator: torch.Generator) -> None:
        super().__init__()
        self._vit, self._generator = vit, generator
        rates = torch.linspace(0, DROP_PATH, len(vit.blocks)).tolist()
        for block, rate in zip(vit.blocks, rates, strict=True):
            for branch in (block.attn, block.mlp):
                branch.register_forward_hook(self._hook(rate))

    def _hook(self, rate: float) -> Callable[..., torch.Tensor]:
        def drop(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            kept = torch.rand(len(output), 1, 1, generator=self._generator) >= rate
            return output * kept / (1 - rate)

        return drop

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self._vit(images)
        return features


def teacher_mode(lab: Lab) -> list[Row]:
    """Hybrid with the teacher live in the loop, once as a teacher should be and once with the published defect."""
    variant = variants_of("encodings", lab)[0]
    assert variant.name == "encodings-float16", "the live teacher wants a cache of float16"
    rows = [row for row in rows_of(lab.run(variant)) if row["what"] in ("mean pose", "teacher")]
    experiment = open_experiment(lab.folder / f"{variant.name}.yaml")
    caches = {role: cache_state(experiment, role) for role in ("train", "evaluate")}  # type: ignore[arg-type]
    held_out = EvaluationSet(
        DATASET,
        caches["evaluate"].root,
        caches["evaluate"].digests[DATASET] or "",
        experiment.datasets[DATASET].protocol,
    )
    recipe = next(iter(experiment.recipes().values()))
    for mode in ("eval", "train"):
        teacher = load_teacher(ROOT / "models/assets/demo_teacher/checkpoints/hamer.ckpt", "open-hand")
        if mode == "train":
            teacher.network.backbone = _DroppingVit(teacher.network.backbone, torch.Generator().manual_seed(0))
        job = job_of(caches["train"].root, lab.folder / f"teacher-mode-{mode}", recipe.model_dump())
        if not (job.out_dir / "student").is_dir():
            _train_online(teacher, job)
        done = evaluate_student(
            EvaluateJob(mode, 0, job.out_dir / "student", (held_out,), job.out_dir / "evaluation", mode)
        )
        rows.append(_row(f"teacher live, {mode} mode", done.metrics[DATASET][METRIC], rows[0]["value"]))
    return rows


def _train_online(teacher: Teacher, job: Any) -> None:
    def answers(pictures: torch.Tensor) -> Mapping[str, torch.Tensor]:
        with torch.no_grad():
            answer: Mapping[str, torch.Tensor] = teacher.network(pictures)
        return answer

    hidden = {name: module for name, module in sys.modules.items() if name != "models.teacher"}
    with in_the_loop(answers) as live, patch.dict(sys.modules, hidden, clear=True):
        live.note = lambda *_: None  # type: ignore[method-assign]  # it keeps every step's features: gigabytes here
        train(job)


def markdown(rows: Sequence[Row]) -> str:
    """The table as people read it."""
    lines = [
        "| student | PA-MPJPE (mm) | of mean pose | against none, 95% | M | frames/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f" ± {row['std']:.2f} ({row['seeds']} seeds)" if row.get("std") is not None else ""
        difference = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*row["against_none"]) if "against_none" in row else ""
        size, speed = (f"{row[key]:.1f}" if row.get(key) is not None else "" for key in ("params_m", "fps"))
        error = f"{row['value']:.2f}{spread}"
        lines.append(f"| {row['what']} | {error} | {row['of_mean_pose']:.2f} | {difference} | {size} | {speed} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Errors by backbone and strategy, with lines for the teacher and for the mean pose."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    students = [row for row in rows if row["what"] not in ("mean pose", "teacher")]
    for index, row in enumerate(students):
        strategy = row["what"].rsplit("-", 1)[-1]
        axes.bar(index, row["value"], yerr=row.get("std"), color=f"C{list(STRATEGIES).index(strategy)}", capsize=3)
    for row, colour in zip(rows[:2], ("0.6", "k"), strict=True):
        axes.axhline(row["value"], color=colour, linestyle="--", linewidth=1)
        axes.annotate(f"{row['what']} {row['value']:.1f}", (len(students) - 0.4, row["value"]), va="bottom", ha="right")
    axes.set_xticks(range(len(students)), [row["what"] for row in students], rotation=35, ha="right", fontsize=8)
    axes.set_ylabel("PA-MPJPE (mm)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def make(table: str, lab: Lab) -> list[Row]:
    """The rows of one table, trained where they are not trained yet."""
    if table == "teacher-mode":
        return teacher_mode(lab)
    rows: dict[str, Row] = {}
    for variant in variants_of(table, lab):
        rows |= {row["what"]: row for row in rows_of(lab.run(variant))}
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=[*TABLES, "all"], default="screen")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--quick", action="store_true", help="size quick")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/experiment")
    parser.add_argument("--strongest", choices=BACKBONES, default="mobilenetv3", help="the backbone of all but screen")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    size = "quick" if arguments.quick else arguments.size
    lab = Lab(arguments.folder.absolute() / size, SIZES[size], arguments.strongest)
    lab.folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[Row]] = {}
    for table in TABLES if arguments.table == "all" else [arguments.table]:
        tables[table] = make(table, lab)
        print(f"\n{table}, size {size}, {lab.size.steps} steps of {lab.size.batch_size}\n{markdown(tables[table])}")
        if table in ("screen", "confirm"):
            draw(tables[table], lab.folder / f"{table}.png")
    document = {
        "name": "experiment",
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(sys.argv),
        "rows": [row | {"what": f"{table}: {row['what']}"} for table, rows in tables.items() for row in rows],
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
