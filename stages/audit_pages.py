"""An audit as files: audit.json, audit.md, channels.parquet, worst.csv, features.png, disagreement.png."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.audit_document import OVERALL, Document, channel_table, offender_document
from stages.channels import DEAD_SHARE, EXPLODING_MAX, EXPLODING_STD, dead, exploding
from stages.contact_sheet import Block, contact_sheet, png
from stages.disagreement import MEASURES
from stages.moments import Moments
from stages.tally import Tally
from storage.durable import canonical_json

AUDIT_JSON, AUDIT_MD = "audit.json", "audit.md"
CHANNELS, WORST_CSV = "channels.parquet", "worst.csv"
FEATURES_PNG, DISAGREEMENT_PNG = "features.png", "disagreement.png"
AGAINST = "against"
"""The name of a cache that another is compared with."""
DRAWN = ("px", "pa_mm")
"""The measures whose worst samples are drawn."""

Tallies = Mapping[str, Tally]


def files_of(document: Document, caches: Mapping[str, tuple[Path, Tallies]]) -> dict[str, bytes]:
    """Every file of an audit by its name. caches: name -> its folder, its tallies by data set, OVERALL among them."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(channel_table({name: tallies for name, (_, tallies) in caches.items()})), sink)
    audited = {name: found for name, found in caches.items() if name != AGAINST}
    files = {
        AUDIT_JSON: canonical_json(document),
        AUDIT_MD: markdown(document).encode(),
        CHANNELS: sink.getvalue().to_pybytes(),
        WORST_CSV: worst_csv({name: tallies for name, (_, tallies) in audited.items()}).encode(),
        FEATURES_PNG: png(features_figure({f"{name} {root.name}": found for name, (root, found) in caches.items()})),
    }
    blocks = [
        Block(f"{name} {root.name}, worst {MEASURES[measure]}", root, tallies[OVERALL].worst[measure])
        for name, (root, tallies) in audited.items()
        for measure in DRAWN
        if tallies[OVERALL].worst[measure]
    ]
    return files | ({DISAGREEMENT_PNG: png(contact_sheet(blocks))} if blocks else {})


def worst_csv(caches: Mapping[str, Tallies]) -> str:
    """Of each cache, data set and measure the worst samples, the worst first."""
    text = io.StringIO()
    columns = ["cache", "dataset", "measure", "rank", "value", "sample_id", "view", *MEASURES, "shard", "row"]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    listed = [
        (cache, measure, rank, offender)
        for cache, tallies in caches.items()
        for dataset, tally in tallies.items()
        for measure, found in tally.worst.items()
        for rank, offender in enumerate(found, start=1)
        if dataset != OVERALL
    ]
    for cache, measure, rank, offender in listed:
        row = offender_document(offender) | {"cache": cache, "measure": measure, "rank": rank}
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def markdown(document: Document) -> str:
    """The tables, for a person."""
    lines = ["# Audit", ""]
    lines += [
        f"- **{finding['severity']}** {finding['cache']}/{finding['dataset']}: {finding['text']}"
        for finding in document["findings"]
    ] or ["Nothing is wrong that an audit can see."]
    for name, cache in document["caches"].items():
        lines += ["", f"## {name}: {cache['fingerprint']}", "", *_tables(cache)]
    return "\n".join(lines) + "\n"


def shown(datasets: Mapping[str, Document]) -> dict[str, Document]:
    """The data sets to show: of a single one, all together would be the same again."""
    return {name: stats for name, stats in datasets.items() if name != OVERALL or len(datasets) > 2}


