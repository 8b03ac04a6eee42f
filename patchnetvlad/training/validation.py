# SPDX-License-Identifier: MIT
"""Validation: recalls of global descriptors, area by area."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.evaluation.recall import recall_at_n
from patchnetvlad.search.retrieve import retrieve
from patchnetvlad.training.mining import DescribeAll
from patchnetvlad.training.tuples import Area, Rows

N_VALUES = (1, 5, 10, 20, 50, 100)


def validate(
    areas: Sequence[Area],
    describe: DescribeAll,
    distance: float,
    n_values: Sequence[int] = N_VALUES,
) -> dict[int, float]:
    """Compute recall@N over the queries of all areas, each searched in its own index.

    Parameters
    ----------
    areas : sequence of Area
    describe : DescribeAll
        Images that cannot be read are not found, and find nothing.
    distance : float
        An index image within it is right. Queries without one do not count.
    n_values : sequence of int, default (1, 5, 10, 20, 50, 100)

    Returns
    -------
    dict of int to float
        Recall by N, between 0 and 1; 0 where no query counts.
    """
    hits = np.zeros(len(n_values))
    total = 0
    for area in areas:
        right = area.within(distance)
        counted = [row for row, rows in enumerate(right) if len(rows)]
        if not counted:
            continue
        vectors, readable = describe(area.index)
        if area.one_list:
            queries, ok = vectors[counted], readable[counted]
        else:
            queries, ok = describe([area.queries[row] for row in counted])
        total += len(counted)
        rows, kept = np.array(counted)[ok], np.flatnonzero(readable)
        if len(rows) == 0 or len(kept) == 0:
            continue
        most = max(n_values)
        found = kept[retrieve(queries[ok], vectors[kept], most + area.one_list)]
        if area.one_list:  # of which each image is the nearest to itself
            found = np.array([
                near[near != row][:most] if row in near else near[:most]
                for row, near in zip(rows, found, strict=True)
            ])  # fmt: skip
        hits += recall_at_n(found, [right[row] for row in rows], n_values) * len(rows)
    return {n: float(hit / max(total, 1)) for n, hit in zip(n_values, hits, strict=True)}


def recalls_of(
    queries: NDArray[np.float32], index: NDArray[np.float32], right: Rows
) -> NDArray[np.float64]:
    """Compute recall@N, for each of ``N_VALUES``, of the descriptors [Q, d] and [N, d]."""
    return recall_at_n(retrieve(queries, index, max(N_VALUES)), right, N_VALUES)
