# SPDX-License-Identifier: MIT
"""A match of two images: similarity and matched patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.base.device import choose_device
from patchnetvlad.errors import ConfigError, FeatureError
from patchnetvlad.matching.pair import PatchMatches, match_pair, similarity
from patchnetvlad.places.description import Description
from patchnetvlad.plots.match import plot_match

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Match:
    """Result of matching two images.

    Attributes
    ----------
    score : float
        Similarity, from 0; larger is more similar. Comparable between the candidates of a query
        and, with some care, between queries: a good threshold depends on the places and the
        configuration.
    patch_scores : ndarray [S] of float64
        Score at each patch size; lower is better. ``score`` is their negated sum, with the
        weights of the configuration.
    matches : tuple of PatchMatches
        The matched patches, one entry per patch size.
    query, candidate : Description
    """

    score: float
    patch_scores: NDArray[np.float64]
    matches: tuple[PatchMatches, ...]
    query: Description
    candidate: Description

    @property
    def inliers(self) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]:
        """Matched key points of (query, candidate), [m, 2] each, per patch size.

        (x, y) in px of ``query.image`` and ``candidate.image``. With ``matcher = RANSAC``, inliers
        of the homography; otherwise all mutual nearest neighbours.
        """
        return tuple(
            (ours.keypoints[found.query_patches], theirs.keypoints[found.candidate_patches])
            for found, ours, theirs in zip(
                self.matches, self.query.grids, self.candidate.grids, strict=True
            )
        )

    @property
    def homography(self) -> NDArray[np.float64] | None:
        """[3, 3], from px of the candidate to px of the query.

        From the patch size with the most inliers; None if there is none.
        """
        found = [m for m in self.matches if m.homography is not None]
        return max(found, key=lambda m: len(m.query_patches)).homography if found else None

    def plot(self, **options: Any) -> Figure:
        """Draw the matches; see :func:`patchnetvlad.plots.match.plot_match`."""
        return plot_match(self, **options)

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{len(found.query_patches)} of size {grid.patch_size}"
            for found, grid in zip(self.matches, self.query.grids, strict=True)
        )
        return f"Match(score={self.score:.5f}, matches: {counts})"


def match(a: Description, b: Description, *, device: str | torch.device = "cpu") -> Match:
    """Match the patches of two images (paper, sections 3.3 to 3.5).

    Parameters
    ----------
    a : Description
        The query; its configuration is used for matching.
    b : Description
        The candidate.
    device : str or torch.device, default "cpu"
        Device on which nearest neighbours are computed.

    Returns
    -------
    Match

    Raises
    ------
    ConfigError
        The model has no patches.
    FeatureError
        The features are from different models or configurations.
    DeviceError

    Examples
    --------
    >>> from patchnetvlad import load_model, match
    >>> from patchnetvlad.assets.data_files import demo_images
    >>> images, model = demo_images(), load_model("demo", device="cpu")
    >>> a, b, c = model.describe([images[k] for k in ("tokyo_query", "tokyo_db", "flower")])
    >>> match(a, b).score > match(a, c).score
    True
    """
    for what in (a, b):
        if not isinstance(what, Description):
            raise FeatureError(
                f"{type(what).__name__} cannot be matched; give what model.describe(image) returns"
            )
    config, target = a.config, choose_device(device)
    config.check_matching()
    if not config.uses_patches:
        raise ConfigError(
            f"{config.source}: matching two images needs pooling = patchnetvlad, "
            f"not {config.pooling}"
        )
    if not a.patches or not b.patches:
        raise FeatureError(
            "an image was described without patches, as query(rerank=False) does; describe it with "
            "model.describe"
        )
    kinds = [
        [(g.patch_size, g.stride, p.shape[1]) for g, p in zip(x.grids, x.patches, strict=True)]
        for x in (a, b)
    ]
    if kinds[0] != kinds[1]:
        sizes = [", ".join(f"{s} (stride {t}, P = {p})" for s, t, p in kind) for kind in kinds]
        raise FeatureError(
            f"the images were described differently, with patches of size {sizes[0]} and "
            f"{sizes[1] or 'none'}; describe both with one model"
        )
    ours, theirs = ([torch.from_numpy(p).to(target) for p in x.patches] for x in (a, b))
    found = match_pair(ours, theirs, a.grids, b.grids, config.matcher, config.ransac)
    scores = np.array([m.score for m in found])
    return Match(similarity(found, config.patch_weights), scores, tuple(found), a, b)
