"""The figures of a comparison: what is gained for what speed and size, how it was learned, and where the errors are."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from matplotlib.transforms import Bbox

from trainer.config import METRIC_TITLES

Document = dict[str, Any]
Curves = Mapping[str, Mapping[int | None, Sequence[tuple[int, float]]]]

STRATEGY_COLOURS = {"none": "#767676", "outputs": "#0072b2", "features": "#d55e00", "hybrid": "#009e73"}
"""Of Okabe and Ito's palette, told apart by the colour-blind too."""
_OTHERS = ("#cc79a7", "#56b4e9", "#b8860b", "#7a4fbf", "#a0522d", "#2f4f4f")
TEACHER_COLOUR = "#111111"
_MARKERS = ("o", "s", "^", "D", "P", "v", "X", "h")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)), (0, (8, 3)))
_GREY = "#8a8a8a"
_ALL_NAMED = 9
"""With more points only those on the front have their names beside them."""
_LABEL_REACHES_PT = (2.0, 8.0, 16.0, 28.0, 44.0)
_LABEL_DIRECTIONS = 16
_LEADER_FROM_PT = 14.0
_LONGEST_NAME = 36


def trade_off(document: Document, dataset: str, metric: str) -> Figure:
    """Accuracy, speed and size, as the paper's Figure 3; the line joins those whom nobody beats in both. With many
    students only those on the line, and the teacher, have their names beside them."""
    figure, axes = _axes(height_in=4.9)
    groups, teacher = document["by_student"], {**document["teacher"], "name": "teacher", "strategy": "", "backbone": ""}
    backbones = sorted({group["backbone"] for group in groups})
    points: dict[str, _Point] = {}
    for each in (teacher, *groups):
        value = each["metrics"].get(dataset, {}).get(metric)
        if value is not None and each["speed"]:
            points[each["name"]] = point = _Point(each["speed"], value, 40 + 40 * (each["params_m"] or 0) ** 0.5)
            axes.scatter(point.fps, point.value, s=point.area, **_look(each, backbones))
    front = [points[name] for name in document["pareto"].get(dataset, []) if name in points]
    axes.plot([p.fps for p in front], [p.value for p in front], color=_GREY, linewidth=1.2, zorder=1)
    _speed_axis(axes, [point.fps for point in points.values()])
    which = "lower" if metric.endswith("_mm") else "higher"
    axes.set_ylabel(f"{METRIC_TITLES[metric]}, {dataset} ({which} is better)")  # type: ignore[index]  # one of the known
    said = _mean_pose(axes, teacher["mean_pose"].get(dataset, {}).get(metric))
    _legend(axes, groups, backbones)
    few = len(points) <= _ALL_NAMED
    named = {n: p for n, p in points.items() if few or n == "teacher" or n in document["pareto"].get(dataset, [])}
    _label_points(figure, axes, named, list(points.values()), said)
    return figure


@dataclass(frozen=True)
class _Point:
    fps: float
    value: float
    area: float
    """Square points, as scatter takes it."""


def _look(each: Document, backbones: Sequence[str]) -> dict[str, Any]:
    if each["name"] == "teacher":
        look = {"marker": "*", "color": TEACHER_COLOUR}
    else:
        marker = _MARKERS[backbones.index(each["backbone"]) % len(_MARKERS)]
        look = {"marker": marker, "color": STRATEGY_COLOURS.get(each["strategy"], _OTHERS[0])}
    return {**look, "alpha": 0.85, "edgecolors": "white", "linewidths": 0.8, "zorder": 3}


