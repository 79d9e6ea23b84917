"""A comparison as files that open anywhere: report.html (nothing outside it is loaded), table.md, .csv and .tex."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from storage.durable import write_bytes_atomic
from trainer.compare import Comparison, Document, headline
from trainer.config import METRICS

REPORT_HTML, TABLE_MD, TABLE_CSV, TABLE_TEX = "report.html", "table.md", "table.csv", "table.tex"
_TITLES = {
    "pa_mpjpe_mm": "PA-MPJPE, mm", "pa_mpvpe_mm": "PA-MPVPE, mm", "mpjpe_mm": "MPJPE, mm", "f5": "F@5", "f15": "F@15",
    "auc": "AUC", "auc_mesh": "AUC mesh", "pck_05": "PCK@.05", "pck_10": "PCK@.10", "pck_15": "PCK@.15",
}  # fmt: skip
_CSS = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:14px}
td,th{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}
tr.teacher{background:#f3f3f3} .passed{color:#176b2c} .failed{color:#a11}
figure{margin:1.5rem 0} img,svg{max-width:100%}
"""


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write the four files, replacing those of an earlier comparison."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = table(comparison.document)
    write_bytes_atomic(folder / TABLE_CSV, _csv(rows).encode())
    write_bytes_atomic(folder / TABLE_TEX, _latex(rows).encode())
    notes = "".join(f"\n{line}\n" for line in warnings(comparison.document))
    write_bytes_atomic(folder / TABLE_MD, (_markdown(rows) + notes).encode())
    write_bytes_atomic(folder / REPORT_HTML, _html(comparison, rows).encode())


def table(document: Document) -> list[list[str]]:
    """A header and a line for the teacher, the mean pose and each student; means ± deviation over seeds."""
    columns = [(d, m) for d in _datasets(document) for m in METRICS if _anyone_has(document, d, m)]
    header = ["student", "strategy", "M params", "fps", "seeds", *(f"{d}: {_TITLES[m]}" for d, m in columns)]
    teacher = document["teacher"]
    lines = [["teacher", "", _number(teacher["params_m"]), _number(teacher["fps"]), ""]]
    lines[0] += [_number(teacher["metrics"].get(d, {}).get(m)) for d, m in columns]
    if teacher["mean_pose"]:
        lines.append(
            ["mean pose", "", "", "", "", *(_number(teacher["mean_pose"].get(d, {}).get(m)) for d, m in columns)]
        )
    for group in document["by_student"]:
        line = [
            group["name"],
            group["strategy"],
            _number(group["params_m"]),
            _number(group["fps"]),
            str(group["seeds"]),
        ]
        lines.append(line + [_with_std(group, d, m) for d, m in columns])
    return [header, *lines]


def _datasets(document: Document) -> list[str]:
    return sorted({d for each in (document["teacher"], *document["by_student"]) for d in each["metrics"]})


def _anyone_has(document: Document, dataset: str, metric: str) -> bool:
    return any(metric in each["metrics"].get(dataset, {}) for each in (document["teacher"], *document["by_student"]))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _with_std(group: Document, dataset: str, metric: str) -> str:
    mean, std = (group[which].get(dataset, {}).get(metric) for which in ("metrics", "std"))
    return _number(mean) if std is None else f"{_number(mean)} ± {_number(std)}"


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


_TEX = {"&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "$": r"\$", "{": r"\{", "}": r"\}", "±": r"$\pm$"}


def _latex(rows: Sequence[Sequence[str]]) -> str:
    """A tabular for the booktabs package; the teacher and the mean pose apart from the students."""
    lines = [" & ".join("".join(_TEX.get(sign, sign) for sign in cell) for cell in row) + r" \\" for row in rows]
    students = next((at for at, row in enumerate(rows) if at and row[0] not in ("teacher", "mean pose")), len(rows))
    columns = "ll" + "r" * (len(rows[0]) - 2)
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:students], r"\midrule", *lines[students:], r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"]) + "\n"


def warnings(document: Document) -> list[str]:
    """What a reader must know before believing the table: students that an answer without looking would beat."""
    found = []
    for dataset, scores in document["teacher"]["mean_pose"].items():
        limit = scores.get("pa_mpjpe_mm")
        errors = {g["name"]: g["metrics"].get(dataset, {}).get("pa_mpjpe_mm") for g in document["by_student"]}
        worse = [name for name, error in errors.items() if limit is not None and error is not None and error >= limit]
        if worse:
            found.append(
                f"On {dataset} the mean pose ({limit:.2f} mm PA-MPJPE) is no worse than {', '.join(worse)}: they are "
                "undertrained, and differences between them say nothing about distillation."
            )
    return found


