# SPDX-License-Identifier: MIT
"""Asynchronous matching and scoring of a query's candidates on an accelerator.

Matches stay on the device: what they are depends on data, so they are kept in tensors that are as
long as there are patches, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.base.device import upload
from patchnetvlad.matching.batched_ransac import solve
from patchnetvlad.matching.nearest import mutual_on_device
from patchnetvlad.models.grid import STRIDE, PatchGrid

Grids = Sequence[PatchGrid]


def find_matches(query: Sequence[Tensor], candidates: Sequence[Sequence[Tensor]]) -> Tensor:
    """Find the mutual nearest neighbours of a query with B candidates at every patch size.

    Parameters
    ----------
    query : sequence of Tensor [n_s, P], length S
        L2-normalised patch descriptors, one matrix per patch size.
    candidates : sequence of sequence of Tensor [m_s, P], length B >= 1
        Likewise, of each candidate.

    Returns
    -------
    Tensor [S, B, L] of int64
        Query patch of each candidate patch, or -1; L is the largest number of patches.
    """
    pairs = [(ours, of[s]) for s, ours in enumerate(query) for of in candidates]
    return mutual_on_device(pairs).unflatten(0, (len(query), len(candidates)))


def score_candidates(
    query: Sequence[Tensor],
    candidates: Sequence[Sequence[Tensor]],
    query_grids: Grids,
    candidate_grids: Sequence[Grids],
    matcher: str,
) -> Tensor:
    """Score B candidates of a query at every patch size.

    Parameters
    ----------
    query : sequence of Tensor [n_s, P], length S
        L2-normalised patch descriptors, one matrix per patch size.
    candidates : sequence of sequence of Tensor [m_s, P], length B >= 1
    query_grids : sequence of PatchGrid, length S
    candidate_grids : sequence of sequence of PatchGrid, length B
    matcher : {"RANSAC", "spatialApproximator"}
        RANSAC uses :func:`~patchnetvlad.matching.batched_ransac.solve`.

    Returns
    -------
    Tensor [B, S] of float64
        Lower is better; equal to :func:`~patchnetvlad.matching.pair.score_matches` on the CPU
        (spatialApproximator: up to the rounding of sums).
    """
    found = find_matches(query, candidates).flatten(0, 1)  # [S * B, L]
    matches = _Matches.of(found, _grid_pairs(query_grids, candidate_grids))
    scores = _inlier_scores(matches) if matcher == "RANSAC" else _spatial_scores(matches)
    return scores.view(len(query), len(candidates)).T


def _grid_pairs(
    query_grids: Grids, candidate_grids: Sequence[Grids]
) -> list[tuple[PatchGrid, PatchGrid]]:
    return [(ours, of[s]) for s, ours in enumerate(query_grids) for of in candidate_grids]


@dataclass(frozen=True, eq=False)
class _Matches:
    """The matches of B pairs of patch sets.

    Attributes
    ----------
    query, candidate : Tensor [B, 2, L] of float64
        (column, row) in the grid, by ascending candidate patch; beyond the matches, that of
        patch 0.
    counts : Tensor [B] of int64
        Matches.
    origins : Tensor [2, B, 2] of float64
        Key point (x, y), px, of the first patch, of query and candidate.
    strides : Tensor [B] of float64
        Between patches, cells of 16 px.
    largest : Tensor [B, 2] of float64
        Largest column and row of the query's grid.
    sizes : Tensor [B] of float64
        Patches n_s of the query.
    """

    query: Tensor
    candidate: Tensor
    counts: Tensor
    origins: Tensor
    strides: Tensor
    largest: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, found: Tensor, grids: Sequence[tuple[PatchGrid, PatchGrid]]) -> _Matches:
        """Gather what :func:`mutual_on_device` found [B, L]."""
        given = upload(_geometry(grids), found.device)  # [B, 10]
        ours, theirs, counts = _gathered(found)
        columns = given[:, 8:, None].unbind(1)  # of query and candidate, [B, 1] each
        query, candidate = (
            torch.stack([patches % count, patches // count], dim=1).double()
            for patches, count in zip((ours, theirs), columns, strict=True)
        )
        numbers = given.double()
        return cls(
            query,
            candidate,
            counts,
            numbers[:, :4].unflatten(1, (2, 2)).transpose(0, 1),
            numbers[:, 4] / STRIDE,
            numbers[:, 5:7],
            numbers[:, 7],
        )

    def there(self) -> Tensor:
        """True where there is a match, [B, 1, L] of bool."""
        length = self.query.shape[2]
        return (torch.arange(length, device=self.counts.device) < self.counts[:, None])[:, None]


def _geometry(grids: Sequence[tuple[PatchGrid, PatchGrid]]) -> NDArray[np.int64]:
    """Return the geometry [B, 10] of grids of query and candidate; most are the same."""
    rows: dict[tuple[int, int], list[int]] = {}
    table = []
    for ours, theirs in grids:
        key = id(ours), id(theirs)
        if key not in rows:
            rows[key] = [
                *ours.keypoints[0], *theirs.keypoints[0], ours.step, *ours.indices[-1],
                len(ours), ours.indices[-1, 0] + 1, theirs.indices[-1, 0] + 1,
            ]  # fmt: skip
        table.append(rows[key])
    return np.array(table, dtype=np.int64)


def _gathered(found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move matches to the front: patches of query and candidate [B, L], and their number [B]."""
    length = found.shape[1]
    matched = found >= 0
    target = torch.where(matched, matched.cumsum(dim=1) - 1, length)  # the rest, in one heap
    patches = torch.arange(length, device=found.device).expand_as(found)
    ours, theirs = (
        found.new_zeros((len(found), length + 1)).scatter_(1, target, values)[:, :length]
        for values in (found, patches)
    )
    return ours, theirs, matched.sum(dim=1)


def _inlier_scores(matches: _Matches) -> Tensor:
    """Return minus the share [B] of the query's patches that are inliers of a homography."""
    step = STRIDE * matches.strides[:, None, None]
    query, candidate = (
        origin[..., None] + step * places
        for origin, places in zip(matches.origins, (matches.query, matches.candidate), strict=True)
    )
    _, inliers = solve(query, candidate, matches.counts, matches.strides)
    return -(inliers.sum(dim=1).double() / matches.sizes) + 0.0


def _spatial_scores(matches: _Matches) -> Tensor:
    """Score [B] how well displacements agree (paper, equation 9)."""
    there = matches.there()
    displacement = torch.where(there, matches.candidate - matches.query, 0)  # [B, 2, L]
    mean = displacement.sum(dim=2) / matches.counts.clamp_min(1)[:, None]
    residual = (displacement - mean[..., None]).abs()
    agreement = torch.where(there, (matches.largest[..., None] - residual).square(), 0)
    return -(agreement.sum(dim=(1, 2)) / matches.sizes) + 0.0
