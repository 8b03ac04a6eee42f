# SPDX-License-Identifier: MIT
"""Mutual nearest neighbours of patch descriptors (paper, equation 5)."""

from __future__ import annotations

import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def nearest_neighbours(query: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest neighbours in both directions, by cosine similarity.

    Parameters
    ----------
    query : Tensor [n, P]
        L2-normalised patch descriptors.
    candidate : Tensor [m, P]
        Likewise.

    Returns
    -------
    query_of_candidate : Tensor [m] of int64
        Most similar query patch of each candidate patch.
    candidate_of_query : Tensor [n] of int64
        Most similar candidate patch of each query patch.
    """
    similarity = query @ candidate.T  # [n, m]
    return similarity.argmax(dim=0), similarity.argmax(dim=1)


Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Places of matched patches, [matches] each: in the query, and in the candidate."""


def mutual_nearest_neighbours(query: Tensor, candidate: Tensor) -> Pairs:
    """Find the pairs of patches that are each other's nearest neighbour.

    Parameters
    ----------
    query : Tensor [n, P]
        L2-normalised patch descriptors.
    candidate : Tensor [m, P]
        Likewise.

    Returns
    -------
    query_patches, candidate_patches : ndarray [matches] of int64
        The pairs, by ascending candidate patch. RANSAC draws its samples by position, so the
        order decides which of several good homographies is found; this is the original one.

    Examples
    --------
    The first two patches of the query are most similar to candidate patch 1, which likes patch 0
    better:

    >>> query = torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]])
    >>> candidate = torch.tensor([[-0.6, 0.8], [1.0, 0.0]])
    >>> query_patches, candidate_patches = mutual_nearest_neighbours(query, candidate)
    >>> query_patches.tolist(), candidate_patches.tolist()
    ([2, 0], [0, 1])
    """
    return mutual_of_block(query, candidate[None])[0]


def mutual_of_block(query: Tensor, candidates: Tensor) -> list[Pairs]:
    """Find the mutual nearest neighbours of a query with several candidates at once.

    Parameters
    ----------
    query : Tensor [n, P]
        L2-normalised patch descriptors.
    candidates : Tensor [B, m, P]
        Likewise, of B images.

    Returns
    -------
    list of (ndarray [matches], ndarray [matches]), length B
        As :func:`mutual_nearest_neighbours` returns them.
    """
    if query.device.type == "cpu":
        return [_mutual_on_cpu(query, candidate) for candidate in candidates]
    return _mutual_at_once(query, candidates)


def _mutual_at_once(query: Tensor, candidates: Tensor) -> list[Pairs]:
    size, m, _ = candidates.shape
    # In float32, also of descriptors that are kept in half precision: rounded, maxima would tie.
    products = query.float() @ candidates.flatten(0, 1).float().T
    similarity = products.view(len(query), size, m)
    query_of_candidate = similarity.argmax(dim=0)  # [B, m]
    candidate_of_query = similarity.argmax(dim=2).T  # [B, n]
    there_and_back = candidate_of_query.gather(1, query_of_candidate)  # [B, m]
    patches = torch.arange(m, device=query.device)
    found = torch.where(there_and_back == patches, query_of_candidate, -1).cpu().numpy()
    return [(row[row >= 0], np.flatnonzero(row >= 0)) for row in found]


def _mutual_on_cpu(query: Tensor, candidate: Tensor) -> Pairs:
    # NumPy finds maxima several times faster than PyTorch does on a CPU, but the places of those of
    # columns slowly. They are not needed: a row's maximum is mutual if it is its column's, too.
    # (Where two rows with different maxima share a column's largest value by chance, to the last
    # bit, the mutual one counts, and not the first.)
    similarity = _similarity(query, candidate)  # [n, m]
    candidate_of_query = similarity.argmax(axis=1)
    best_of_query = similarity[np.arange(len(query)), candidate_of_query]
    best_of_candidate = similarity.max(axis=0)
    ours = np.flatnonzero(best_of_query == best_of_candidate[candidate_of_query])
    theirs, first = np.unique(candidate_of_query[ours], return_index=True)
    return ours[first], theirs


_thread = threading.local()


def _similarity(query: Tensor, candidate: Tensor) -> NDArray[np.float32]:
    """Multiply [n, P] and [m, P] into memory that this thread uses again.

    To get new memory from the system every time would take as long as to find the maxima.
    """
    n, m = len(query), len(candidate)
    buffer = getattr(_thread, "buffer", None)
    if buffer is None or len(buffer) < n * m:
        buffer = _thread.buffer = torch.empty(n * m)
    similarity = buffer[: n * m].view(n, m)
    with torch.inference_mode():
        torch.mm(query.float(), candidate.float().T, out=similarity)
    found: NDArray[np.float32] = similarity.numpy()
    return found
