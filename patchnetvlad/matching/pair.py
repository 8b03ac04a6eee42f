# SPDX-License-Identifier: MIT
"""Matching the patches of two images, at one patch size or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.errors import ConfigError
from patchnetvlad.geometry import PatchGrid
from patchnetvlad.matching.nearest import mutual_nearest_neighbours
from patchnetvlad.matching.ransac import homography_inliers
from patchnetvlad.matching.spatial import spatial_score


@dataclass(frozen=True, eq=False)
class PatchMatches:
    """What matching at one patch size found.

    Attributes
    ----------
    score : float
        Lower is better; 0 when nothing matched.
    query_patches, candidate_patches : ndarray [m] of int64
        The matches that count: inliers of the homography (RANSAC), or all mutual nearest
        neighbours (spatialApproximator).
    homography : ndarray [3, 3] of float64 or None
        From candidate to query px; RANSAC only.
    """

    score: float
    query_patches: NDArray[np.int64]
    candidate_patches: NDArray[np.int64]
    homography: NDArray[np.float64] | None = None


def match_patches(
    query: Tensor,
    candidate: Tensor,
    query_grid: PatchGrid,
    candidate_grid: PatchGrid,
    matcher: str,
) -> PatchMatches:
    """Match the patches of one size of two images.

    Parameters
    ----------
    query : Tensor [n, P]
        L2-normalised patch descriptors.
    candidate : Tensor [m, P]
    query_grid, candidate_grid : PatchGrid
        Of n and m patches.
    matcher : {"RANSAC", "spatialApproximator"}
        RANSAC: minus the number of inliers over n. spatialApproximator: see
        :func:`~patchnetvlad.matching.spatial.spatial_score`.

    Returns
    -------
    PatchMatches

    Raises
    ------
    ConfigError
        The matcher is unknown.
    """
    ours, theirs = mutual_nearest_neighbours(query, candidate)
    if matcher == "RANSAC":
        homography, inliers = homography_inliers(
            query_grid.keypoints[ours], candidate_grid.keypoints[theirs], query_grid.stride
        )
        score = -float(inliers.sum()) / len(query)
        return PatchMatches(score + 0.0, ours[inliers], theirs[inliers], homography)
    if matcher == "spatialApproximator":
        score = spatial_score(
            query_grid.indices[ours],
            candidate_grid.indices[theirs],
            query_grid.indices.max(axis=0),
            len(query),
        )
        return PatchMatches(score, ours, theirs)
    raise ConfigError(f"unknown matcher {matcher!r}; one of RANSAC, spatialApproximator")


def match_pair(
    query: Sequence[Tensor],
    candidate: Sequence[Tensor],
    query_grids: Sequence[PatchGrid],
    candidate_grids: Sequence[PatchGrid],
    matcher: str,
) -> list[PatchMatches]:
    """Match two images at every patch size; see :func:`match_patches`.

    Parameters
    ----------
    query, candidate : sequence of Tensor [n_s, P]
        One a patch size.
    query_grids, candidate_grids : sequence of PatchGrid
        Likewise.
    matcher : {"RANSAC", "spatialApproximator"}

    Returns
    -------
    list of PatchMatches
        One a patch size.
    """
    return [
        match_patches(q, c, q_grid, c_grid, matcher)
        for q, c, q_grid, c_grid in zip(query, candidate, query_grids, candidate_grids, strict=True)
    ]


def similarity(matches: Sequence[PatchMatches], weights: Sequence[float]) -> float:
    """Return minus the weighted sum of the scores: larger is more similar."""
    return -sum(w * m.score for w, m in zip(weights, matches, strict=True)) + 0.0
