# SPDX-License-Identifier: MIT
"""Rapid spatial scoring (paper, section 3.4): agreement of displacements, without geometry."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def spatial_score(
    query_indices: NDArray[np.int64],
    candidate_indices: NDArray[np.int64],
    max_index: NDArray[np.int64],
    num_patches: int,
) -> float:
    """Score matches by how well their displacements agree (paper, equation 9).

    Parameters
    ----------
    query_indices, candidate_indices : ndarray [m, 2] of int
        (column, row) in the grid of the matched patches.
    max_index : ndarray [2] of int
        Largest column and row of the grid.
    num_patches : int
        Patches n_s that the score is divided by.

    Returns
    -------
    float
        Lower is better; 0 without matches.

    Examples
    --------
    On a grid of 4 x 3 patches, three matches that move alike, and three that do not:

    >>> query = np.array([[0, 0], [1, 1], [2, 2]])
    >>> shape = dict(max_index=np.array([3, 2]), num_patches=12)
    >>> round(spatial_score(query, query + [1, 0], **shape), 2)
    -3.25
    >>> round(spatial_score(query, query[::-1], **shape), 2)
    -1.25
    """
    if len(query_indices) == 0:
        return 0.0
    displacement = (candidate_indices - query_indices).astype(np.float64)  # [m, 2]
    residual = np.abs(displacement - displacement.mean(axis=0))
    return float(-((max_index - residual) ** 2).sum() / num_patches)
