"""From tallies to the audit's document, and to findings: what makes a cache unfit to train on, and what to look at.

Keys of the document are described in docs/format.md, section "An audit".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from stages.channels import channel_summary, drift
from stages.disagreement import MEASURES, Offender
from stages.moments import Distances, Moments
from stages.plausibility import QUANTITIES
from stages.tally import Tally, merge

QUANTILES = (0.5, 0.9, 0.99)
OVERALL = "overall"
"""The name under which all data sets of a cache stand together."""

Document = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One thing that an audit says aloud."""

    severity: Literal["unfit", "look"]
    cache: str
    dataset: str
    what: str
    text: str


def with_overall(tallies: Mapping[str, Tally]) -> dict[str, Tally]:
    """The data sets' tallies, and all of them together."""
    return {**tallies, OVERALL: merge(list(tallies.values()))}


def statistics(tally: Tally) -> Document:
    """What the document says of a data set."""
    counts = tally.counts
    views = int(tally.quantities["camera_scale"].count.shape[0])
    return {
        "samples": counts["samples"],
        "views": views,
        "features": channel_summary(tally.features) | {"int8": _int8(counts)},
        "outputs": {name: _quantity(name, tally) for name in QUANTITIES},
        "not_finite": {
            name.removeprefix("not finite "): count
            for name, count in sorted(counts.items())
            if name.startswith("not finite ")
        },
        "disagreement": {name: _disagreement(tally.distances[name]) for name in MEASURES},
    }


def _int8(counts: Mapping[str, int]) -> dict[str, float] | None:
    """How int8 uses its range; None where features are not int8."""
    if not counts.get("tokens"):
        return None
    return {
        "zero_scale_tokens": counts.get("zero_scale", 0),
        "at_limit_a_token": counts.get("at_limit", 0) / counts["tokens"],
        "zeros_share": counts.get("zeros", 0) / counts["values"],
    }


def _quantity(name: str, tally: Tally) -> Document:
    by_view, limits = tally.quantities[name], QUANTITIES[name]
    views, found = len(by_view.count), by_view.over_first()
    seen = int(found.count)
    return {
        "unit": limits.unit,
        "limits": [limits.low, limits.high],
        "mean": float(found.mean) if seen else None,
        "std": float(found.std) if seen else None,
        "min": float(found.low) if seen else None,
        "max": float(found.high) if seen else None,
        "views": seen,
        "beyond": tally.counts[f"beyond {name}"],
        "mean_by_view": [float(view.mean) if view.count else None for view in map(by_view.__getitem__, range(views))],
    }


def _disagreement(distances: Distances) -> Document:
    """Of samples, each by its best view; and the median of every view."""
    count = int(distances.count[-1])
    return {
        "samples": count,
        "mean": float(distances.total[-1] / count) if count else None,
        "quantiles": {f"{share:g}": number_or_none(distances.quantile(share)[-1]) for share in QUANTILES},
        "max": float(distances.high[-1]) if count else None,
        "median_by_view": [number_or_none(value) for value in distances.quantile(0.5)[:-1]],
    }


def number_or_none(value: float) -> float | None:
    """For JSON, which knows no NaN."""
    return float(value) if math.isfinite(value) else None


def offender_document(offender: Offender) -> Document:
    """One of the worst samples, with its value by every measure in the view that is shown."""
    fields = asdict(offender)
    values = fields.pop("values")
    return {**fields, **{name: number_or_none(value) for name, value in values.items()}}


def drifts(before: Mapping[str, Tally], after: Mapping[str, Tally]) -> Document:
    """By data set what changed from one cache to another; of no common data set, all together."""
    names = [name for name in before if name in after and name != OVERALL] or [OVERALL]
    return {
        name: drift(before[name].features.over_first(), after[name].features.over_first(), before[name].common)
        for name in names
    }


def findings(cache: str, stats: Mapping[str, Document], drifted: Mapping[str, Document] | None = None) -> list[Finding]:
    """What to say aloud of one cache, the worst first."""
    found = [
        Finding(severity, cache, dataset, what, text)
        for dataset, document in stats.items()
        if dataset != OVERALL
        for severity, what, text in (*_of_values(document), *_of_outputs(document), *_of_features(document))
    ]
    found += [Finding("look", cache, name, "drift", text) for name, text in _of_drift(drifted or {})]
    return sorted(found, key=lambda finding: finding.severity != "unfit")


_Said = tuple[Literal["unfit", "look"], str, str]


def _of_values(document: Document) -> Iterator[_Said]:
    for array, count in document["not_finite"].items():
        yield "unfit", "not finite", f"{count:,} values of {array} are NaN or infinite"


def _of_outputs(document: Document) -> Iterator[_Said]:
    for name, said in document["outputs"].items():
        limits = QUANTITIES[name]
        if not said["beyond"]:
            continue
        share = said["beyond"] / said["views"]
        text = (
            f"{name} of {said['beyond']:,} of {said['views']:,} views is outside {limits.low:g} to {limits.high:g} "
            f"{limits.unit} (found {said['min']:.3g} to {said['max']:.3g}): {limits.about}"
        )
        yield "unfit" if share > limits.allowed_share else "look", name, text


def _of_features(document: Document) -> Iterator[_Said]:
    features = document["features"]
    dead, exploding, channels = len(features["dead"]), features["exploding"], features["channels"]
    if dead:
        text = f"{dead} of {channels} channels are dead (the same everywhere)"
        yield "unfit" if 2 * dead > channels else "look", "dead channels", text
    if exploding:
        names = ", ".join(map(str, exploding[:5])) + (", ..." if len(exploding) > 5 else "")
        yield "look", "exploding channels", f"{len(exploding)} of {channels} channels are exploding ({names})"
    if features["int8"] and features["int8"]["zero_scale_tokens"]:
        yield "look", "empty tokens", f"{features['int8']['zero_scale_tokens']:,} int8 tokens are zero in all channels"


def _of_drift(drifted: Mapping[str, Document]) -> Iterator[tuple[str, str]]:
    for name, said in drifted.items():
        features = said["features"]
        if features is None:
            yield name, "the features of the two caches have different numbers of channels and were not compared"
        elif features["drifted"]:
            top = features["top"][0]
            yield (
                name,
                f"{features['drifted']} channels drifted; most of all {top['channel']}, by {top['mean_shift']:+.2f} "
                f"deviations (all channels: Frechet distance {features['relative_frechet']:.3g} of their variance)",
            )


def channel_table(caches: Mapping[str, Mapping[str, Tally]]) -> dict[str, list[Any]]:
    """Columns of channels.parquet: a row for each channel of each data set of each cache."""
    names = ("cache", "dataset", "channel", "values", "mean", "std", "min", "max", "abs_max")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for cache, tallies in caches.items():
        for dataset, tally in tallies.items():
            channels: Moments = tally.features.over_first()
            size = len(channels.mean)
            for name, values in zip(
                names,
                (
                    [cache] * size,
                    [dataset] * size,
                    list(range(size)),
                    channels.count.tolist(),
                    channels.mean.tolist(),
                    channels.std.tolist(),
                    channels.low.tolist(),
                    channels.high.tolist(),
                    channels.largest.tolist(),
                ),
                strict=True,
            ):
                columns[name] += values
    return columns
