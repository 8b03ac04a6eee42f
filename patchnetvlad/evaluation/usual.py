# SPDX-License-Identifier: MIT
"""What scores mean: typical scores of right and wrong pairs of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config import Config
from patchnetvlad.models.grid import patch_grids

SHARES = (0.1, 0.5, 0.9)
"""Quantiles that are told: the middle 80 % and the median."""

Quantiles = tuple[float, float, float]

_CHECKPOINT = "9b8034f03707482151ca53fa4e113a010f386c4a64b17a1e27edc7d3bf60f8ef"
_OF = ((2, 5, 8), (1, 1, 1), (0.45, 0.15, 0.4), "RANSAC", (480, 640))


@dataclass(frozen=True)
class Spread:
    """Distribution of the scores of some pairs of images.

    Attributes
    ----------
    pairs : int
    score : tuple of 3 floats
        Quantiles 10 %, 50 % and 90 % of the similarity score; larger is more similar.
    patches : tuple of such tuples
        The same quantiles of the number of patches that agree, one entry per patch size; empty
        if unknown.
    """

    pairs: int
    score: Quantiles
    patches: tuple[Quantiles, ...] = ()


@dataclass(frozen=True)
class Usual:
    """Typical scores of right and wrong pairs, and the data on which they were measured.

    Attributes
    ----------
    right : Spread or None
        Right first answers.
    wrong : Spread or None
        Wrong first answers.
    best_wrong : Spread or None
        The first wrong candidate of every query: what is answered where the place is not in the
        index.
    source : str
        What it was measured on; empty: the run itself.
    """

    right: Spread | None
    wrong: Spread | None
    best_wrong: Spread | None
    source: str = ""


def patches_of(config: Config) -> tuple[int, ...]:
    """Return the number of patches of an image at each patch size; empty if sizes are native."""
    size = config.match_image_size
    if size == (0, 0):
        return ()
    return tuple(
        len(grid) for grid in patch_grids(size, config.patch_sizes, config.strides, config.geometry)
    )


def agreeing(
    patch_scores: NDArray[np.floating], patches: Sequence[int], matcher: str
) -> NDArray[np.int64] | None:
    """Return how many patches agree, from the scores at each patch size.

    Parameters
    ----------
    patch_scores : ndarray [..., S] of float
        Lower is better.
    patches : sequence of S int
        Patches of the query.
    matcher : str
        Only RANSAC's scores are numbers of patches (inliers), over that of all.

    Returns
    -------
    ndarray [..., S] of int64 or None
        None where scores do not tell it.
    """
    if matcher != "RANSAC" or len(patches) != np.shape(patch_scores)[-1]:
        return None
    return np.rint(-np.asarray(patch_scores, np.float64) * np.asarray(patches)).astype(np.int64)


def measure_usual(
    right: NDArray[np.bool_],
    scores: NDArray[np.floating],
    patches: NDArray[np.integer] | None = None,
) -> Usual:
    """Measure how right and wrong pairs of a run score.

    Parameters
    ----------
    right : ndarray [Q, k] of bool
        Whether candidates are right, in the order of the answers.
    scores : ndarray [Q, k] of float
        Their similarity scores.
    patches : ndarray [Q, k, S] of int, optional
        How many of their patches agree.

    Returns
    -------
    Usual

    Examples
    --------
    >>> right = np.array([[True, False], [False, False]])
    >>> usual = measure_usual(right, np.array([[0.9, 0.2], [0.4, 0.3]]))
    >>> usual.right.score, usual.wrong.pairs, usual.best_wrong.pairs
    ((0.9, 0.9, 0.9), 1, 2)
    """
    first = np.zeros_like(right)
    first[:, :1] = True
    # The first wrong candidate of each query that has one.
    wrong_before = np.cumsum(~right, axis=1)
    best_wrong = ~right & (wrong_before == 1)
    return Usual(
        _spread(first & right, scores, patches),
        _spread(first & ~right, scores, patches),
        _spread(best_wrong, scores, patches),
    )


def _spread(
    mask: NDArray[np.bool_], scores: NDArray[np.floating], patches: NDArray[np.integer] | None
) -> Spread | None:
    if not mask.any():
        return None
    found = () if patches is None else tuple(map(_quantiles, patches[mask].T))
    return Spread(int(mask.sum()), _quantiles(scores[mask]), found)


def _quantiles(values: NDArray[np.generic]) -> Quantiles:
    low, middle, high = np.quantile(np.asarray(values, np.float64), SHARES).tolist()
    return low, middle, high


# Measured with `demo`, as docs/scores.md says.
_SHIPPED = (
    Usual(
        Spread(27, (0.0303, 0.1101, 0.1664), ((40, 143, 216), (28, 99, 150), (22, 64, 117))),
        Spread(6, (0.0624, 0.0856, 0.1453), ((86, 112, 174), (56, 90, 139), (32, 56, 102))),
        Spread(33, (0.0195, 0.0480, 0.0930), ((29, 66, 135), (15, 46, 105), (10, 29, 63))),
        "an indoor walk-through of two floors that look alike",
    ),
    Usual(
        Spread(4, (0.0083, 0.0121, 0.0363), ((12, 16, 50), (7, 10, 41), (5, 8, 19))),
        Spread(1, (0.0088, 0.0088, 0.0088), ((8, 8, 8), (9, 9, 9), (8, 8, 8))),
        Spread(5, (0.0066, 0.0077, 0.0088), ((8, 9, 12), (5, 6, 9), (4, 5, 7))),
        "the images of patchnetvlad-demo",
    ),
)


def known_usual(config: Config, checkpoint: str = "") -> tuple[Usual, ...]:
    """Return typical scores of the bundled checkpoint, for each data set measured.

    Parameters
    ----------
    config : Config
    checkpoint : str
        SHA-256 of the weights, if it is known.

    Returns
    -------
    tuple of Usual
        Empty for any other checkpoint, and other settings than those of ``demo``.
    """
    settings = ("patch_sizes", "strides", "patch_weights", "matcher", "match_image_size")
    same = all(getattr(config, name) == value for name, value in zip(settings, _OF, strict=True))
    named = Path(config.resume_path).name == "imagenet_WPCA" and config.num_pcs == 128
    ours = checkpoint == _CHECKPOINT if checkpoint else named
    return _SHIPPED if same and ours else ()
