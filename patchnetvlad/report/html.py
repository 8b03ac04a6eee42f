# SPDX-License-Identifier: MIT
"""The HTML of a report: static content, and data for its script.

Every text from outside is escaped here: for HTML by :func:`html.escape`, for blocks of JSON by
:func:`json_block`. The script makes elements and never HTML. A content security policy lets only
that script run, and lets nothing be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.evaluation.calibration import Calibration
from patchnetvlad.evaluation.per_query import Intervals
from patchnetvlad.evaluation.usual import Spread, Usual
from patchnetvlad.pipeline.record import Selection
from patchnetvlad.report.parts import (
    DASH,
    Interval,
    cell,
    fill,
    json_block,
    page_head,
    percent,
    row,
    section,
    small,
    table,
)

_TEMPLATE = Path(__file__).with_name("template.html")
_SCRIPT = Path(__file__).with_name("template.js")

NAMES = {"NetVLAD": "NetVLAD", "PatchNetVLAD": "Patch-NetVLAD", "Sequence": "Sequence"}
_Z = 1.959963984540054  # of a normal distribution, 95 % of which lies within +-z
_WIDTH, _HEIGHT = 420, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 42
_MOST_POINTS = 500
_TICKS = [(_LEFT + v / 100 * (_WIDTH - _LEFT - _RIGHT), str(v)) for v in range(0, 101, 20)]  # of x
_FEW = 3  # pairs, of which a spread says nothing


@dataclass(frozen=True, eq=False)
class PageContent:
    """Content of a page.

    Attributes
    ----------
    title : str
    data : dict
        For the script; JSON's types.
    blocks : dict of str to str
        More data, by the id of its element: JSON text from :func:`json_block`, which the script
        reads when it is needed.
    image_names : list of str
        Of the images that are shown, queries first.
    num_queries : int
    num_index : int or None
    k : int
        Candidates per query.
    counts : dict of str to int
        Queries by the letter of their status.
    changed_by : str
        What orders candidates after retrieval, to begin a sentence; empty without.
    has_truth : bool
    within : str
        What is right.
    usual : tuple of Usual
        How right and wrong pairs score, in this run or else on other data.
    patches : dict of int to int
        Patches of a query by their size.
    recalls : dict of str to list of (N, recall, interval, interval)
        By method; with the 95 % intervals of the bootstrap, which may be None, and of Wilson.
    intervals : dict of str to Intervals
        Of the bootstrap, by method.
    recall_curves : dict of str to ndarray [k]
        Recall@N from N = 1.
    precision_recall : dict of str to dict
        As in ``metrics.json``.
    calibrations : dict of str to Calibration
        Of confidences, by method.
    selection : Selection or None
        Of ``rerank = auto``.
    citation : str
    provenance : list of (str, str)
    notes : list of str
        What is missing or was left out.
    made : list of str
        How the pictures were made.
    """

    title: str
    data: dict[str, Any]
    blocks: dict[str, str]
    image_names: list[str]
    num_queries: int
    num_index: int | None
    k: int
    counts: dict[str, int]
    changed_by: str
    within: str
    usual: tuple[Usual, ...]
    patches: dict[int, int]
    has_truth: bool
    recalls: dict[str, list[tuple[int, float, Interval | None, Interval]]]
    intervals: dict[str, Intervals]
    recall_curves: dict[str, NDArray[np.float64]]
    precision_recall: dict[str, dict[str, Any]]
    calibrations: dict[str, Calibration]
    selection: Selection | None
    citation: str
    provenance: list[tuple[str, str]]
    notes: list[str]
    made: list[str]


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's method, for independent trials.

    Parameters
    ----------
    right, total : int
        ``right`` of ``total`` trials; ``total`` may be 0.

    Returns
    -------
    low, high : float
        Between 0 and 1.
    """
    if total == 0:
        return 0.0, 1.0
    share, square = right / total, _Z * _Z / total
    middle = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / total + square / (4 * total)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def render(page: PageContent) -> Iterator[bytes]:
    """Yield the bytes of the page in pieces."""
    script = _SCRIPT.read_text(encoding="utf-8")
    usual = section("usual", "What scores mean", _usual(page))
    parts = {
        "head": page_head(f"{page.title} \u2013 place recognition report", script),
        "title": escape(page.title),
        "queries": "Queries" if page.has_truth else "Answers",
        "lead": _lead(page),
        "notes": _notes(page),
        "recall": section("summary", "Recall", _recalls(page) + _charts(page)),
        # Without ground truth the page begins with answers.
        "usual_above": usual if page.has_truth else "",
        "usual_below": "" if page.has_truth else usual,
        "prefix": _prefix(page),
        "provenance": _provenance(page),
        "made": escape("; ".join(page.made)),
        "data": f'<script type="application/json" id="data">{json_block(page.data)}</script>',
        "script": script,
    }
    yield from fill(_TEMPLATE.read_text(encoding="utf-8"), parts, page.blocks)


