"""A comparison as files that open anywhere: report.html (nothing outside it is loaded), tables, figures, the document.

report.html                  everything below on one page
table.md, .csv, .tex         scores; likewise differences.*, costs.*, origins.*
figures/*.svg                the figures of the page
comparison.json              what `handstill compare --json` prints
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from storage.durable import write_bytes_atomic
from trainer import report_figures as figures
from trainer import report_tables as tables
from trainer.compare import Comparison, Document, headline
from trainer.config import METRIC_TITLES
from trainer.report_cases import cases_html, picture_html, sheet_png
from trainer.report_page import SECTION_NOTES, details, figure_html, page, paragraph, table_html
from trainer.report_tables import Rows

REPORT_HTML, TABLE_MD, COMPARISON_JSON, FIGURES, CASES = (
    "report.html",
    "table.md",
    "comparison.json",
    "figures",
    "cases",
)


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write all files, replacing those of an earlier comparison; their paths."""
    for inner, kind in ((FIGURES, "*.svg"), (CASES, "*.png")):
        (folder / inner).mkdir(parents=True, exist_ok=True)
        for old in (folder / inner).glob(kind):
            old.unlink()
    document, notes = comparison.document, tables.warnings(comparison.document)
    files: dict[str, str] = {}
    short = tables.of_one_set(document)
    for name, rows in _tables(document).items():
        said = "".join(f"\n{line}\n" for line in [*document["gate"]["sentences"], *notes]) if name == "table" else ""
        printed = short if name == "table" and short is not None else rows
        files[f"{name}.md"] = tables.as_markdown(printed) + said
        files[f"{name}.csv"] = tables.as_csv(rows)
        files[f"{name}.tex"] = tables.as_latex(printed)
    drawn = {name: (figures.as_svg(figure), caption) for name, figure, caption in _figures(comparison)}
    files |= {f"{FIGURES}/{name}.svg": svg for name, (svg, _) in drawn.items()}
    files[COMPARISON_JSON] = json.dumps(document, indent=1)
    files[REPORT_HTML] = _html(comparison, drawn, notes)
    written = {name: text.encode() for name, text in files.items()} | _case_pictures(comparison)
    for name, data in written.items():
        write_bytes_atomic(folder / name, data)
    return [folder / name for name in written]


def _case_pictures(comparison: Comparison) -> dict[str, bytes]:
    """The samples of the page as pictures, for MLflow's pages, which show those."""
    return {
        f"{CASES}/{dataset}-{at:02d}-{'worst' if case.worst else 'best'}.png": sheet_png(case)
        for dataset, cases in comparison.cases.items()
        for at, case in enumerate(cases)
    }


def _tables(document: Document) -> dict[str, Rows]:
    return {
        "table": tables.scores(document),
        "differences": tables.differences(document["paired"]),
        "costs": tables.costs(document["students"]),
        "origins": tables.origins(document["students"]),
    }


def _figures(comparison: Comparison) -> Iterator[tuple[str, Figure, str]]:
    """(name, figure, caption), in the page's order."""
    document = comparison.document
    looks = figures.looks_of(document["by_student"])
    for dataset, metric in _headlines(document):
        yield f"trade-off-{dataset}", figures.trade_off(document, dataset, metric), _caption(document, dataset, metric)
    for dataset in tables.scored_sets(document):
        pairs = [p for p in document["paired"] if p["dataset"] == dataset and p["difference"] is not None]
        among = [p for p in pairs if p["baseline"] != "teacher"]
        if among:
            yield f"differences-{dataset}", figures.forest(among), _forest_caption(among)
    if any(points for seeds in comparison.curves.values() for points in seeds.values()):
        yield "learning-curves", figures.learning_curves(comparison.curves, looks), _curves_caption(comparison.curves)
    for joints in document["by_joint"]:
        caption = f"Error by joint on {joints['dataset']}, aligned as for PA-MPJPE; means over samples and seeds."
        yield f"joints-{joints['dataset']}", figures.joint_errors(joints, looks), caption
    for dataset in tables.scored_sets(document):
        parts = [each for each in document["by_difficulty"] if each["dataset"] == dataset]
        if parts:
            caption = f"Error by difficulty on {dataset}, easy to hard from left to right; 95% intervals of the means."
            yield f"difficulty-{dataset}", figures.difficulty(parts, looks), caption


def _html(comparison: Comparison, drawn: Mapping[str, tuple[str, str]], notes: Sequence[str]) -> str:
    document = comparison.document

    def shown(*beginnings: str) -> str:
        return "".join(figure_html(*each) for name, each in drawn.items() if name.startswith(beginnings))

    pairs = document["paired"]
    against = [pair for pair in pairs if pair["baseline"] == "teacher"]
    among = [pair for pair in pairs if pair["baseline"] != "teacher"]
    sections = [
        ("gate", "Gate", _gate_html(document["gate"])),
        ("scores", "Scores", _scores_html(document, notes)),
        ("speed", "Accuracy, speed, size", shown("trade-off-")),
        ("strategies", "Strategies against each other", shown("differences-") + _pairs_html(among)),
        ("teacher", "Students against the teacher", _pairs_html(against, told=bool(among))),
        ("learning", "Learning curves", shown("learning-curves")),
        ("where", "Where the errors are", shown("joints-", "difficulty-")),
        ("pictures", "Worst and best", cases_html(comparison.cases)),
        ("cost", "Cost", _cost_html(document)),
        ("again", "To have it again", _origins_html(document)),
        ("training", "Pictures while training", _training_pictures(comparison.pictures)),
    ]
    return page(f"handstill: {document['experiment']}", _subtitle(document), sections)


