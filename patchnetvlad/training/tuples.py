# SPDX-License-Identifier: MIT
"""Training data: queries, and which images show their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.errors import GroundTruthError

Rows = list[NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class Area:
    """A city or another area, whose queries are searched in its own index.

    Attributes
    ----------
    name : str
    queries, index : tuple of Path or str
        Q and N images: files or URLs.
    utm_queries, utm_index : ndarray [Q, c], [N, c] of float64
        Positions, which are comparable within an area.
    night, sideways : ndarray [Q] of bool
        Queries that are rare, and drawn more often.
    one_list : bool
        Queries and index are the same images, of which none is its own positive.
    headings : ndarray [N] of float64, optional
        Of the index images, in degrees; NaN where they are not known.
    """

    name: str
    queries: tuple[Path | str, ...]
    index: tuple[Path | str, ...]
    utm_queries: NDArray[np.float64]
    utm_index: NDArray[np.float64]
    night: NDArray[np.bool_]
    sideways: NDArray[np.bool_]
    one_list: bool = False
    headings: NDArray[np.float64] | None = None

    def within(self, distance: float) -> Rows:
        """Return for every query the rows of the index images within a distance, ascending."""
        found = GroundTruth(self.utm_queries, self.utm_index, distance).positives()
        if self.one_list:
            return [rows[rows != query] for query, rows in enumerate(found)]
        return found


@dataclass(frozen=True, eq=False)
class TupleSet:
    """Queries with positives, and index images, of all areas together.

    Attributes
    ----------
    queries, index : tuple of Path or str
        Q and N images.
    positives : list of ndarray of int64, length Q
        Rows of the index, at least one.
    close : list of ndarray of int64, length Q
        Rows of the index that are no negatives; all others are.
    weights : ndarray [Q] of float64
        By which queries are drawn.
    left_out : int
        Queries without a positive.
    """

    queries: tuple[Path | str, ...]
    index: tuple[Path | str, ...]
    positives: Rows
    close: Rows
    weights: NDArray[np.float64]
    left_out: int

    @classmethod
    def of_areas(
        cls, areas: Sequence[Area], positive_distance: float, negative_distance: float
    ) -> TupleSet:
        """Combine areas.

        Parameters
        ----------
        areas : sequence of Area
        positive_distance, negative_distance : float
            An index image within the first of a query is a positive; one beyond the second, or of
            another area, is a negative.

        Returns
        -------
        TupleSet

        Raises
        ------
        GroundTruthError
            No query has a positive, or none has a negative.
        """
        queries: list[Path | str] = []
        index: list[Path | str] = []
        positives: Rows = []
        close: Rows = []
        rare: list[list[bool]] = [[], []]
        total = 0
        for area in areas:
            total += len(area.queries)
            near, around = area.within(positive_distance), area.within(negative_distance)
            for row, (right, neighbours) in enumerate(zip(near, around, strict=True)):
                if len(right) == 0:
                    continue
                own = [len(index) + row] if area.one_list else []
                queries.append(area.queries[row])
                positives.append(right + len(index))
                close.append(np.union1d(neighbours + len(index), own).astype(np.int64))
                rare[0].append(bool(area.night[row]))
                rare[1].append(bool(area.sideways[row]))
            index += area.index
        _check(len(queries), total, close, len(index), positive_distance, negative_distance)
        weights = _weights(*(np.array(flags, dtype=bool) for flags in rare))
        return cls(tuple(queries), tuple(index), positives, close, weights, total - len(queries))


def _check(
    count: int, total: int, close: Rows, num_index: int, positive: float, negative: float
) -> None:
    if count == 0:
        raise GroundTruthError(
            f"none of {total} queries has another image within {positive:g} of it: to learn from a "
            "place, it takes two images of it; raise posdistthr, or add images"
        )
    if all(len(rows) == num_index for rows in close):
        raise GroundTruthError(
            f"all of {num_index} index images lie within {negative:g} of every query: there is one "
            "place, and nothing to tell it from; lower negdistthr, or add images of other places"
        )


def _weights(night: NDArray[np.bool_], sideways: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return 1, and for each rarity the inverse of its frequency more."""
    weights = np.ones(len(night))
    for flags in (night, sideways):
        if flags.any():
            weights[flags] += len(flags) / np.count_nonzero(flags)
    return weights