def _lead(page: PageContent) -> str:
    index = "" if page.num_index is None else f" among {page.num_index:,} index images"
    lines = [
        f"{page.num_queries:,} queries{index}, the best {page.k} candidates of each."
        if page.k > 1
        else f"{page.num_queries:,} queries{index}, the best candidate of each."
    ]
    counts = page.counts
    if page.has_truth:
        right = counts.get("r", 0) + counts.get("s", 0)
        lines.append(
            f"The first answer is right for <strong>{right:,}</strong> "
            f"({percent(right / page.num_queries)})."
        )
        if page.changed_by:
            lines.append(
                f"{page.changed_by} rescued <strong>{counts.get('s', 0):,}</strong> and hurt "
                f"<strong>{counts.get('h', 0):,}</strong>."
            )
        if counts.get("n"):
            lines.append(f"{counts['n']:,} have no right answer in the index and count as missed.")
        lines.append(
            f"Right is what lies {page.within}."
            if page.within
            else "Right is what the ground truth names."
        )
    else:
        lines.append(
            "There is no ground truth, so right and wrong are not known: look at the answers."
        )
        if page.changed_by:
            lines.append(
                f"{page.changed_by} changed the first answer of "
                f"<strong>{counts.get('c', 0):,}</strong>."
            )
    if page.selection is not None:
        of = page.selection
        lines.append(
            f"{of.reranked:,} of {of.queries:,} queries were re-ranked; the others are sure at "
            f"{percent(of.sure)} by retrieval alone."
        )
    text = f'<p class="lead">{" ".join(lines)}</p>'
    if page.citation:
        text += f'<p class="citation">{escape(page.citation)}</p>'
    return text


def _notes(page: PageContent) -> str:
    if not page.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in page.notes)
    return f'<aside class="notes" aria-label="What is missing"><ul>{items}</ul></aside>'


def _recalls(page: PageContent) -> str:
    if not page.recalls:
        return ""
    numbers = sorted({n for of in page.recalls.values() for n, *_ in of})
    rows = []
    for method, of in page.recalls.items():
        by_n = {row[0]: row for row in of}
        cells = ""
        for n in numbers:
            if n not in by_n:
                cells += cell(f"R@{n}", DASH)
                continue
            _, value, drawn, wilson = by_n[n]
            cells += cell(f"R@{n}", f"{100 * value:.1f}{small(drawn)}{small(wilson)}")
        rows.append(row(_method(method), cells))
    what = next((of.drawn for of in page.intervals.values()), "")
    what = what and f"by bootstrap over {escape(what)}; below these, "
    text = table(
        f"Recall@N over all queries, %<small>95 % intervals {what}by Wilson, which take queries "
        "as independent, as frames of one drive are not</small>",
        ["Method", *(f"R@{n}" for n in numbers)],
        rows,
    )
    if page.precision_recall:
        text += _thresholds(page)
    if page.calibrations:
        text += _confidences(page)
    return f'<div class="tables">{text}</div>'


def _thresholds(page: PageContent) -> str:
    curves = page.precision_recall
    rows = []
    columns = ("Average precision", "Recall at 100 % precision", "Best F1", "at score")
    for method, curve in curves.items():
        best = curve.get("best") or {}
        known = page.intervals.get(method)
        area = None if known is None else known.areas.get("average_precision")
        values = (
            _number(curve.get("average_precision"), True) + small(area),
            _number(curve.get("recall_at_full_precision"), True),
            _number(best.get("f1"), True),
            _number(best.get("threshold"), False),
        )
        rows.append(row(_method(method), "".join(map(cell, columns, values))))
    return table(
        "First answers, accepted by their score, %<small>precision: of the accepted; recall: of "
        "the queries that have an answer</small>",
        ["Method", *columns],
        rows,
    )


