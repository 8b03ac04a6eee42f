# SPDX-License-Identifier: MIT
"""Recall@N, and the lines of ``recalls.txt``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.arguments import argument_errors


@argument_errors("recall_at_n cannot use these values")
def recall_at_n(
    predictions: NDArray[np.integer] | Sequence[Sequence[int]],
    positives: Sequence[NDArray[np.integer] | Sequence[int]],
    n_values: Sequence[int],
    all_queries: bool = True,
) -> NDArray[np.float64]:
    """Compute the share of queries with a positive among their first N candidates.

    All queries count, including those without any positive, unless ``all_queries`` is False.

    Parameters
    ----------
    predictions : [Q, k] of int
        Candidates of each query, best first. An N beyond k uses all k.
    positives : sequence of Q sequences of int
        Right index images of each query.
    n_values : sequence of int
        The N.
    all_queries : bool, default True
        Divide by the number of all queries; otherwise by the number of queries with positives.

    Returns
    -------
    ndarray [len(n_values)] of float64
        Between 0 and 1, in the order of ``n_values``; 0 if no query counts.

    Raises
    ------
    ValueError
        The numbers of positives and of predictions differ.

    Examples
    --------
    Of three queries, the first is answered at rank 1, the second at rank 2, and the third,
    which has no right answer in the index, never:

    >>> from patchnetvlad import recall_at_n
    >>> recall_at_n([[4, 7], [5, 9], [2, 0]], [[4], [9, 8], []], n_values=[1, 2]).round(2).tolist()
    [0.33, 0.67]
    >>> recall_at_n([[4, 7], [5, 9], [2, 0]], [[4], [9, 8], []], [1, 2], all_queries=False).tolist()
    [0.5, 1.0]
    """
    first_hit = first_right(predictions, positives)
    counted = len(first_hit) - (0 if all_queries else queries_without_positives(positives))
    if counted == 0:
        return np.zeros(len(n_values))
    return np.array([np.count_nonzero(first_hit < n) / counted for n in n_values])


def first_right(
    predictions: NDArray[np.integer] | Sequence[Sequence[int]],
    positives: Sequence[NDArray[np.integer] | Sequence[int]],
) -> NDArray[np.float64]:
    """Count the candidates of each query before the first right one.

    Parameters
    ----------
    predictions, positives
        As for :func:`recall_at_n`.

    Returns
    -------
    ndarray [Q] of float64
        inf where no candidate is right.

    Raises
    ------
    ValueError
        The numbers of positives and of predictions differ.
    """
    check_counts(predictions, positives)
    found = np.full(len(predictions), np.inf)
    for q, (candidates, right) in enumerate(zip(predictions, positives, strict=True)):
        hits = np.flatnonzero(np.isin(candidates, right))
        if len(hits):
            found[q] = hits[0]
    return found


def check_counts(
    predictions: NDArray[np.integer] | Sequence[Sequence[int]],
    positives: Sequence[NDArray[np.integer] | Sequence[int]],
) -> None:
    """Raise ValueError unless there are positives for every query."""
    if len(predictions) != len(positives):
        raise ValueError(
            f"{len(predictions)} queries have predictions, {len(positives)} have positives"
        )


def queries_without_positives(positives: Sequence[NDArray[np.integer] | Sequence[int]]) -> int:
    """Count the queries without a right answer, which no method can get right."""
    return sum(len(right) == 0 for right in positives)


def format_recalls(
    method: str, n_values: Sequence[int], recalls: NDArray[np.floating]
) -> list[str]:
    """Return the lines of ``recalls.txt`` for one method."""
    return [
        f"Recall {method}@{n}: {recall:.4f}" for n, recall in zip(n_values, recalls, strict=True)
    ]
