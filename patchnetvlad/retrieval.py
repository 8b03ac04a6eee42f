# SPDX-License-Identifier: MIT
"""Retrieval: the index images nearest to each query, by global descriptor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import FeatureError

CUTOUTS = 12
"""Perspective cut-outs of one Tokyo 24/7 panorama, which follow each other in its list."""


def retrieve(
    queries: NDArray[np.float32], index: NDArray[np.float32], top_k: int
) -> NDArray[np.int64]:
    """Find the nearest index images of each query, by exact Euclidean distance.

    Parameters
    ----------
    queries : ndarray [Q, P] of float32
        Global descriptors.
    index : ndarray [N, P] of float32
    top_k : int
        Candidates a query; clamped to N.

    Returns
    -------
    ndarray [Q, min(top_k, N)] of int64
        Rows of ``index``, nearest first.

    Raises
    ------
    FeatureError
        The dimensions differ.
    """
    import faiss

    if queries.shape[1] != index.shape[1]:
        raise FeatureError(
            f"the queries' global descriptors have {queries.shape[1]} dimensions, the index's "
            f"{index.shape[1]}; extract both with the same configuration"
        )
    flat = faiss.IndexFlatL2(index.shape[1])
    flat.add(np.ascontiguousarray(index, dtype=np.float32))
    _, found = flat.search(np.ascontiguousarray(queries, dtype=np.float32), min(top_k, len(index)))
    return found.astype(np.int64)


def keep_best_cutout(predictions: NDArray[np.int64], top_k: int) -> NDArray[np.int64]:
    """Keep the best-ranked cut-out of each panorama (the rule of Tokyo 24/7).

    Parameters
    ----------
    predictions : ndarray [Q, k] of int
        Candidates, best first; images 12 p to 12 p + 11 are cut from panorama p.
    top_k : int
        Candidates to keep a query.

    Returns
    -------
    ndarray [Q, m] of int64
        m is top_k, or the number of panoramas if that is smaller. 12 * top_k candidates a query,
        or all of a short index, always hold that many.
    """
    kept = []
    for row in predictions:
        _, first = np.unique(row // CUTOUTS, return_index=True)
        kept.append(row[np.sort(first)][:top_k])
    return np.array(kept, dtype=np.int64)


def load_predictions(path: str | Path, num_queries: int, num_index: int) -> NDArray[np.int64]:
    """Read candidates of another retrieval from a .npy file.

    Parameters
    ----------
    path : str or Path
        Array [Q, k] of rows of the index list, best first.
    num_queries, num_index : int
        Q, and the bound of the rows.

    Returns
    -------
    ndarray [Q, k] of int64

    Raises
    ------
    FeatureError
        The file is missing, or its shape or values do not fit.
    """
    try:
        predictions = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy raises whatever it trips over.
        raise FeatureError(f"pred_input_path = {path} cannot be read: {error}") from None
    if (
        not isinstance(predictions, np.ndarray)
        or predictions.ndim != 2
        or predictions.shape[1] == 0
        or predictions.dtype.kind not in "iu"
    ):
        raise FeatureError(
            f"pred_input_path = {path} must hold whole numbers of shape [queries, candidates]"
        )
    if len(predictions) != num_queries:
        raise FeatureError(
            f"pred_input_path = {path} has {len(predictions)} rows for {num_queries} queries"
        )
    row, column = np.nonzero((predictions < 0) | (predictions >= num_index))
    if len(row):
        raise FeatureError(
            f"pred_input_path = {path}: row {row[0]}, column {column[0]} is "
            f"{predictions[row[0], column[0]]}; the index list has rows 0 to {num_index - 1}"
        )
    return predictions.astype(np.int64)
