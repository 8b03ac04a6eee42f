# SPDX-License-Identifier: MIT
"""Mutual nearest neighbours of patch descriptors (paper, equation 5)."""

from __future__ import annotations

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


def mutual_nearest_neighbours(
    query: Tensor, candidate: Tensor
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
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
    """
    query_of_candidate, candidate_of_query = nearest_neighbours(query, candidate)
    patches = torch.arange(len(candidate), device=candidate.device)
    mutual = candidate_of_query[query_of_candidate] == patches
    return query_of_candidate[mutual].cpu().numpy(), patches[mutual].cpu().numpy()
