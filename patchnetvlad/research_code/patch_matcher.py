# SPDX-License-Identifier: MIT
"""Patch matching under the names of the research code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.matching.nearest import nearest_neighbours
from patchnetvlad.matching.pair import match_pair
from patchnetvlad.models.grid import PatchGrid

Keypoints = list[NDArray[np.int64]]


def torch_nn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Find nearest neighbours in both directions.

    Parameters
    ----------
    x : Tensor [n, P]
        L2-normalised query descriptors.
    y : Tensor [P, m]
        L2-normalised index descriptors, transposed.

    Returns
    -------
    forward : Tensor [m] of int64
        Row of ``x`` nearest to each column of ``y``.
    backward : Tensor [n] of int64
        Column of ``y`` nearest to each row of ``x``.
    """
    return nearest_neighbours(x, y.T)


class PatchMatcher:
    """Match two images' patch descriptors at several sizes.

    Parameters
    ----------
    matcher : {"RANSAC", "spatialApproximator"}
    patch_sizes, strides : sequence of int
        In cells.
    all_keypoints : sequence of ndarray [2, n_s]
        Centres, px, one array per patch size, x in the first row.
    all_indices : sequence of ndarray [2, n_s]
        Grid places, columns in the first row.
    """

    def __init__(
        self,
        matcher: str,
        patch_sizes: Sequence[int],
        strides: Sequence[int],
        all_keypoints: Sequence[NDArray[np.int64]],
        all_indices: Sequence[NDArray[np.int64]],
    ) -> None:
        self.matcher = matcher
        self.patch_sizes = patch_sizes
        self.strides = strides
        self.all_keypoints = all_keypoints
        self.all_indices = all_indices

    def match(
        self, qfeats: Sequence[Tensor], dbfeats: Sequence[Tensor]
    ) -> tuple[list[float], Keypoints | None, Keypoints | None]:
        """Match with the matcher given at construction.

        Parameters
        ----------
        qfeats : sequence of Tensor [n_s, P]
            Query, one per patch size.
        dbfeats : sequence of Tensor [P, n_s]
            Index image, transposed.

        Returns
        -------
        scores : list of float
            One a patch size; lower is better.
        inlier_keypoints_query, inlier_keypoints_index : list of ndarray [m, 2], or None
            Centres of the inliers, px; None for ``spatialApproximator``.

        Raises
        ------
        ConfigError
            The matcher is unknown.
        """
        if self.matcher == "spatialApproximator":
            return self.compare_two_spatial(qfeats, dbfeats)
        return self._match(qfeats, dbfeats, self.matcher)

    def compare_two_ransac(
        self, qfeats: Sequence[Tensor], dbfeats: Sequence[Tensor]
    ) -> tuple[list[float], Keypoints, Keypoints]:
        """Match by RANSAC; see :meth:`match`."""
        return self._match(qfeats, dbfeats, "RANSAC")

    def compare_two_spatial(
        self, qfeats: Sequence[Tensor], dbfeats: Sequence[Tensor]
    ) -> tuple[list[float], None, None]:
        """Match by rapid spatial scoring; see :meth:`match`."""
        return self._match(qfeats, dbfeats, "spatialApproximator")[0], None, None

    def _match(
        self, qfeats: Sequence[Tensor], dbfeats: Sequence[Tensor], matcher: str
    ) -> tuple[list[float], Keypoints, Keypoints]:
        grids = [
            PatchGrid(size, stride, np.asarray(keypoints).T, np.asarray(indices).T)
            for size, stride, keypoints, indices in zip(
                self.patch_sizes, self.strides, self.all_keypoints, self.all_indices, strict=True
            )
        ]
        found = match_pair(qfeats, [feats.T for feats in dbfeats], grids, grids, matcher)
        return (
            [matches.score for matches in found],
            [g.keypoints[m.query_patches] for g, m in zip(grids, found, strict=True)],
            [g.keypoints[m.candidate_patches] for g, m in zip(grids, found, strict=True)],
        )
