# SPDX-License-Identifier: MIT
"""Tables that commands print after a run: the first answers, and recalls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchnetvlad.base.text import shortened

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from patchnetvlad.pipeline.record import RunRecord

SHOWN = 10
"""Queries whose answers are printed."""


def answer_lines(
    record: RunRecord, positives: Sequence[NDArray[np.int64]] | None = None
) -> list[str]:
    """Return a table of the first answers: names, scores, and what supports them.

    Parameters
    ----------
    record : RunRecord
    positives : sequence of Q ndarray of int, optional
        Rows of the right index images of each query.

    Returns
    -------
    list of str
    """
    from patchnetvlad.pipeline.record import agreeing_patches

    final, scores = record.final, record.scores.get(record.method)
    patches = agreeing_patches(record)
    sure = record.confidences.get("NetVLAD" if record.reranked is None else "PatchNetVLAD")
    head = ["query", "best answer", *(["score"] if scores is not None else [])]
    head += ["confidence"] if sure is not None else []
    if patches is not None:
        sizes = ", ".join(map(str, patches.sizes))
        head.append(f"patches that agree, by size {sizes} (of {_list(patches.totals)})")
    if positives is not None:
        head.append("")
    table = [head]
    for q, name in enumerate(record.query_names[:SHOWN]):
        row = [shortened(name), shortened(record.index_names[final[q, 0]])]
        row += [f"{scores[q, 0]:.4g}"] if scores is not None else []
        row += [f"{100 * sure[q]:.0f} %"] if sure is not None else []
        row += [_list(patches.best[q])] if patches is not None else []
        if positives is not None:
            none = "" if len(positives[q]) else "no right answer in the index"
            row.append(none or ("right" if final[q, 0] in positives[q] else "wrong"))
        table.append(row)
    lines = columns(table)
    more = len(record.query_names) - SHOWN
    return [*lines, f"... and {more} more queries"] if more > 0 else lines


def recall_lines(record: RunRecord) -> list[str]:
    """Return the recalls, for N up to the number of index images, and what limits them."""
    from patchnetvlad.evaluation.recall import format_recalls

    most = len(record.index_names)
    chosen = [i for i, n in enumerate(record.n_values) if n <= most] or [0]
    lines = [
        f"====> {line}"
        for method, recalls in record.recalls.items()
        for line in format_recalls(method, [record.n_values[i] for i in chosen], recalls[chosen])
    ]
    if record.num_without_positives:
        lines.append(
            f"{record.num_without_positives} of {len(record.query_names)} queries have no right "
            "answer in the index; they count as missed"
        )
    lines += interval_lines(record, chosen)
    return lines + confidence_lines(record)


def confidence_lines(record: RunRecord) -> list[str]:
    """Return how good the confidences of a run are; empty without them."""
    known = {name: of.calibration for name, of in record.metrics.items()}
    table = [["confidence", "ECE", "AURC", "recall at 100 % precision"]]
    for name, of in known.items():
        if of is not None:
            numbers = of.expected_error, of.aurc, of.recall_at_full_precision
            table.append([name, *(f"{value:.3f}" for value in numbers)])
    return columns(table) if len(table) > 1 else []


def selection_lines(record: RunRecord) -> list[str]:
    """Return how many queries ``rerank = auto`` re-ranked, and what that saved; or nothing."""
    of = record.selection
    if of is None:
        return []
    line = (
        f"{of.reranked} of {of.queries} queries were re-ranked ({of.reranked / of.queries:.0%}): "
        f"the others are sure at {of.sure:g} by retrieval alone"
    )
    if of.seconds:
        line += f", which saves about {of.saved:.1f} s of {of.queries * of.seconds:.1f} s"
    kept = f"{of.kept} answers of retrieval stayed: those of re-ranking are less sure"
    return [line, kept] if of.kept else [line]


def interval_lines(record: RunRecord, chosen: Sequence[int]) -> list[str]:
    """Return the 95 % intervals of the metrics of a run, and what they are of.

    Parameters
    ----------
    record : RunRecord
    chosen : sequence of int
        Which of its N are shown.

    Returns
    -------
    list of str
        Empty without intervals.
    """
    known = {name: of for name, of in record.metrics.items() if of.intervals is not None}
    if not known:
        return []
    last = chosen[-1]
    names = [f"@{record.n_values[i]}" for i in chosen]
    table = [["", *names, f"mAP@{record.n_values[last]}", "AUC"]]
    for name, of in known.items():
        found = of.intervals
        assert found is not None
        ends = found.by_n["recall"]
        row = [name, *(_interval(ends[i]) for i in chosen)]
        row.append(_interval(found.by_n["map"][last], of.mean_average_precisions[last]))
        area = None if of.curve is None else of.curve.auc
        row.append("" if area is None else _interval(found.areas["auc"], area))
        table.append(row)
    drawn = next(of.intervals.drawn for of in known.values() if of.intervals is not None)
    return [f"95 % intervals, by bootstrap over {drawn}:", *columns(table)]


def _interval(ends: NDArray[np.float64], value: float | None = None) -> str:
    shown = f"{ends[0]:.3f}-{ends[1]:.3f}"
    return shown if value is None else f"{value:.3f} ({shown})"


def columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Align the cells of a table."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _list(values: Sequence[int] | NDArray[np.int64]) -> str:
    return ", ".join(str(int(value)) for value in values)
