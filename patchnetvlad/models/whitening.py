# SPDX-License-Identifier: MIT
"""Principal component analysis for whitening layers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def pca(
    x: NDArray[np.floating], num_pcs: int | None = None, subtract_mean: bool = True
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Compute the principal components of descriptors.

    Works on whichever is smaller of the [d, d] covariance and the [n, n] Gram matrix.

    Parameters
    ----------
    x : ndarray [n, d]
        One descriptor per row.
    num_pcs : int, optional
        Components to keep; all min(n, d) by default.
    subtract_mean : bool, default True

    Returns
    -------
    components : ndarray [d, num_pcs]
        Unit length, by descending variance; each is determined up to its sign.
    variances : ndarray [num_pcs]
        With n - 1 degrees of freedom.
    mean : ndarray [d]
        Zero without ``subtract_mean``.

    Raises
    ------
    ValueError
        There are fewer than two descriptors, or ``num_pcs`` is not 1 to min(n, d).
    """
    values = np.asarray(x)
    n, d = values.shape
    most = min(n, d)
    keep = most if num_pcs is None else num_pcs
    if n < 2 or not 1 <= keep <= most:
        raise ValueError(f"num_pcs = {keep} of {n} descriptors of {d} dimensions; 1 to {most}")
    mean = values.mean(axis=0) if subtract_mean else np.zeros(d, dtype=values.dtype)
    centred = values - mean
    primal = d <= n
    gram = (centred.T @ centred if primal else centred @ centred.T) / (n - 1)
    variances, vectors = np.linalg.eigh(gram)  # ascending
    variances = np.maximum(variances[::-1][:keep], 0)
    vectors = vectors[:, ::-1][:, :keep]
    if not primal:
        vectors = centred.T @ vectors
        norms = np.linalg.norm(vectors, axis=0)
        vectors = vectors / np.where(norms > 0, norms, 1)
    return vectors, variances, mean