def _html(comparison: Comparison, rows: Sequence[Sequence[str]]) -> str:
    document = comparison.document
    title = html.escape(f"handstill: {document['experiment']}")
    parts = [
        f"<h1>{title}</h1>",
        _gate_html(document["gate"]),
        _table_html(rows),
        *(f"<p class=failed>{html.escape(line)}</p>" for line in warnings(document)),
        "<p>Means over seeds ± standard deviation. fps: pictures a second, one at a time, at the median.</p>",
        *(_figure(_trade_off(document, d, m), _trade_off_caption(document, d, m)) for d, m in _headlines(document)),
        _paired_html(document["paired"]),
        _figure(_curves(comparison), "Validation PA-MPJPE while training") if any(comparison.curves.values()) else "",
        *(_picture(label, png) for label, png in comparison.pictures.items()),
    ]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_CSS}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _headlines(document: Document) -> list[tuple[str, str]]:
    """For each data set the first metric that it has, of those students that also have a speed."""
    found = []
    for dataset in _datasets(document):
        metric = headline(dataset, document["by_student"])
        if metric is not None and any(g["fps"] for g in document["by_student"]):
            found.append((dataset, str(metric)))
    return found


def _gate_html(gate: Document) -> str:
    if not gate["checks"]:
        return ""
    what = f"{gate['metric']} on {html.escape(gate['dataset'])}"
    lines = [
        f"<li class={_word(c['passed'])}>{html.escape(c['student'])}: {what} {_number(c['value'])}, "
        f"{c['what'].replace('_', ' ')} {_number(c['limit'])}</li>"
        for c in gate["checks"]
    ]
    word = _word(gate["passed"])
    return f"<h2 class={word}>Gate {word}</h2><ul>{''.join(lines)}</ul>"


def _word(passed: bool) -> str:
    return "passed" if passed else "failed"


def _table_html(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        f"<tr{' class=teacher' if row[0] == 'teacher' else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _paired_html(paired: Sequence[Document]) -> str:
    if not paired:
        return ""
    header = ["student", "against", "data set", "metric", "difference", "95% interval", "samples"]
    rows = [
        [
            *(p[key] for key in ("student", "baseline", "dataset", "metric")),
            *(_signed(p["difference"]), f"{_signed(p['low'])} … {_signed(p['high'])}", str(p["samples"])),
        ]
        for p in paired
    ]
    note = "<p>On the same samples; below 0 the student is better. The interval is over samples, not over seeds.</p>"
    return f"<h2>Paired differences</h2>{note}{_table_html([header, *rows])}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def _trade_off_caption(document: Document, dataset: str, metric: str) -> str:
    best = ", ".join(document["pareto"].get(dataset, []))
    return f"{_TITLES[metric]} on {dataset} against speed; areas are parameters. Nobody beats in both: {best}."


def _trade_off(document: Document, dataset: str, metric: str) -> Figure:
    """Accuracy, speed and size, as the paper's Figure 3; the line joins those whom nobody beats in both."""
    figure, axes = _axes()
    teacher = document["teacher"]
    places: dict[str, tuple[float, float]] = {}
    for each in (*document["by_student"], {**teacher, "name": "teacher"}):
        value, marker = each["metrics"].get(dataset, {}).get(metric), "*" if each["name"] == "teacher" else "o"
        if value is not None and each["fps"]:
            places[each["name"]] = (each["fps"], value)
            size = 30 + 2 * (each["params_m"] or 0)
            label = f"{each['name']}, {_number(each['params_m'])} M" if each["params_m"] else each["name"]
            axes.scatter(each["fps"], value, s=size, marker=marker, alpha=0.75, edgecolors="black", label=label)
    front = [places[name] for name in document["pareto"].get(dataset, []) if name in places]
    axes.plot([fps for fps, _ in front], [value for _, value in front], color="grey", linewidth=1, zorder=0)
    for name, scores in (("teacher", teacher["metrics"]), ("mean pose", teacher["mean_pose"])):
        value = scores.get(dataset, {}).get(metric)
        if value is not None:
            axes.axhline(value, linestyle="--", color="grey", linewidth=1)
            axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    speeds = [fps for fps, _ in places.values()]
    if max(speeds) > 10 * min(speeds):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(0.15)
    else:
        axes.margins(0.15)
        axes.set_xlim(left=0)
    axes.set_xlabel("pictures a second, one at a time")
    axes.set_ylabel(f"{_TITLES[metric]}, {dataset}")
    legend = axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([36])  # type: ignore[union-attr]
    return figure


def _curves(comparison: Comparison) -> Figure:
    figure, axes = _axes()
    for label, points in comparison.curves.items():
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, marker=".", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("PA-MPJPE on held-out training samples, mm")
    axes.legend(fontsize=8)
    return figure


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _figure(figure: Figure, caption: str) -> str:
    data = io.StringIO()
    settings: dict[Any, Any] = {"svg.hashsalt": "handstill", "svg.fonttype": "none"}  # the same bytes each time
    with mpl.rc_context(settings):
        figure.savefig(data, format="svg", metadata={"Date": None})
    svg = data.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _picture(label: str, png: bytes) -> str:
    source = base64.b64encode(png).decode()
    caption = f"{html.escape(label)}: labels green, answers red"
    return f'<figure><img alt="" src="data:image/png;base64,{source}"><figcaption>{caption}</figcaption></figure>'