def _tables(cache: Document) -> list[str]:
    stats = shown(cache["datasets"])
    first = next(iter(stats.values()))
    lines = _table(
        ["data set", "samples", "views", "channels", "std (median)", "largest", "dead", "exploding", "not finite"],
        [
            [
                name,
                s["samples"],
                s["views"],
                s["features"]["channels"],
                s["features"]["std_median"],
                s["features"]["abs_max"],
                len(s["features"]["dead"]),
                len(s["features"]["exploding"]),
                sum(s["not_finite"].values()),
            ]
            for name, s in stats.items()
        ],
    )
    lines += ["", "Outputs: mean (least to largest), views beyond the limits.", ""]
    outputs = [[name, *map(_output, s["outputs"].values())] for name, s in stats.items()]
    lines += _table(["data set", *first["outputs"]], outputs)
    lines += ["", "Teacher and labels: median / 90% / 99% / largest of the samples, each by its best view.", ""]
    lines += _table(
        ["data set", *MEASURES.values()], [[n, *map(_distances, s["disagreement"].values())] for n, s in stats.items()]
    )
    lines += ["", "Views against view 0: mean shift of the channels in deviations; median disagreement in px.", ""]
    header = ["data set", *(f"view {view}" for view in range(first["views"]))]
    lines += _table(header, [_views(name, s) for name, s in stats.items()])
    if cache["drift"]:
        lines += ["", f"Against {cache['against']}: per channel, and the joints' distance on the same views.", ""]
        header = ["data set", "Frechet / variance", "mean abs. shift", "drifted", "top channels (shift)", "same views"]
        lines += _table([*header, "px", "mm"], [_drift(n, d) for n, d in cache["drift"].items()])
    return lines


def _output(said: Document) -> str:
    if not said["views"]:
        return ""
    return f"{said['mean']:.3g} ({said['min']:.3g} to {said['max']:.3g}), {said['beyond']}"


def _distances(said: Document) -> str:
    if not said["samples"]:
        return ""
    return " / ".join(f"{value:.3g}" for value in (*said["quantiles"].values(), said["max"]))


def _views(name: str, stats: Document) -> list[str]:
    medians = stats["disagreement"]["px"]["median_by_view"]
    return [
        name,
        *(
            f"{view['mean_shift']:.3f}" + (f"; {median:.3g} px" if median is not None else "")
            for view, median in zip(stats["features"]["by_view"], medians, strict=True)
        ),
    ]


def _drift(name: str, said: Document) -> list[Any]:
    features, joints = said["features"], said["joints"]
    columns: list[Any] = [name, "", "", "", ""]
    if features is not None:
        top = ", ".join(f"{each['channel']} ({each['mean_shift']:+.2g})" for each in features["top"][:3])
        columns = [name, features["relative_frechet"], features["mean_abs_shift"], features["drifted"], top]
    means = [joints[unit]["mean"] if unit in joints else "" for unit in ("px", "mm")]
    return [*columns, said["common_views"], *means]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *cells)]


def features_figure(caches: Mapping[str, Tallies]) -> Figure:
    """Deviation and largest magnitude of every channel, sorted, a line a data set; a row of panels a cache."""
    figure = Figure(figsize=(11, 4.4 * len(caches)), layout="constrained")
    for (title, tallies), panels in zip(caches.items(), figure.subplots(len(caches), 2, squeeze=False), strict=True):
        overall = tallies[OVERALL].features.over_first()
        usual = float(np.median(overall.std))
        std_limits = {f"{EXPLODING_STD:g} medians": EXPLODING_STD * usual, "dead": DEAD_SHARE * usual}
        for name in [name for name in tallies if name != OVERALL]:
            channels = tallies[name].features.over_first()
            _line(panels[0], channels, channels.std, name)
            _line(panels[1], channels, channels.largest, name)
        _limits(panels[0], "deviation", std_limits)
        _limits(panels[1], "largest magnitude", {f"{EXPLODING_MAX:g} median deviations": EXPLODING_MAX * usual})
        panels[0].set_title(title, loc="left", fontsize=10)
        panels[0].legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def _line(axes: Axes, channels: Moments, values: np.ndarray[Any, Any], name: str) -> None:
    order = np.argsort(values, kind="stable")
    floor = 0.1 * DEAD_SHARE * float(np.median(channels.std))  # a dead channel's logarithm would be all of the picture
    heights = np.maximum(values[order], floor or 1.0)
    (line,) = axes.plot(heights, linewidth=1.3, label=name)
    for flagged, marker in ((dead(channels), "v"), (exploding(channels), "^")):
        at = np.flatnonzero(flagged[order])
        axes.plot(at, heights[at], marker, color=line.get_color(), markersize=6)


def _limits(axes: Axes, what: str, lines: Mapping[str, float]) -> None:
    axes.set_yscale("log")
    axes.set_xlabel("channels, sorted")
    axes.set_ylabel(f"{what} of the feature")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    for name, value in lines.items():
        if value > 0:
            axes.axhline(value, linestyle="--", color="grey", linewidth=1)
            where: Any = ("axes fraction", "data")
            axes.annotate(name, (0.01, value), xycoords=where, va="bottom", fontsize=8, color="grey")
