# SPDX-License-Identifier: MIT
"""One HTML page of several runs: their table, and the queries on which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import replacing
from patchnetvlad.errors import ResultsError
from patchnetvlad.evaluation.comparison import Comparison, p_text
from patchnetvlad.evaluation.comparison_files import about_comparison
from patchnetvlad.evaluation.recall import first_right
from patchnetvlad.report.images import make_pictures
from patchnetvlad.report.page import LARGE_CHUNK, SMALL_CHUNK, common_folder, picture_blocks
from patchnetvlad.report.parts import (
    DASH,
    cell,
    fill,
    json_block,
    page_head,
    row,
    section,
    small,
    table,
)
from patchnetvlad.report.results import image_locations
from patchnetvlad.report.runs import Runs

_TEMPLATE = Path(__file__).with_name("comparison.html")
_SCRIPT = Path(__file__).with_name("comparison.js")
MB = 1_000_000


def write_comparison_page(
    path: Path,
    runs: Runs,
    of: Comparison,
    *,
    title: str = "",
    max_mb: float = 50,
    progress: bool = True,
) -> Path:
    """Write one HTML file with the table of a comparison, and the queries on which runs differ.

    The file contains its pictures and loads nothing else.

    Parameters
    ----------
    path : Path
        Replaced atomically.
    runs : Runs
    of : Comparison
        Of the answers of these runs.
    title : str
        By default the names of the runs.
    max_mb : float, default 50
        Maximum size of the file in MB (10^6 bytes): pictures are reduced, then left out, to fit.
    progress : bool, default True
        Show progress bars on stderr.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ResultsError
        The page is larger than ``max_mb`` without any picture.
    OutputError
        The file cannot be written.
    """
    first = of.hits[:, :, 0]  # [M, Q]
    differ = np.flatnonzero(first.any(axis=0) & ~first.all(axis=0))
    queries, rows = _queries(runs, of, differ)
    names = [runs.query_names[q] for q in differ] + [runs.index_names[i] for i in rows]
    data: dict[str, Any] = {
        "runs": list(of.names),
        "queries": queries,
        "names": names,
        "prefix": common_folder(names) if names else "",
        "smallChunk": SMALL_CHUNK,
        "largeChunk": LARGE_CHUNK,
    }
    title = title or " / ".join(of.names)
    parts = _parts(runs, of, len(differ), title)
    script = _SCRIPT.read_text(encoding="utf-8")
    parts |= {
        "head": page_head(f"{title} \u2013 comparison of runs", script),
        "script": script,
        "prefix": f'<p class="prefix">Names are below {escape(data["prefix"])}</p>'
        if data["prefix"]
        else "",
        "data": "",
        "made": "",
    }
    least = sum(map(len, fill(_TEMPLATE.read_text(encoding="utf-8"), parts, {})))
    least += len(json_block(data))
    room = int(max_mb * MB) - least - 4000 - 32 * len(names)
    if room < 0:
        raise ResultsError(
            f"the page has {least / MB:.1f} MB without any picture; give --max_mb more than "
            f"{max_mb:g}"
        )
    pictures = make_pictures(_paths(runs, differ, rows), range(len(names)), room, progress=progress)
    more, blocks, made, notes = picture_blocks(pictures)
    parts["notes"] = _notes([*runs.notes, *notes])
    parts["made"] = escape("; ".join(made))
    block = json_block({**data, **more})
    parts["data"] = f'<script type="application/json" id="data">{block}</script>'
    with replacing(path) as file:
        for piece in fill(_TEMPLATE.read_text(encoding="utf-8"), parts, blocks):
            file.write(piece)
    return path


def _queries(
    runs: Runs, of: Comparison, differ: NDArray[np.int64]
) -> tuple[list[dict[str, Any]], list[int]]:
    """Return what the script needs of each query, and the rows of the index images it shows."""
    ranks = np.array([first_right(found, runs.positives) for found in runs.answers.values()])
    ranks = np.where(np.isfinite(ranks), ranks + 1, 0).astype(int)
    ids: dict[int, int] = {}
    queries = []
    for image, q in enumerate(differ.tolist()):
        answers = [int(found[q][0]) for found in runs.answers.values()]
        queries.append(
            {
                "image": image,
                "answers": [ids.setdefault(i, len(differ) + len(ids)) for i in answers],
                "right": of.hits[:, q, 0].astype(int).tolist(),
                "rank": ranks[:, q].tolist(),
            }
        )
    return queries, list(ids)


def _paths(runs: Runs, differ: NDArray[np.int64], rows: Sequence[int]) -> list[Path | str]:
    queries = [runs.query_names[q] for q in differ]
    index = [runs.index_names[i] for i in rows]
    pairs = zip((queries, index), runs.roots, strict=True)
    return [path for names, root in pairs for path in image_locations(names, root)]


def _parts(runs: Runs, of: Comparison, differ: int, title: str) -> dict[str, str]:
    said = "".join(f"<li>{escape(text)}</li>" for text in of.sentences())
    body = f'<ul class="sentences">{said}</ul><div class="tables">{_results(of)}</div>'
    first = of.n_values[0]
    among = "first answers" if first == 1 else f"first {first} answers"
    return {
        "title": escape(title),
        "lead": escape(
            f"{len(of.names)} runs on the same {of.num_queries:,} queries and "
            f"{len(runs.index_names):,} index images. The {among} of the runs differ in being "
            f"right for {differ:,} queries."
        ),
        "notes": _notes(runs.notes),
        "results": section("results", "Results", body),
        "differ": "Queries on which the runs differ" if differ else "The runs differ nowhere",
    }


def _results(of: Comparison) -> str:
    first = of.n_values[0]
    last = (f"Difference of R@{first}", "p", "Won", "Lost")
    head = ["Run", *(f"R@{n}" for n in of.n_values), *last]
    rows = []
    for m, name in enumerate(of.names):
        cells = ""
        for n, value, ends in zip(of.n_values, of.recalls[m], of.ends[m], strict=True):
            cells += cell(f"R@{n}", f"{100 * value:.1f}{small(ends)}")
        if m:
            found = of.differences[of.names[0], name]
            low, high = 100 * found.ends[0]
            texts = [
                f"{100 * found.values[0]:+.1f}<small>{low:+.1f} to {high:+.1f}</small>",
                p_text(found.p_values[0]),
                f"{found.won[0]:,}",
                f"{found.lost[0]:,}",
            ]
        else:
            texts = [DASH] * len(last)
        cells += "".join(map(cell, last, texts))
        rows.append(row(escape(name), cells))
    caption = f"Recall@N, %; differences to {escape(of.names[0])}"
    return table(f"{caption}<small>{escape(about_comparison(of))}</small>", head, rows)


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<aside class="notes" aria-label="What is odd"><ul>{items}</ul></aside>'