def _mean_pose(axes: Axes, value: float | None) -> list[Annotation]:
    """A line where it is among the points, else a word at the border: it must not squeeze them. What it says there."""
    if value is None:
        return []
    low, high = axes.get_ylim()
    if low < value < high:
        axes.axhline(value, linestyle="--", color=_GREY, linewidth=1)
        text, place, side = "mean pose", value, "bottom"
    else:
        text = f"mean pose: {value:.3g}, {'above' if value >= high else 'below'}"
        place, side = (high, "top") if value >= high else (low, "bottom")
    said = axes.annotate(
        text, (0.99, place), xycoords=("axes fraction", "data"), ha="right", va=side, fontsize=8, color="#555"
    )
    axes.set_ylim(low, high)
    return [said]


def _speed_axis(axes: Axes, speeds: Sequence[float]) -> None:
    axes.margins(0.16)
    if max(speeds) > 10 * min(speeds):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel("pictures a second, one at a time (higher is better)")


def _lettering(name: str) -> str:
    """A name as a figure has room for it, and as text: matplotlib sets what stands between dollars as a formula."""
    short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}\u2026"
    return short.replace("$", r"\$")


def _legend(axes: Axes, groups: Sequence[Document], backbones: Sequence[str]) -> None:
    strategies = [name for name in STRATEGY_COLOURS if any(group["strategy"] == name for group in groups)]
    dots = [Line2D([], [], marker="o", linestyle="", color=STRATEGY_COLOURS[name], label=name) for name in strategies]
    shapes = [
        Line2D([], [], marker=_MARKERS[at % len(_MARKERS)], linestyle="", color="#bbb", markeredgecolor="#333",
               label=_lettering(name))
        for at, name in enumerate(backbones)
    ]  # fmt: skip
    entries = [*dots, *(shapes if len(backbones) > 1 else [])]
    axes.legend(handles=entries, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4)


def _label_points(
    figure: Figure, axes: Axes, named: Mapping[str, _Point], points: Sequence[_Point], said: Sequence[Annotation]
) -> None:
    """Names beside the points, each where it hides the least of what is drawn or said already, joined to its point
    where it had to go far. Points that lie on each other have one block of names, from the highest down."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]  # lays out, so that places in pixels are known
    renderer: RendererBase = canvas.get_renderer()  # type: ignore[no-untyped-call]
    px = figure.dpi / 72
    taken = [_box_of(axes, point, px) for point in points] + [text.get_window_extent(renderer) for text in said]
    frame = axes.get_window_extent(renderer)
    markers = {name: _box_of(axes, point, px) for name, point in named.items()}
    for names in _heaps(markers):
        point = named[names[0]]
        text = axes.annotate(
            "\n".join(_lettering(name) for name in names),
            (point.fps, point.value),
            fontsize=8, xytext=(0, 0), textcoords="offset points", zorder=4,
        )  # fmt: skip
        size = text.get_window_extent(renderer)
        best = min(
            _places(markers[names[0]], size.width, size.height, px),
            key=lambda place: _badness(place[0], taken, frame) + place[1],
        )[0]
        taken.append(best)
        x, y = axes.transData.transform((point.fps, point.value))
        text.set_position(((best.x0 - x) / px, (best.y0 - y) / px))
        end = (min(max(x, best.x0), best.x1), min(max(y, best.y0), best.y1))
        if np.hypot(end[0] - x, end[1] - y) > _LEADER_FROM_PT * px:
            axes.annotate(
                "", (point.fps, point.value), xytext=((end[0] - x) / px, (end[1] - y) / px),
                textcoords="offset points", zorder=2,
                arrowprops={"arrowstyle": "-", "color": _GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip


def _heaps(markers: Mapping[str, Bbox]) -> list[list[str]]:
    """Names whose markers hide each other's middles together, from the highest down; heaps from left to right."""
    heaps: list[list[str]] = []
    for name in sorted(markers, key=lambda name: (markers[name].x0, -markers[name].y0)):
        x, y = markers[name].x0 + markers[name].width / 2, markers[name].y0 + markers[name].height / 2
        near = (heap for heap in heaps if any(markers[other].contains(x, y) for other in heap))
        heap = next(near, None)
        if heap is None:
            heaps.append([name])
        else:
            heap.append(name)
    return [sorted(heap, key=lambda name: -markers[name].y0) for heap in heaps]


