# SPDX-License-Identifier: MIT
"""Recall@N."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def recall_at_n(
    predictions: NDArray[np.integer] | Sequence[Sequence[int]],
    positives: Sequence[NDArray[np.integer] | Sequence[int]],
    n_values: Sequence[int],
) -> NDArray[np.float64]:
    """Compute the share of queries with a positive among their first N candidates.

    All queries count, also those without any positive.

    Parameters
    ----------
    predictions : [Q, k] of int
        Candidates of each query, best first. An N beyond k looks at all k.
    positives : sequence of Q sequences of int
        Right index images of each query.
    n_values : sequence of int
        The N.

    Returns
    -------
    ndarray [len(n_values)] of float64
        Between 0 and 1, in the order of ``n_values``.

    Raises
    ------
    ValueError
        There are not as many positives as predictions.
    """
    if len(predictions) != len(positives):
        raise ValueError(
            f"{len(predictions)} queries have predictions, {len(positives)} have positives"
        )
    first_hit = np.full(len(predictions), np.inf)
    for q, (candidates, right) in enumerate(zip(predictions, positives, strict=True)):
        hits = np.flatnonzero(np.isin(candidates, right))
        if len(hits):
            first_hit[q] = hits[0]
    if len(first_hit) == 0:
        return np.zeros(len(n_values))
    return np.array([np.mean(first_hit < n) for n in n_values])


def queries_without_positives(positives: Sequence[NDArray[np.integer] | Sequence[int]]) -> int:
    """Count the queries that no index image answers, and that no method can get right."""
    return sum(len(right) == 0 for right in positives)


def format_recalls(
    method: str, n_values: Sequence[int], recalls: NDArray[np.floating]
) -> list[str]:
    """Return the lines of ``recalls.txt`` for one method."""
    return [
        f"Recall {method}@{n}: {recall:.4f}" for n, recall in zip(n_values, recalls, strict=True)
    ]
