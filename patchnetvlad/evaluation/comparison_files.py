# SPDX-License-Identifier: MIT
"""A comparison as a table: for the terminal, LaTeX, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from patchnetvlad.base.files import replace_text
from patchnetvlad.base.text import table_cell
from patchnetvlad.evaluation.comparison import Comparison, p_text

CSV_FILE, MARKDOWN_FILE, LATEX_FILE = "comparison.csv", "comparison.md", "comparison.tex"
QUERIES_FILE = "queries.csv"

_MARKS, _ESCAPED = re.compile(r"([\\|`*_<])"), r"\\\1"  # of Markdown
_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL |= {letter: rf"\{letter}" for letter in "&%$#_{}"}


def comparison_table(of: Comparison) -> list[list[str]]:
    """Return the table of a comparison, in per cent.

    Parameters
    ----------
    of : Comparison

    Returns
    -------
    list of rows of cells
        The first row is the head. Each run has recall@N with its interval, and at the first N the
        difference to the first run with its interval, the p-value, and the queries won and lost.
    """
    first = of.n_values[0]
    head = ["run", *(f"R@{n}" for n in of.n_values), f"R@{first} vs first", "p", "won", "lost"]
    rows = [head]
    for m, name in enumerate(of.names):
        cells = [
            f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            for value, (low, high) in zip(of.recalls[m], of.ends[m], strict=True)
        ]
        if m == 0:
            rows.append([name, *cells, "", "", "", ""])
            continue
        found = of.differences[of.names[0], name]
        low, high = found.ends[0]
        cells.append(f"{100 * found.values[0]:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
        cells += [p_text(found.p_values[0]), str(found.won[0]), str(found.lost[0])]
        rows.append([name, *cells])
    return rows


def about_comparison(of: Comparison) -> str:
    """Say in one sentence what the numbers of the table are."""
    return (
        f"{of.num_queries} queries; recall@N in %, with 95 % intervals by bootstrap over "
        f"{of.drawn}, differences on paired draws; p of McNemar's exact test, which takes queries "
        "as independent."
    )


def write_comparison(folder: Path, of: Comparison) -> list[Path]:
    """Write the table as CSV, Markdown and LaTeX.

    Parameters
    ----------
    folder : Path
        Must exist; files in it are replaced.
    of : Comparison

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    OutputError
        A file cannot be written.
    """
    written = []
    for name, lines in (
        (CSV_FILE, _csv(_numbers(of))),
        (MARKDOWN_FILE, _markdown(of)),
        (LATEX_FILE, _latex(of)),
    ):
        replace_text(folder / name, lines)
        written.append(folder / name)
    return written


def write_queries(
    path: Path, of: Comparison, query_names: Sequence[str], answers: Sequence[Sequence[str]]
) -> None:
    """Write how each run answers each query, as CSV.

    Parameters
    ----------
    path : Path
        Replaced as a whole.
    of : Comparison
    query_names : sequence of Q str
    answers : sequence of M sequences of Q str
        Names of the first answers of each run.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    head = ["query", *(f"{name}: {what}" for name in of.names for what in ("answer", "right"))]
    rows: list[list[object]] = [list(map(table_cell, head))]
    for q, name in enumerate(query_names):
        row: list[object] = [table_cell(name)]
        for m in range(len(of.names)):
            row += [table_cell(answers[m][q]), int(of.hits[m, q, 0])]
        rows.append(row)
    replace_text(path, _csv(rows))


def _numbers(of: Comparison) -> Iterable[Sequence[object]]:
    """Yield the rows of the CSV, in which each number has a column, as a share."""
    recalls = (f"recall@{n}{end}" for n in of.n_values for end in ("", "_low", "_high"))
    last = (
        f"{what}@{n}"
        for n in of.n_values
        for what in ("difference", "difference_low", "difference_high", "p", "won", "lost")
    )
    yield ["run", "queries", *recalls, *last]
    for m, name in enumerate(of.names):
        row: list[object] = [table_cell(name), of.num_queries]
        for value, ends in zip(of.recalls[m], of.ends[m], strict=True):
            row += [f"{x:.6g}" for x in (value, *ends)]
        if m:
            found = of.differences[of.names[0], name]
            for i in range(len(of.n_values)):
                numbers = (found.values[i], *found.ends[i], found.p_values[i])
                row += [*(f"{x:.6g}" for x in numbers), int(found.won[i]), int(found.lost[i])]
        else:
            row += [""] * 6 * len(of.n_values)
        yield row


def _csv(rows: Iterable[Sequence[object]]) -> list[str]:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return [text.getvalue()]


def _markdown(of: Comparison) -> list[str]:
    head, *rows = comparison_table(of)

    def line(cells: Sequence[str]) -> str:
        shown = (_MARKS.sub(_ESCAPED, " ".join(cell.split())) for cell in cells)
        return f"| {' | '.join(shown)} |\n"

    rule = f"|---|{'---:|' * (len(head) - 1)}\n"
    sentences = (f"- {_MARKS.sub(_ESCAPED, text)}\n" for text in of.sentences())
    return [line(head), rule, *map(line, rows), f"\n{about_comparison(of)}\n\n", *sentences]


def _latex(of: Comparison) -> list[str]:
    head, *rows = comparison_table(of)
    lines = [
        *(f"% {' '.join(text.split())}\n" for text in (about_comparison(of), *of.sentences())),
        f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\hline\n",
        f"{' & '.join(map(_tex, head))} \\\\\n\\hline\n",
        *(f"{' & '.join(map(_tex, row))} \\\\\n" for row in rows),
        "\\hline\n\\end{tabular}\n",
    ]
    return lines


def _tex(cell: str) -> str:
    """Return a cell in LaTeX: special characters escaped, intervals small, signs as signs."""
    text = "".join(_SPECIAL.get(letter, letter) for letter in " ".join(cell.split()))
    text = re.sub(r"(?<![\w.])([+-]\d+\.\d)", r"$\1$", text)
    text = re.sub(r"^(\d)e-0*(\d+)$", r"$\1\\cdot10^{-\2}$", text)
    return re.sub(r" \[(.*)\]$", r" {\\scriptsize [\1]}", text)
