"""The pieces of a page that stands alone: one file, no script, nothing loaded; readable on a phone and on paper."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence
from itertools import groupby

from trainer.report_tables import Rows

_CSS = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;max-width:72rem;margin:0 auto;
padding:1.5rem 1rem 4rem;
color:#1b1f24;background:#fff}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0 0;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.6rem 0 .6rem}
h3{font-size:1.05rem;margin:1.6rem 0 .4rem}
th.over{text-align:center;position:static!important;border-bottom:2px solid #d8dee4} th.over:empty{border-bottom:0}
.subtitle,figcaption,.note{color:#4a5460;font-size:.9rem} .subtitle{margin:.2rem 0 1rem}
nav{font-size:.9rem;display:flex;flex-wrap:wrap;gap:.3rem 1rem;border-block:1px solid #d8dee4;padding:.5rem 0}
a{color:#0b5cad}
.wide{overflow-x:auto;-webkit-overflow-scrolling:touch;margin:.8rem 0;
background:linear-gradient(to left,#fff 40%,#fff0) right/2.5rem 100% no-repeat local,
linear-gradient(to left,#0004,#0000) right/1rem 100% no-repeat scroll}
@media print{.wide{background:none}}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
td,th{padding:.32rem .45rem;border-bottom:1px solid #d8dee4;text-align:right;white-space:nowrap;vertical-align:top}
th{text-align:right;vertical-align:bottom;white-space:normal;min-width:3rem;color:#4a5460;font-weight:600}
td.best{font-weight:700} td.l,th.l{text-align:left} td.l:last-child{white-space:normal;min-width:11rem}
td:first-child,th:first-child{position:sticky;left:0;background:#fff;border-right:1px solid #d8dee4}
tr.apart td,tr.apart td:first-child{background:#f3f5f7}
.passed{color:#116329} .failed{color:#a40e26} .verdict{font-weight:600;font-size:1.1rem}
.warning{background:#fff6dd;border-left:4px solid #b7791f;padding:.5rem .8rem;margin:.6rem 0}
figure{margin:1.2rem 0} figure .wide>svg{display:block;width:100%;max-width:52rem;min-width:34rem;height:auto}
.case{display:grid;grid-template-columns:repeat(var(--columns),minmax(0,9.4rem));gap:.5rem;margin:.5rem 0 1.2rem}
.case figure{margin:0}
.case img{width:100%;height:auto;display:block;border-radius:3px} .case figcaption{font-size:.78rem;line-height:1.3}
.caseid{font-size:.82rem;color:#4a5460;overflow-wrap:anywhere;margin:.8rem 0 0}
img{max-width:100%} details{margin:.3rem 0} summary{cursor:pointer}
pre{background:#f3f5f7;padding:.7rem;overflow-x:auto;font-size:.8rem;margin:.3rem 0;white-space:pre-wrap;
overflow-wrap:anywhere}
@media(max-width:40rem){body{padding:1rem .8rem 3rem} td,th{padding:.3rem .5rem} .case{grid-template-columns:1fr 1fr}}
@media print{nav,summary{display:none} .wide{overflow:visible} body{max-width:none}}
"""
SECTION_NOTES = {
    "scores": "Means over seeds ± standard deviation; a metric's best student in bold. fps: pictures a second, one at "
    "a time, at the median.",
    "pairs": "On the same samples, student minus the other: below 0 mm the student is better. Over samples: bootstrap, "
    "resampled by picture, of the mean over seeds; whether these weights differ. Each interval holds alone, not all of "
    "them together.",
    "pairs-seeds": "Over seeds: Student's t of the seeds' differences; whether training again would show the same.",
    "pairs-one-seed": "Whether training again would show the same takes several seeds (train.seeds) to tell.",
    "cost": "Training only. Hours are those in which the run was at work, pauses and deaths between not counted; "
    "CPU-hours are of the process that reported, times the workers.",
    "again": "For a shell, in a clone of handstill. The caches are made again where they are not there; digests in the "
    "table tell whether they came out the same.",
}


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """sections: (anchor, heading, HTML); those without anything are left out."""
    filled = [each for each in sections if each[2]]
    links = "".join(f'<a href="#{anchor}">{html.escape(heading)}</a>' for anchor, heading, _ in filled)
    body = "".join(section(*each) for each in filled)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_CSS}</style>"
    )
    top = f"<h1>{html.escape(title)}</h1><p class=subtitle>{html.escape(subtitle)}</p><nav>{links}</nav>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{top}{body}</body></html>\n"


def section(anchor: str, heading: str, inner: str) -> str:
    """A heading that can be linked to, and what is under it."""
    return f"<section id={anchor}><h2>{html.escape(heading)}</h2>{inner}</section>"


def table_html(
    rows: Rows, *, apart: int = 0, left: int = 2, grouped: bool = False, best: Collection[tuple[int, int]] = ()
) -> str:
    """A table that scrolls sideways by itself, without its empty columns.

    apart: so many rows (the teacher's, the mean pose's) stand out; left: so many columns hold words; grouped: what
    stands before a colon in headers beside each other is set over them once; best: (row, column) of `rows` in bold.
    """
    filled = _filled(rows)
    bold = {(row, filled.index(column)) for row, column in best if column in filled}
    rows = [[row[at] for at in filled] for row in rows]

    def cell(tag: str, number: int, at: int, text: str, last: bool) -> str:
        words = at < left or (last and any(sign.isalpha() for sign in text) and " " in text)
        kind = " class=l" if words else " class=best" if (number, at) in bold else ""
        return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

    def line(tag: str, number: int, row: Sequence[str]) -> str:
        return "".join(cell(tag, number, at, text, at == len(row) - 1) for at, text in enumerate(row))

    body = "".join(
        f"<tr{' class=apart' if at <= apart and row[0] in ('teacher', 'mean pose') else ''}>{line('td', at, row)}</tr>"
        for at, row in enumerate(rows[1:], start=1)
    )
    over, header = _over(rows[0]) if grouped else ("", rows[0])
    head = f"{over}<tr>{line('th', 0, header)}</tr>"
    return f"<div class=wide><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"


def _over(header: Sequence[str]) -> tuple[str, list[str]]:
    """The row over the headers, with what they begin with, and what is left of them."""
    parts = [title.rpartition(": ")[::2] for title in header]
    groups = [(name, len(list(same))) for name, same in groupby(parts, key=lambda part: part[0])]
    cells = "".join(f"<th class=over colspan={count}>{html.escape(name)}</th>" for name, count in groups)
    return f"<tr>{cells}</tr>", [title for _, title in parts]


def _filled(rows: Rows) -> list[int]:
    """The columns that say something, and the first."""
    return [at for at in range(len(rows[0])) if at == 0 or any(row[at] for row in rows[1:])]


def figure_html(svg: str, caption: str) -> str:
    """A figure that scrolls sideways where it would be too small to read."""
    return f"<figure><div class=wide>{svg}</div><figcaption>{html.escape(caption)}</figcaption></figure>"


def paragraph(text: str) -> str:
    """A remark under a table."""
    return f"<p class=note>{html.escape(text)}</p>"


def details(summary: str, text: str) -> str:
    """Something long, for those who open it."""
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"
