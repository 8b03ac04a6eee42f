# SPDX-License-Identifier: MIT
"""Mutual nearest neighbours of patch descriptors (paper, equation 5)."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.base.device import upload
from patchnetvlad.matching.fused import attempt_fused, fused_kernels

BLOCK_BYTES = 256 * 2**20
"""Bytes of similarities held on a device at a time, if they are held at all."""


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
"""Indices of matched patches, [matches] each: of the query, and of the candidate."""


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
    The first two patches of the query are most similar to candidate patch 1, which prefers patch 0
    better:

    >>> query = torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]])
    >>> candidate = torch.tensor([[-0.6, 0.8], [1.0, 0.0]])
    >>> query_patches, candidate_patches = mutual_nearest_neighbours(query, candidate)
    >>> query_patches.tolist(), candidate_patches.tolist()
    ([2, 0], [0, 1])
    """
    if query.device.type == "cpu":
        return _mutual_on_cpu(query, candidate)
    return pairs_of(mutual_on_device([(query, candidate)]).cpu().numpy())[0]


def mutual_on_device(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Find the mutual nearest neighbours of B pairs of patch sets, without waiting for the device.

    For float16 descriptors on a CUDA GPU one Triton kernel handles all pairs. Elsewhere the
    similarities of candidates of one shape are one product, as far as they fit into
    :data:`BLOCK_BYTES`.

    Parameters
    ----------
    pairs : sequence of (Tensor [n, P], Tensor [m, P]), length B >= 1
        L2-normalised patch descriptors of query and candidate on one device; n and m may vary.

    Returns
    -------
    Tensor [B, max m] of int64
        Query patch of each candidate patch, or -1 where it has no mutual nearest neighbour.
    """
    kernels = fused_kernels(pairs[0][0].device)
    if kernels is not None and kernels.can_match(pairs):
        nearest = attempt_fused(lambda: kernels.nearest(pairs))
        if nearest is not None:
            theirs, ours = nearest
            return _mutual(theirs, ours, [len(candidate) for _, candidate in pairs])
    most = max(len(candidate) for _, candidate in pairs)
    found = [_mutual_by_product(query, group) for query, group in _blocks(pairs)]
    return torch.cat([F.pad(part, (0, most - part.shape[1]), value=-1) for part in found])


def _blocks(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Group consecutive pairs with the same query and candidates of one shape."""
    for _, group in itertools.groupby(pairs, key=lambda pair: (id(pair[0]), pair[1].shape)):
        same = list(group)
        query = same[0][0]
        step = max(1, BLOCK_BYTES // (4 * len(query) * max(1, len(same[0][1]))))
        for start in range(0, len(same), step):
            yield query, [candidate for _, candidate in same[start : start + step]]


def _mutual_by_product(query: Tensor, candidates: Sequence[Tensor]) -> Tensor:
    """Find the mutual nearest neighbours [B, m] of [n, P] and B times [m, P]."""
    m = len(candidates[0])
    # In float32, also of descriptors that are kept in half precision: rounded, maxima would tie.
    products = query.float() @ torch.cat(list(candidates)).float().T
    similarity = products.view(len(query), len(candidates), m)
    return _mutual(similarity.argmax(dim=2).T, similarity.argmax(dim=0), [m] * len(candidates))


def _mutual(
    candidate_of_query: Tensor, query_of_candidate: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Keep the nearest neighbours [B, m] that are mutual; -1 instead of others.

    ``lengths`` are the numbers of candidate patches that are there.
    """
    device = query_of_candidate.device
    patches = torch.arange(query_of_candidate.shape[1], device=device)
    there = patches < upload(np.array(lengths), device)[:, None]  # [B, m]
    there_and_back = candidate_of_query.gather(1, torch.where(there, query_of_candidate, 0))
    return torch.where(there & (there_and_back == patches), query_of_candidate, -1)


def pairs_of(found: NDArray[np.int64]) -> list[Pairs]:
    """Turn what :func:`mutual_on_device` found [B, m], fetched, into pairs of patches."""
    return [(row[row >= 0], np.flatnonzero(row >= 0)) for row in found]


def _mutual_on_cpu(query: Tensor, candidate: Tensor) -> Pairs:
    # NumPy finds maxima several times faster than PyTorch does on a CPU, but the indices of column
    # maxima slowly. They are not needed: a row's maximum is mutual if it is its column's, too.
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
    """Multiply [n, P] and [m, P] into memory that this thread reuses.

    Getting new memory from the system every time would take as long as finding the maxima.
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
