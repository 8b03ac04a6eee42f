# SPDX-License-Identifier: MIT
"""Selecting a few matches that represent all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAX_LINES = 15
"""Matches drawn between two images: many more hide the images and each other."""


def spread_out(points: Sequence[NDArray[np.floating]], most: int) -> list[NDArray[np.int64]]:
    """Choose matches that are far apart, alternating between patch sizes.

    Each choice is the match farthest from all chosen ones, of any size; the first is that farthest
    from the middle of all.

    Parameters
    ----------
    points : sequence of ndarray [m, D] of float
        Where the matches of each patch size lie; any coordinates, such as those in the query.
    most : int
        Matches chosen in all. A size that has fewer than its share leaves the rest to others.

    Returns
    -------
    list of ndarray of int64
        Rows of ``points`` that are chosen, ascending, one array per size.

    Examples
    --------
    >>> [rows.tolist() for rows in spread_out([np.array([[0.0], [1.0], [9.0], [10.0]])], 2)]
    [[0, 3]]
    """
    everywhere = np.concatenate(list(points)) if points else np.zeros((0, 1))
    if len(everywhere) <= most:
        return [np.arange(len(of)) for of in points]
    middle = everywhere.mean(axis=0)
    away = [np.linalg.norm(of - middle, axis=1) for of in points]  # from the nearest chosen one
    chosen: list[list[int]] = [[] for _ in points]
    while most:
        for s in sorted(range(len(points)), key=lambda s: len(points[s])):
            if not most or len(chosen[s]) == len(points[s]):
                continue
            row = int(away[s].argmax())
            first = not any(chosen)
            chosen[s].append(row)
            most -= 1
            for t, of in enumerate(points):
                near = np.linalg.norm(of - points[s][row], axis=1)
                away[t] = near if first else np.minimum(away[t], near)
                away[t][chosen[t]] = -1.0
    return [np.sort(np.array(rows, dtype=np.int64)) for rows in chosen]
