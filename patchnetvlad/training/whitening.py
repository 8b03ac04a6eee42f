# SPDX-License-Identifier: MIT
"""Whitening layers from descriptors, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from patchnetvlad.errors import ArgumentError

_BLOCK_FLOATS = 2**24  # 128 MiB of float64
_LEAST_VARIANCE = 1e-9  # added to variances, by whose roots components are divided


def whitening_layer(descriptors: NDArray[np.floating], num_pcs: int) -> tuple[Tensor, Tensor]:
    """Compute the weight and the bias of a whitening layer by principal component analysis.

    Descriptors are read in blocks, so that they may be a file mapped to memory. Beside them,
    24 m^2 bytes are held, m being the smaller of n and d, and twice the layer.

    Parameters
    ----------
    descriptors : ndarray [n, d]
        One a row.
    num_pcs : int
        P, less than n and at most d.

    Returns
    -------
    weight : Tensor [P, d, 1, 1] of float32
        Principal components by descending variance, divided by their standard deviations; each is
        determined up to its sign, and its largest weight is positive here.
    bias : Tensor [P] of float32
        Takes the mean away: the descriptors' products have a mean of 0 and variances of 1.

    Raises
    ------
    ArgumentError
        There are too few descriptors.
    """
    n, d = descriptors.shape
    if not 1 <= num_pcs <= min(n - 1, d):
        raise ArgumentError(
            f"num_pcs = {num_pcs} of {n} descriptors of {d} dimensions: there are "
            f"{max(0, min(n - 1, d))} components; give more images, or fewer components"
        )
    mean = np.concatenate([block.mean(axis=0) for _, block in _columns(descriptors)])
    variances, vectors = _largest(_products(descriptors, mean), num_pcs)
    variances /= n - 1
    if d <= n:
        weight = np.ascontiguousarray(vectors.T, dtype=np.float32)  # [P, d]
    else:
        weight = np.empty((num_pcs, d), np.float32)
        squares = np.zeros(num_pcs)
        for columns, block in _columns(descriptors):
            part = vectors.T @ (block - mean[columns])
            squares += (part**2).sum(axis=1)
            weight[:, columns] = part
        weight /= np.maximum(np.sqrt(squares), np.finfo(np.float32).tiny)[:, None]
    weight /= np.sqrt(variances + _LEAST_VARIANCE)[:, None]
    largest = np.abs(weight).argmax(axis=1)
    weight *= np.sign(weight[np.arange(num_pcs), largest])[:, None]
    bias = -(weight @ mean).astype(np.float32)
    return from_numpy(weight)[:, :, None, None], from_numpy(bias)


def _columns(
    descriptors: NDArray[np.floating],
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield blocks of columns, in float64."""
    n, d = descriptors.shape
    step = max(1, _BLOCK_FLOATS // n)
    for first in range(0, d, step):
        columns = slice(first, min(first + step, d))
        yield columns, np.asarray(descriptors[:, columns], np.float64)


def _products(descriptors: NDArray[np.floating], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum the products of centred rows, [n, n], or of columns, [d, d]; the lower half alone."""
    from scipy.linalg.blas import dsyrk

    n, d = descriptors.shape
    total = np.zeros((min(n, d),) * 2, order="F")
    if d > n:
        for columns, block in _columns(descriptors):
            block -= mean[columns]
            total = dsyrk(1.0, block, 1.0, total, lower=1, overwrite_c=1)
        return total
    step = max(1, _BLOCK_FLOATS // d)
    for first in range(0, n, step):
        block = np.asarray(descriptors[first : first + step], np.float64) - mean
        total = dsyrk(1.0, block.T, 1.0, total, lower=1, overwrite_c=1)
    return total


def _largest(
    matrix: NDArray[np.float64], count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the largest eigenvalues [count], descending, and their vectors [m, count]."""
    from scipy.linalg import eigh

    size = len(matrix)
    values, vectors = eigh(
        matrix,
        lower=True,
        subset_by_index=(size - count, size - 1),
        driver="evr",
        overwrite_a=True,
        check_finite=False,
    )
    return np.maximum(values[::-1], 0), vectors[:, ::-1]
