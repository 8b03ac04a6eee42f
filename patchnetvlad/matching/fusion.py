# SPDX-License-Identifier: MIT
"""Fusion of the scores of the patch sizes (paper, section 3.5), and ranking by it."""

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


def raw_scores(patch_scores: NDArray[np.floating], weights: Sequence[float]) -> NDArray[np.float64]:
    """Compute scores of Patch-NetVLAD that are comparable between queries.

    They are minus the weighted sum over patch sizes, as
    :func:`patchnetvlad.matching.pair.similarity` of two images: not standardised over the
    candidates of a query, as the scores are that candidates are ordered by.

    Parameters
    ----------
    patch_scores : ndarray [Q, k, S]
        Score of each candidate at each patch size; lower is better.
    weights : sequence of float, length S

    Returns
    -------
    ndarray [Q, k] of float64
        Larger is better, in the order of the candidates in ``patch_scores``.

    Raises
    ------
    ValueError
        The shapes do not fit.

    Examples
    --------
    >>> raw_scores(np.array([[[-0.2, -0.1], [0.0, -0.3]]]), weights=[0.5, 0.5]).tolist()
    [[0.15000000000000002, 0.15]]
    """
    values = np.asarray(patch_scores, dtype=np.float64)
    if values.ndim != 3 or values.shape[2] != len(weights):
        raise ValueError(
            f"scores have shape {list(values.shape)}; needed is [queries, candidates, "
            f"{len(weights)}]"
        )
    total = np.zeros(values.shape[:2])
    for size, weight in enumerate(weights):  # added up in the order of similarity()
        total += weight * values[..., size]
    return -total + 0.0


def reorder(
    scores: NDArray[np.floating], before: NDArray[np.integer], after: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Reorder scores as re-ranking has reordered their candidates.

    Parameters
    ----------
    scores : ndarray [Q, k]
        Of the candidates ``before``.
    before, after : ndarray [Q, k] of int
        Candidates of each query, the same ones in two orders.

    Returns
    -------
    ndarray [Q, k] of float64

    Raises
    ------
    ValueError
        The shapes differ, or candidates do.

    Examples
    --------
    >>> before, after = np.array([[7, 4, 9]]), np.array([[9, 7, 4]])
    >>> reorder(np.array([[0.7, 0.4, 0.9]]), before, after).tolist()
    [[0.9, 0.7, 0.4]]
    """
    if not scores.shape == before.shape == after.shape or before.ndim != 2:
        raise ValueError(
            f"scores of shape {list(scores.shape)} for candidates of shapes "
            f"{list(before.shape)} and {list(after.shape)}"
        )
    old, new = (np.argsort(rows, axis=1, kind="stable") for rows in (before, after))
    if (np.take_along_axis(before, old, 1) != np.take_along_axis(after, new, 1)).any():
        raise ValueError("re-ranked candidates are others than those that were retrieved")
    ordered = np.empty(scores.shape)
    np.put_along_axis(ordered, new, np.take_along_axis(scores, old, 1).astype(np.float64), 1)
    return ordered
