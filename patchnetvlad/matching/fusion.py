# SPDX-License-Identifier: MIT
"""Fusion of the scores of several patch sizes (paper, section 3.5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def fuse_scores(scores: NDArray[np.floating], weights: Sequence[float]) -> NDArray[np.float64]:
    """Fuse the scores of the candidates of one query.

    The scores of each size are standardised over the candidates (population standard
    deviation), then added up by weight. A size whose scores are all equal says nothing about
    the order and contributes 0.

    Parameters
    ----------
    scores : ndarray [C, S]
        Score of each candidate at each patch size; lower is better.
    weights : sequence of float, length S

    Returns
    -------
    ndarray [C] of float64
        Lower is better.

    Raises
    ------
    ValueError
        The shapes do not fit.

    Examples
    --------
    The second candidate is the best at both sizes; a size whose scores are all equal has no say:

    >>> scores = np.array([[-0.1, -0.2], [-0.5, -0.6], [0.0, -0.1]])
    >>> fuse_scores(scores, weights=[0.6, 0.4]).argmin()
    np.int64(1)
    >>> fuse_scores(np.array([[-0.1], [-0.1]]), weights=[1.0]).tolist()
    [0.0, 0.0]
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(weights):
        raise ValueError(
            f"scores have shape {list(values.shape)}; needed is [candidates, {len(weights)}]"
        )
    fused = np.zeros(len(values))
    for column, weight in zip(values.T, weights, strict=True):
        # Scores are sums of floats: what differs by rounding alone is equal.
        if len(column) and np.ptp(column) > 1e-9 * np.abs(column).max():
            fused += weight * (column - column.mean()) / column.std()
    return fused


def rank(candidates: NDArray[np.int64], fused: NDArray[np.floating]) -> NDArray[np.int64]:
    """Order candidates [C] by fused score [C], lowest first; ties keep their order.

    Examples
    --------
    >>> rank(np.array([7, 4, 9]), np.array([0.5, -1.0, 0.5])).tolist()
    [4, 7, 9]
    """
    return candidates[np.argsort(fused, kind="stable")]