def _confidences(page: PageContent) -> str:
    columns = ("ECE", "AURC", "Recall at 100 % precision")
    rows = []
    for method, of in page.calibrations.items():
        values = of.expected_error, of.aurc, of.recall_at_full_precision
        cells = (
            cell(name, _number(value, True)) for name, value in zip(columns, values, strict=True)
        )
        rows.append(row(_method(method), "".join(cells)))
    return table(
        "Confidence of first answers, %<small>ECE: how far it is from the share of right answers; "
        "AURC: wrong ones among the surest, averaged over how many are answered</small>",
        ["Method", *columns],
        rows,
    )


def _usual(page: PageContent) -> str:
    """Say how right and wrong pairs score."""
    if not page.usual:
        return ""
    columns = ["Score", *(f"Size {size}, of {n:,}" for size, n in page.patches.items())]
    rows = []
    for usual in page.usual:
        for name, spread in (
            ("Right first answers", usual.right),
            ("Wrong first answers", usual.wrong),
            ("First wrong candidates", usual.best_wrong),
        ):
            if spread is not None:
                where = f"<small>on {escape(usual.source)}</small>" if usual.source else ""
                named = f"{name} ({spread.pairs:,}){where}"
                rows.append(row(named, _spread_cells(spread, columns)))
    where = "this run." if not page.usual[0].source else "other data with the same weights."
    agree = " Sizes: patches of the query that agree." if page.patches else ""
    caption = (
        f"Scores of Patch-NetVLAD, and how many patches agree<small>Measured on {where}{agree} "
        "Median, and the middle 80 %. The first wrong candidate of each query is what would be "
        "answered if its place were not in the index: choose a threshold above most of these "
        "scores.</small>"
    )
    return f'<div class="tables">{table(caption, ["Pairs (how many)", *columns], rows)}</div>'


def _spread_cells(spread: Spread, columns: Sequence[str]) -> str:
    few = spread.pairs < _FEW
    cells = cell(columns[0], _spread(spread.score, ".3f", few))
    for column, quantiles in zip(columns[1:], spread.patches, strict=False):
        cells += cell(column, _spread(quantiles, ",.0f", few))
    return cells


def _spread(quantiles: Sequence[float], form: str, few: bool) -> str:
    low, middle, high = (format(value, form) for value in quantiles)
    return middle if few else f"{middle}<small>{low}{DASH}{high}</small>"


def _method(name: str) -> str:
    """Return a method's name beside its colour."""
    shown = NAMES.get(name, name)
    swatch = f'<i class="swatch {_series(name)}"></i>' if name in NAMES else ""
    return f"{swatch}{escape(shown)}"


def _number(value: Any, percent: bool) -> str:
    if not isinstance(value, (int, float)):
        return DASH
    return f"{100 * value:.1f}" if percent else f"{value:.4g}"


# Curves ----------------------------------------------------------------------------------------


def _charts(page: PageContent) -> str:
    charts = ""
    if page.recall_curves:
        charts += _recall_chart(page)
    if page.precision_recall:
        charts += _precision_recall_chart(page.precision_recall, page.intervals)
    if page.calibrations:
        charts += _risk_chart(page.calibrations) + _reliability_chart(page.calibrations)
    return f'<div class="charts">{charts}</div>' if charts else ""


def _along(share: float) -> float:
    """Return the x of a share, on an axis from 0 to 1."""
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _risk_chart(calibrations: Mapping[str, Calibration]) -> str:
    highest = max(float(of.risk[1].max()) for of in calibrations.values())
    top = next(value for value in (0.1, 0.2, 0.5, 1.0) if highest <= value)

    def y(risk: float) -> float:
        return _HEIGHT - _BOTTOM - risk / top * (_HEIGHT - _BOTTOM - _TOP)

    body, said = "", []
    for method, of in calibrations.items():
        points = [(_along(share), y(risk)) for share, risk in of.risk.T.tolist()]
        keep = np.unique(
            np.linspace(0, len(points) - 1, min(len(points), _MOST_POINTS)).astype(int)
        )
        drawn = [(_along(0), points[0][1]), *(points[i] for i in keep)]
        body += f'<path class="line {_series(method)}" d="{_line(drawn)}"/>'
        said.append(
            f"{NAMES.get(method, method)}: {percent(float(of.risk[1, -1]))} of all are wrong"
        )
    sides = [(y(top * i / 5), f"{100 * top * i / 5:.0f}") for i in range(6)]
    axes = _axes(_TICKS, sides, "Answered, surest first, %", "Wrong of these, %")
    description = f"Share of wrong answers over the share that is answered. {'; '.join(said)}."
    return _figure("risk", "Risk and coverage", description, axes + body, list(calibrations))


