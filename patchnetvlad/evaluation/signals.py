# SPDX-License-Identifier: MIT
"""Signals of how sure the first answer to a query is, from what matching computes anyway.

The larger a signal, the surer the answer. They need only the candidates of a query with their
distances and scores, so they are the same for a data set, an index of places and a camera.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RIVAL = 5
"""Number of the candidate with which the first is compared.

Those before it are often of the same place, where an index has several images of a place.
"""

SIGNALS = {
    "NetVLAD": ("nearness", "nearer_than_rival"),
    "PatchNetVLAD": ("similarity", "more_similar_than_rival", "agreement"),
}
"""Names of the signals of retrieval and of re-ranking, in the order of their columns."""

_LEAST = 1e-4  # stands for the score of a pair without matches, which has no logarithm


def retrieval_signals(distances: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the signals of the nearest candidates.

    Parameters
    ----------
    distances : ndarray [Q, k] of float
        Of global descriptors, nearest first; k from 1.

    Returns
    -------
    ndarray [Q, 2] of float64
        Minus the distance of the first, and one minus its ratio to that of candidate
        :data:`RIVAL`, or of the last if there are fewer.

    Examples
    --------
    >>> retrieval_signals(np.array([[0.5, 0.8, 0.9, 1.0, 1.0]])).tolist()
    [[-0.5, 0.5]]
    """
    away = np.asarray(distances, dtype=np.float64)
    first, rival = away[:, 0], away[:, min(RIVAL, away.shape[1]) - 1]
    ratio = np.divide(first, rival, out=np.ones_like(first), where=rival > 0)
    return np.stack([-first, 1 - ratio], axis=1)


def reranking_signals(
    scores: NDArray[np.floating], first: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Return the signals of the first answers after re-ranking.

    Parameters
    ----------
    scores : ndarray [Q, k] of float
        Similarity of the patches of the candidates, in the order of retrieval; larger is more
        similar.
    first : ndarray [Q] of int
        Which of them is the first answer.

    Returns
    -------
    ndarray [Q, 3] of float64
        The logarithm of its score; the same minus that of the :data:`RIVAL`-th best score, or of
        the worst if there are fewer; and minus the logarithm of its rank in retrieval, from 1.

    Examples
    --------
    The second of five candidates is answered:

    >>> reranking_signals(np.array([[0.1, 0.4, 0.1, 0.1, 0.1]]), np.array([1])).round(3).tolist()
    [[-0.916, 1.386, -0.693]]
    """
    logs = np.log(np.maximum(np.asarray(scores, dtype=np.float64), _LEAST))
    rival = -np.sort(-logs, axis=1)[:, min(RIVAL, logs.shape[1]) - 1]
    best = logs[np.arange(len(logs)), first]
    return np.stack([best, best - rival, -np.log1p(first)], axis=1)