def _box_of(axes: Axes, point: _Point, px: float) -> Bbox:
    """Around a marker, in pixels."""
    x, y = axes.transData.transform((point.fps, point.value))
    side = point.area**0.5 * px
    return Bbox.from_bounds(x - side / 2, y - side / 2, side, side)


def _places(marker: Bbox, width: float, height: float, px: float) -> Iterator[tuple[Bbox, float]]:
    """Where a name of that size may stand round a marker, and what its distance costs."""
    x, y = (marker.x0 + marker.x1) / 2, (marker.y0 + marker.y1) / 2
    for reach in _LABEL_REACHES_PT:
        for angle in np.linspace(0, 2 * np.pi, _LABEL_DIRECTIONS, endpoint=False):
            away = marker.width / 2 + reach * px
            at_x, at_y = x + away * np.cos(angle), y + away * np.sin(angle)
            left = at_x - width * (1 - np.cos(angle)) / 2  # to the right of its place, to the left, or over it
            yield Bbox.from_bounds(left, at_y - height / 2, width, height), 2 * reach * px


def _badness(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """Pixels that would be hidden, and thrice those outside of the axes."""
    return sum(_overlap(box, other) for other in taken) + 3 * (box.width * box.height - _overlap(box, frame))


def _overlap(a: Bbox, b: Bbox) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0


def forest(pairs: Sequence[Document]) -> Figure:
    """A line a pair: the difference and both intervals; left of 0 is an error that is smaller."""
    figure, axes = _axes(height_in=1.2 + 0.3 * max(len(pairs), 3))
    for at, pair in enumerate(reversed(pairs)):
        colour = "#0072b2"
        if pair["over_seeds"] is not None and pair["over_seeds"]["low"] is not None:
            axes.plot([pair["over_seeds"]["low"], pair["over_seeds"]["high"]], [at, at], color=_GREY, linewidth=1)
        axes.plot([pair["low"], pair["high"]], [at, at], color=colour, linewidth=4, solid_capstyle="butt")
        face = colour if pair["equal_budget"] else "white"
        axes.plot(pair["difference"], at, marker="o", color=colour, markerfacecolor=face, markersize=8)
    axes.axvline(0, color="#333", linewidth=1)
    reach = 1.15 * max(max(abs(pair["low"]), abs(pair["high"]), abs(pair["difference"])) for pair in pairs)
    axes.set_xlim(-reach, reach)  # an interval over two seeds may be endless, and would hide the rest
    names = [f"{_lettering(pair['student'])} against {_lettering(pair['baseline'])}" for pair in reversed(pairs)]
    axes.set_yticks(range(len(pairs)), names, fontsize=8)
    axes.set_ylim(-0.6, len(pairs) - 0.4)
    metric = METRIC_TITLES.get(pairs[0]["metric"], pairs[0]["metric"])
    axes.set_xlabel(f"difference in {metric} on {pairs[0]['dataset']}; left of 0 the first is better")
    return figure


def learning_curves(curves: Curves, looks: Mapping[str, Look]) -> Figure:
    """Validation error by step: the mean over seeds, and the seeds' range as a band."""
    figure, axes = _axes()
    for name, seeds in curves.items():
        by_step: dict[int, list[float]] = {}
        for points in seeds.values():
            for step, value in points:
                by_step.setdefault(step, []).append(value)
        steps = sorted(by_step)
        if steps:
            axes.plot(steps, [np.mean(by_step[s]) for s in steps], label=_lettering(name), **looks[name].line_style)
            low, high = ([reduce(by_step[s]) for s in steps] for reduce in (min, max))
            axes.fill_between(steps, low, high, color=looks[name].colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel("PA-MPJPE on held-out training samples, mm")
    _legend_below(figure, axes)
    return figure


def joint_errors(by_joint: Document, looks: Mapping[str, Look]) -> Figure:
    """A line a network over the 21 joints, finger by finger."""
    figure, axes = _axes(height_in=4.4)
    for name, errors in by_joint["error_mm"].items():
        values = [np.nan if value is None else value for value in errors]
        axes.plot(values, label=_lettering(name), **looks[name].line_style)
    axes.set_xticks(range(len(by_joint["joints"])), by_joint["joints"], rotation=60, ha="right", fontsize=8)
    for border in range(0, len(by_joint["joints"]), 4):
        axes.axvline(border + 0.5, color="#ddd", linewidth=0.8, zorder=0)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"error after alignment, mm, {by_joint['dataset']}")
    _legend_below(figure, axes)
    return figure


def difficulty(parts: Sequence[Document], looks: Mapping[str, Look]) -> Figure:
    """One panel a kind of difficulty: error from the easy to the hard part, with 95% intervals of the means."""
    columns = min(2, len(parts))
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(8, 3.3 * rows + 0.4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axes, part in zip(panels, parts, strict=False):
        _plain(axes)
        names = list(part["error"])
        for at, name in enumerate(names):
            values = np.array([np.nan if v is None else v for v in part["error"][name]])
            reach = np.array([0.0 if v is None else v for v in part["reach"][name]])
            shift = (at - (len(names) - 1) / 2) * 0.05
            axes.errorbar(
                np.arange(len(values)) + shift, values, reach, capsize=2, label=_lettering(name),
                **looks[name].line_style,
            )  # fmt: skip
        spans = [f"{low:.3g}–{high:.3g}\nn={count}" for low, high, count in
                 zip(part["from"], part["to"], part["samples"], strict=True)]  # fmt: skip
        axes.set_xticks(range(len(spans)), spans, fontsize=8)
        axes.set_title(part["what"], fontsize=9)
        axes.set_ylabel(METRIC_TITLES.get(part["metric"], part["metric"]), fontsize=9)
    for axes in panels[len(parts) :]:
        axes.set_axis_off()
    _legend_below(figure, panels[0])
    return figure


def _legend_below(figure: Figure, axes: Axes) -> None:
    """Under the axes, where it hides no line."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, frameon=False, loc="outside lower center", ncols=4, handlelength=3)


@dataclass(frozen=True)
class Look:
    """How a network's line looks in every figure: colour by strategy, marker and dashes by backbone."""

    colour: str
    marker: str = "."
    line: Any = "-"

    @property
    def line_style(self) -> dict[str, Any]:
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line, "linewidth": 1.3, "markersize": 5}


def looks_of(groups: Sequence[Document]) -> dict[str, Look]:
    """A look for each student and the teacher; students of one strategy and backbone get colours of their own."""
    backbones = sorted({group["backbone"] for group in groups})
    found, spare = {"teacher": Look(TEACHER_COLOUR, "*", (0, (1, 1)))}, list(_OTHERS)
    for group in groups:
        at = backbones.index(group["backbone"])
        marker, line = _MARKERS[at % len(_MARKERS)], _DASHES[at % len(_DASHES)]
        look = Look(STRATEGY_COLOURS.get(group["strategy"], spare[0]), marker, line)
        if look in found.values():
            look = Look(spare[0], marker, line)
            spare.append(spare.pop(0))
        found[group["name"]] = look
    return found


def as_svg(figure: Figure) -> str:
    """The figure as an SVG element, the same bytes each time. Text stays text."""
    data = io.StringIO()
    settings: dict[Any, Any] = {"svg.hashsalt": "handstill", "svg.fonttype": "none"}
    with mpl.rc_context(settings):
        figure.savefig(data, format="svg", metadata={"Date": None})
    svg = data.getvalue()
    return svg[svg.index("<svg") :]


def _axes(height_in: float = 4.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, height_in), layout="constrained")
    return figure, _plain(figure.add_subplot())


def _plain(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return axes