def _reliability_chart(calibrations: Mapping[str, Calibration]) -> str:
    y, sides = _shares(0.0)
    body = f'<path class="grid" d="{_line([(_along(0), y(0)), (_along(1), y(1))])}"/>'
    for method, of in calibrations.items():
        style = _series(method)
        points = [(_along(sure), y(right)) for sure, right, _ in of.bins.T.tolist()]
        body += f'<path class="line {style}" d="{_line(points)}"/>'
        for (px, py), (sure, right, count) in zip(points, of.bins.T.tolist(), strict=True):
            body += (
                f'<circle class="dot {style}" cx="{px:.1f}" cy="{py:.1f}" r="3.5"><title>'
                f"{escape(NAMES.get(method, method))}: {percent(right)} of {count:.0f} answers, "
                f"with a mean confidence of {percent(sure)}, are right</title></circle>"
            )
    axes = _axes(_TICKS, sides, "Confidence, %", "Right, %")
    description = "Share of right answers over confidence, in ten bins; the diagonal is ideal."
    return _figure("reliability", "Reliability", description, axes + body, list(calibrations))


def _recall_chart(page: PageContent) -> str:
    k = page.k
    lowest = [float(of.min()) for of in page.recall_curves.values()]
    lowest += [ends[0] for of in page.recalls.values() for _, _, ends, _ in of if ends is not None]
    y, sides = _shares(min(lowest))

    def x(n: float) -> float:
        share = math.log(n) / math.log(k) if k > 1 else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    body = ""
    for method, rows in page.recalls.items():
        known = [(n, ends) for n, _, ends, _ in rows if ends is not None and n <= k]
        low, high = ([y(ends[i]) for _, ends in known] for i in (0, 1))
        body += _band(method, [x(n) for n, _ in known], low, high)
    said = []
    marks = sorted({n for of in page.recalls.values() for n, *_ in of if n <= k})
    for method, values in page.recall_curves.items():
        points = [(x(n), y(value)) for n, value in enumerate(values.tolist(), start=1)]
        style = _series(method)
        body += f'<path class="line {style}" d="{_line(points)}"/>'
        for n in marks:
            value = float(values[n - 1])
            body += (
                f'<circle class="dot {style}" cx="{x(n):.1f}" cy="{y(value):.1f}" r="3.5">'
                f"<title>{escape(NAMES.get(method, method))}: recall@{n} {percent(value)}"
                "</title></circle>"
            )
        said.append(
            f"{NAMES.get(method, method)}: "
            + ", ".join(f"{percent(float(values[n - 1]))} at {n}" for n in marks)
        )
    ticks = [(x(n), str(n)) for n in _apart([1, *marks], x)]
    axes = _axes(ticks, sides, "N", "Recall@N, %")
    description = f"Recall over the number N of candidates. {'; '.join(said)}."
    return _figure("recall", "Recall@N", description, axes + body, list(page.recall_curves))


def _precision_recall_chart(
    curves: Mapping[str, Mapping[str, Any]], intervals: Mapping[str, Intervals]
) -> str:
    lines = {}
    for method, curve in curves.items():
        points = curve.get("curve", {})
        pairs = list(zip(points.get("recall", []), points.get("precision", []), strict=False))
        lines[method] = [(float(r), float(p)) for r, p in pairs]
    lines = {method: pairs for method, pairs in lines.items() if pairs}
    if not lines:
        return ""
    bands: dict[str, NDArray[np.float64]] = {}
    for method in lines:
        found = intervals[method].band if method in intervals else None
        if found is not None and found.size:
            bands[method] = found
    lowest = [p for of in lines.values() for _, p in of]
    y, sides = _shares(min(lowest + [float(band[1].min()) for band in bands.values()]))

    x = _along
    body = "".join(
        _band(method, [x(r) for r in recalls], [y(v) for v in low], [y(v) for v in high])
        for method, (recalls, low, high) in bands.items()
    )
    said = []
    for method, pairs in lines.items():
        keep = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), _MOST_POINTS)).astype(int))
        points = [(x(pairs[i][0]), y(pairs[i][1])) for i in keep]
        if len(points) == 1:
            points = [(x(0), points[0][1]), *points]
        style = _series(method)
        body += f'<path class="line {style}" d="{_line(points)}"/>'
        best = curves[method].get("best") or {}
        if isinstance(best.get("f1"), float):
            where = f'cx="{x(best["recall"]):.1f}" cy="{y(best["precision"]):.1f}"'
            said.append(
                f"{NAMES.get(method, method)}: best F1 {percent(best['f1'])} at precision "
                f"{percent(best['precision'])} and recall {percent(best['recall'])}"
            )
            body += f'<circle class="dot {style}" {where} r="4"><title>{said[-1]}</title></circle>'
    axes = _axes(_TICKS, sides, "Recall, %", "Precision, %")
    description = (
        "Precision over recall as the score from which first answers are accepted falls. "
        + "; ".join(said)
    )
    title = "Precision and recall"
    more = '<span class="key"><i></i>best F1</span>'
    return _figure("precision-recall", title, description, axes + body, list(lines), more)


