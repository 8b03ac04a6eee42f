# SPDX-License-Identifier: MIT
"""Matching the patches of two images, at one patch size or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.errors import ConfigError
from patchnetvlad.matching.batched_ransac import Problem
from patchnetvlad.matching.nearest import Pairs, mutual_nearest_neighbours
from patchnetvlad.matching.ransac import homography_inliers
from patchnetvlad.matching.spatial import spatial_score
from patchnetvlad.models.grid import STRIDE, PatchGrid


@dataclass(frozen=True, eq=False)
class PatchMatches:
    """Matches at one patch size, and their score.

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
    ransac: str = "opencv",
) -> PatchMatches:
    """Match the patches of one size of two images.

    Parameters
    ----------
    query : Tensor [n, P]
        L2-normalised patch descriptors.
    candidate : Tensor [m, P]
    query_grid, candidate_grid : PatchGrid
        Grids of n and m patches.
    matcher : {"RANSAC", "spatialApproximator"}
        RANSAC: minus the number of inliers over n. spatialApproximator: see
        :func:`~patchnetvlad.matching.spatial.spatial_score`.
    ransac : {"opencv", "fast", "batched"}, default "opencv"
        See :func:`~patchnetvlad.matching.ransac.homography_inliers`.

    Returns
    -------
    PatchMatches

    Raises
    ------
    ConfigError
        The matcher is unknown.
    """
    pairs = mutual_nearest_neighbours(query, candidate)
    return score_matches(pairs, query_grid, candidate_grid, matcher, ransac)


def score_matches(
    pairs: Pairs,
    query_grid: PatchGrid,
    candidate_grid: PatchGrid,
    matcher: str,
    ransac: str = "opencv",
) -> PatchMatches:
    """Score the mutual nearest neighbours of one size; see :func:`match_patches`."""
    ours, theirs = pairs
    if matcher == "RANSAC":
        homography, inliers = homography_inliers(
            *keypoints_of(pairs, query_grid, candidate_grid), method=ransac
        )
        score = inlier_score(inliers, query_grid)
        return PatchMatches(score, ours[inliers], theirs[inliers], homography)
    if matcher == "spatialApproximator":
        score = spatial_score(
            query_grid.indices[ours],
            candidate_grid.indices[theirs],
            query_grid.indices.max(axis=0),
            len(query_grid),
        )
        return PatchMatches(score, ours, theirs)
    raise ConfigError(f"unknown matcher {matcher!r}; one of RANSAC, spatialApproximator")


def keypoints_of(pairs: Pairs, query_grid: PatchGrid, candidate_grid: PatchGrid) -> Problem:
    """Return the input of RANSAC.

    These are the key points [m, 2] of query and candidate, px, and the stride, cells of 16 px.
    """
    ours, theirs = pairs
    return query_grid.keypoints[ours], candidate_grid.keypoints[theirs], query_grid.step / STRIDE


def inlier_score(inliers: NDArray[np.bool_], query_grid: PatchGrid) -> float:
    """Return minus the number of inliers ([m] of bool) over the number of query patches."""
    return -float(inliers.sum()) / len(query_grid) + 0.0


def match_pair(
    query: Sequence[Tensor],
    candidate: Sequence[Tensor],
    query_grids: Sequence[PatchGrid],
    candidate_grids: Sequence[PatchGrid],
    matcher: str,
    ransac: str = "opencv",
) -> list[PatchMatches]:
    """Match two images at every patch size; see :func:`match_patches`.

    Parameters
    ----------
    query, candidate : sequence of Tensor [n_s, P]
        One per patch size.
    query_grids, candidate_grids : sequence of PatchGrid
        Likewise.
    matcher : {"RANSAC", "spatialApproximator"}
    ransac : {"opencv", "fast", "batched"}, default "opencv"

    Returns
    -------
    list of PatchMatches
        One per patch size.
    """
    return [
        match_patches(q, c, q_grid, c_grid, matcher, ransac)
        for q, c, q_grid, c_grid in zip(query, candidate, query_grids, candidate_grids, strict=True)
    ]


def similarity(matches: Sequence[PatchMatches], weights: Sequence[float]) -> float:
    """Return minus the weighted sum of the scores: larger is more similar.

    Examples
    --------
    >>> nobody = np.empty(0, np.int64)
    >>> of_sizes = [PatchMatches(score, nobody, nobody) for score in (-0.2, -0.1)]
    >>> similarity(of_sizes, weights=[0.5, 1.0])
    0.2
    """
    total = 0.0
    for weight, found in zip(weights, matches, strict=True):
        total += weight * found.score  # not sum(), which rounds otherwise from Python 3.12 on
    return -total + 0.0
