# SPDX-License-Identifier: MIT
"""Exact search by Euclidean distance, and checks for every search."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import FeatureError

logger = logging.getLogger(__name__)

Search = Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.int64]]]
_FAISS_SETTINGS = threading.Lock()


def check_search(queries: tuple[int, ...], index: tuple[int, ...], top_k: int) -> int:
    """Check the shapes of the descriptors, and return how many candidates a search can have.

    Raises
    ------
    ValueError
        ``top_k`` is less than 1.
    FeatureError
        The shapes do not fit each other.
    """
    if top_k < 1:
        raise ValueError(f"top_k = {top_k} must be 1 or more")
    for name, shape in (("queries", queries), ("index", index)):
        if len(shape) != 2:
            raise FeatureError(
                f"the global descriptors of the {name} have shape {shape}; needed is "
                "[images, dimensions]"
            )
    if queries[1] != index[1]:
        raise FeatureError(
            f"the queries' global descriptors have {queries[1]} dimensions, the index's "
            f"{index[1]}; extract both with the same configuration"
        )
    return min(top_k, index[0])


def exact_search(
    search: Search, queries: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Search exactly, with a result that depends only on the queries and each block of rows.

    Equal distances are in the order of rows, also where they are cut off. FAISS by itself keeps
    any of them from k = 100, and computes distances differently for k = 1 and for fewer queries
    than threads.

    Parameters
    ----------
    search : callable
        Takes queries and k; returns squared distances and rows, as FAISS does.
    queries : ndarray [Q, P] of float32
    k : int

    Returns
    -------
    distances : ndarray [Q, k] of float32
        Squared, nearest first.
    rows : ndarray [Q, k] of int64
        -1 if there are no more.
    """
    import faiss

    threads = faiss.omp_get_max_threads()
    with _FAISS_SETTINGS:  # the first of these is the whole process's
        before = faiss.cvar.distance_compute_min_k_reservoir
        try:
            faiss.cvar.distance_compute_min_k_reservoir = 2**31 - 1
            faiss.omp_set_num_threads(max(1, min(threads, len(queries))))
            distances, rows = search(queries, max(k, 2))
        finally:
            faiss.cvar.distance_compute_min_k_reservoir = before
            faiss.omp_set_num_threads(threads)
    return distances[:, :k], rows[:, :k].astype(np.int64)


def incomplete(found: NDArray[np.int64], factory: str) -> NDArray[np.bool_]:
    """Return and log for which queries [Q] an index found fewer than k images."""
    ordered = np.sort(found, axis=1)
    bad: NDArray[np.bool_] = (ordered[:, 0] < 0) | (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if bad.any():
        logger.info(
            "%s found fewer than %d images for %d of %d queries; searching exactly for these",
            factory,
            found.shape[1],
            bad.sum(),
            len(found),
        )
    return bad


def check_found(queries: NDArray[np.float32], found: NDArray[np.int64]) -> None:
    """Raise FeatureError if an exact search found fewer than k images [Q, k] for a query."""
    short = np.flatnonzero((found < 0).any(axis=1))
    if len(short):
        finite = np.isfinite(queries[short[0]]).all()
        raise FeatureError(
            f"the global descriptor of query {short[0]} "
            + ("has no finite distance to some of the index's" if finite else "is not finite")
            + "; extract again"
        )


def distances_to(
    queries: NDArray[np.float32], index: NDArray[np.float32], candidates: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Compute the distances of queries to their candidates by global descriptor.

    Parameters
    ----------
    queries : ndarray [Q, P] of float32
    index : ndarray [N, P] of float32
    candidates : ndarray [Q, k] of int64
        Rows of ``index``.

    Returns
    -------
    ndarray [Q, k] of float32
        Euclidean distances.
    """
    found = np.empty(candidates.shape, dtype=np.float32)
    for q, row in enumerate(candidates):  # [Q, k, P] would be large
        found[q] = np.linalg.norm(index[row] - queries[q], axis=1)
    return found
