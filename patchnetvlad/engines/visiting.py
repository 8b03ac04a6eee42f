# SPDX-License-Identifier: MIT
"""The order of re-ranking: queries that share candidates are processed one after another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SHARING = 4000  # queries, with repetitions, that are considered for the next visit


def visiting_order(predictions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Order queries so that each shares many candidates with the one before.

    From one query on, the unvisited query that shares most candidates with it is next; where
    none shares any, the first that is left. Where candidates are shared by many, only the best
    of each query are looked at, so that the time stays proportional to the number of queries.

    Parameters
    ----------
    predictions : ndarray [Q, k] of int64
        Candidates.

    Returns
    -------
    ndarray [Q] of int64
        Each query once.
    """
    num_queries, k = predictions.shape
    if num_queries == 0 or k == 0:
        return np.arange(num_queries)
    few = max(1, int((_SHARING * (predictions.max() + 1) / num_queries) ** 0.5))
    predictions = predictions[:, :few]
    k = predictions.shape[1]
    flat = predictions.ravel()
    by_candidate = np.argsort(flat, kind="stable") // k  # queries, grouped by candidate
    starts = np.searchsorted(np.sort(flat), np.arange(flat.max() + 2))
    left = np.ones(num_queries, dtype=bool)
    order = np.empty(num_queries, dtype=np.int64)
    first, current = 0, 0
    for n in range(num_queries):
        order[n], left[current] = current, False
        if n == num_queries - 1:
            break
        sharing = np.concatenate(
            [by_candidate[starts[c] : starts[c + 1]] for c in predictions[current]]
        )
        sharing = sharing[left[sharing]]
        if len(sharing):
            seen, counts = np.unique(sharing, return_counts=True)
            current = int(seen[counts.argmax()])
        else:
            while not left[first]:
                first += 1
            current = first
    return order