def _series(method: str) -> str:
    return {"PatchNetVLAD": "after", "Sequence": "sequence"}.get(method, "before")


def _shares(lowest: float) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Return the y of a share, on an axis from somewhat below the lowest to 1, and its ticks."""
    bottom = max(0.0, math.floor(lowest * 10 - 0.5) / 10)

    def y(value: float) -> float:
        share = (value - bottom) / (1 - bottom)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    step = 0.2 if bottom < 0.5 else (0.1 if bottom < 0.8 else 0.05)
    first = math.ceil(bottom / step - 1e-9)
    steps = [i * step for i in range(first, round(1 / step) + 1)]
    return y, [(y(v), f"{100 * v:.0f}") for v in steps]


def _apart(numbers: Sequence[int], x: Any) -> list[int]:
    """Leave out numbers whose labels would touch."""
    kept: list[int] = []
    for n in dict.fromkeys(numbers):
        if not kept or x(n) - x(kept[-1]) > 26:
            kept.append(n)
    return kept


def _band(method: str, x: Sequence[float], low: Sequence[float], high: Sequence[float]) -> str:
    """Draw a 95 % interval along a curve; nothing where it is known at fewer than two points."""
    if len(x) < 2:
        return ""
    there = list(zip(x, high, strict=True))
    back = list(zip(x, low, strict=True))[::-1]
    return f'<path class="band {_series(method)}" d="{_line([*there, *back])}Z"/>'


def _line(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)


def _axes(
    ticks: Sequence[tuple[float, str]],
    sides: Sequence[tuple[float, str]],
    below: str,
    beside: str,
) -> str:
    floor = _HEIGHT - _BOTTOM
    text = ""
    for py, label in sides:
        text += (
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>'
            f'<text x="{_LEFT - 7}" y="{py + 4:.1f}" text-anchor="end">{label}</text>'
        )
    text += f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>'
    for px, label in ticks:
        text += (
            f'<line class="axis" x1="{px:.1f}" x2="{px:.1f}" y1="{floor}" y2="{floor + 4}"/>'
            f'<text x="{px:.1f}" y="{floor + 17}" text-anchor="middle">{label}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    centre = (_TOP + floor) / 2
    return (
        f'{text}<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{below}</text>'
        f'<text transform="translate(12 {centre}) rotate(-90)" text-anchor="middle">{beside}</text>'
    )


def _figure(
    name: str, title: str, description: str, body: str, methods: Sequence[str], more: str = ""
) -> str:
    keys = "".join(
        f'<span class="key"><svg class="swatch" viewBox="0 0 28 8" aria-hidden="true">'
        f'<path class="line {_series(method)}" d="M0 4H28"/></svg>'
        f"{escape(NAMES.get(method, method))}</span>"
        for method in methods
    )
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3><span>{keys}{more}</span>'
        f'</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-labelledby="{name}-title {name}-text"><title id="{name}-title">{escape(title)}'
        f'</title><desc id="{name}-text">{escape(description)}</desc>{body}</svg></figure>'
    )


def _prefix(page: PageContent) -> str:
    prefix = page.data["prefix"]
    return f'<p class="prefix">Names are below {escape(prefix)}</p>' if prefix else ""


def _provenance(page: PageContent) -> str:
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>"
        for name, text in page.provenance
    )
    return f"<dl>{rows}</dl>"