def _subtitle(document: Document) -> str:
    runs, students = len(document["students"]), len(document["by_student"])
    which = f", those that {document['filter']} fits" if document["filter"] else ""
    return f"{students} students in {runs} runs{which}; read from MLflow"


def _gate_html(gate: Document) -> str:
    if not gate["checks"]:
        return ""
    word = "passed" if gate["passed"] else "failed"
    lines = [
        f"<li class={'passed' if check['passed'] else 'failed'}>{html.escape(check['sentence'])}</li>"
        for check in gate["checks"]
    ]
    end = "".join(f"<p class=warning>{html.escape(line)}</p>" for line in gate["caveats"])
    end += paragraph(gate["promoted"]["sentence"]) if "promoted" in gate else ""
    checked = (check["sentence"] for check in gate["checks"])
    apart = [*checked, *gate["caveats"], gate.get("promoted", {}).get("sentence")]
    first = "".join(paragraph(line) for line in gate["sentences"] if line not in apart)
    return f"<p class='verdict {word}'>The gate is {word}.</p>{first}<ul>{''.join(lines)}</ul>{end}"


def _scores_html(document: Document, notes: Sequence[str]) -> str:
    warned = "".join(f"<p class=warning>{html.escape(line)}</p>" for line in notes)
    machines = document["machines"]
    where = paragraph(f"Speeds: {machines[0]}.") if len(machines) == 1 else ""
    return (
        table_html(tables.scores(document), apart=2, grouped=True, best=tables.best_cells(document))
        + warned
        + paragraph(SECTION_NOTES["scores"])
        + where
    )


def _pairs_html(pairs: Sequence[Document], *, told: bool = False) -> str:
    """told: what the columns mean was said of an earlier table."""
    if not pairs:
        return ""
    seeds = SECTION_NOTES["pairs-seeds" if _over_seeds(pairs) else "pairs-one-seed"]
    note = "As above: student minus teacher." if told else f"{SECTION_NOTES['pairs']} {seeds}"
    return table_html(tables.differences(pairs), apart=0, left=4) + paragraph(note)


def _over_seeds(pairs: Sequence[Document]) -> bool:
    """Whether some pair has an interval over seeds."""
    return any(pair["over_seeds"] is not None and pair["over_seeds"]["low"] is not None for pair in pairs)


def _cost_html(document: Document) -> str:
    return table_html(tables.costs(document["students"])) + paragraph(SECTION_NOTES["cost"])


def _origins_html(document: Document) -> str:
    lines = [
        (f"{run['name']} (seed {run['seed']})" + _UNCOMMITTED * run["origin"]["dirty"], run["origin"]["line"])
        for run in document["students"]
    ]
    known = "".join(details(label, line) for label, line in lines if line)
    return table_html(tables.origins(document["students"]), left=7) + paragraph(SECTION_NOTES["again"]) + known


_UNCOMMITTED = ", trained with changes that its commit does not have: the line does without them"


def _training_pictures(pictures: Mapping[str, bytes]) -> str:
    return "".join(picture_html(label, png) for label, png in pictures.items())


def _headlines(document: Document) -> list[tuple[str, str]]:
    """For each data set the first metric that it has, of those students that also have a speed."""
    found = []
    for dataset in tables.scored_sets(document):
        metric = headline(dataset, document["by_student"])
        if metric is not None and any(g["fps"] and dataset in g["metrics"] for g in document["by_student"]):
            found.append((dataset, str(metric)))
    return found


def _caption(document: Document, dataset: str, metric: str) -> str:
    best = ", ".join(document["pareto"].get(dataset, []))
    title = METRIC_TITLES[metric]  # type: ignore[index]  # one of the known
    key = "colours are strategies, shapes backbones, areas grow with parameters"
    speed = (
        "Students of one network share the mean of their speeds, which differ by noise only"
        if len(document["machines"]) <= 1
        else tables.OTHER_MACHINES
    )
    return f"{title} on {dataset} against speed; {key}. {speed}. On the line, beaten by nobody in both: {best}."


def _forest_caption(pairs: Sequence[Document]) -> str:
    seeds = (
        "Thin: 95% over seeds."
        if _over_seeds(pairs)
        else "Whether training again would show the same takes several seeds to tell."
    )
    hollow = "" if all(pair["equal_budget"] for pair in pairs) else " Hollow: not at equal budget."
    return f"Thick: 95% over samples. {seeds}{hollow}"


def _curves_caption(curves: figures.Curves) -> str:
    """What the curves are, and who was getting worse at the end."""
    many = any(len(seeds) > 1 for seeds in curves.values())
    rising = []
    for name, seeds in curves.items():
        for points in (sorted(points) for points in seeds.values() if points):
            if points[-1][1] > min(value for _, value in points) and name not in rising:
                rising.append(name)
    what = "the mean over seeds, and their range" if many else "one seed"
    ends = (
        f" After their lowest point these got worse again: {', '.join(rising)}. The weights of the lowest point are "
        "kept and scored."
        if rising
        else ""
    )
    return f"Validation error while training: {what}.{ends}"
