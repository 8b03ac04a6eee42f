# SPDX-License-Identifier: MIT
"""Hard triplets: the nearest positive of a query, and its nearest negatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.training.tuples import TupleSet


class DescribeAll(Protocol):
    """Extracts features with a network in training."""

    def __call__(
        self, paths: Sequence[Path | str]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the global descriptors [N, d] of images, and which [N] could be read."""


@dataclass(frozen=True)
class Triplet:
    """A query, its positive and its hard negatives.

    Attributes
    ----------
    query : int
        Row of the queries of a :class:`TupleSet`.
    positive : int
        Row of its index images.
    negatives : tuple of int
        Rows of its index images, nearest first; at least one.
    """

    query: int
    positive: int
    negatives: tuple[int, ...]


def draw_queries(
    data: TupleSet, a_subset: int, random: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Draw the queries of an epoch by their weights, in subsets of about ``a_subset``.

    As many are drawn as there are, with replacement where weights differ.

    Parameters
    ----------
    data : TupleSet
    a_subset : int
    random : numpy.random.Generator

    Returns
    -------
    list of ndarray of int64
        Rows of the queries.
    """
    count = len(data.queries)
    if np.ptp(data.weights) == 0:
        drawn = random.permutation(count)
    else:
        drawn = random.choice(count, count, p=data.weights / data.weights.sum())
    return np.array_split(drawn, -(-count // a_subset))


def mine(
    data: TupleSet,
    queries: NDArray[np.int64],
    describe: DescribeAll,
    random: np.random.Generator,
    *,
    cached_negatives: int,
    num_negatives: int,
) -> list[Triplet]:
    """Find the nearest positive and the nearest negatives of queries, as a network sees them.

    Parameters
    ----------
    data : TupleSet
    queries : ndarray of int64
        Rows.
    describe : DescribeAll
    random : numpy.random.Generator
        Draws the index images that are looked through, ``cached_negatives`` of them.
    cached_negatives, num_negatives : int
        A triplet has up to ``num_negatives``.

    Returns
    -------
    list of Triplet
        In the order of the queries, without those that have no negative among the images looked
        through. Images that cannot be read are in none.
    """
    count = min(cached_negatives, len(data.index))
    looked_at = np.sort(random.permutation(len(data.index))[:count])
    positives = np.unique(np.concatenate([data.positives[q] for q in queries]))
    rows = np.union1d(looked_at, positives)
    vectors, readable = describe([data.index[row] for row in rows])
    of_queries, queries_readable = describe([data.queries[q] for q in queries])
    usable = readable & np.isin(rows, looked_at)
    lengths = np.square(vectors).sum(axis=1)
    triplets = []
    for query, vector, ok in zip(queries, of_queries, queries_readable, strict=True):
        right = np.flatnonzero(np.isin(rows, data.positives[query]) & readable)
        if not ok or len(right) == 0:
            continue
        squares = lengths - 2 * (vectors @ vector)  # less the query's own length, the same for all
        nearest = right[squares[right].argmin()]
        wrong = np.flatnonzero(usable & ~np.isin(rows, data.close[query]))
        hard = wrong[np.argsort(squares[wrong], kind="stable")][:num_negatives]
        if len(hard):
            negatives = tuple(int(row) for row in rows[hard])
            triplets.append(Triplet(int(query), int(rows[nearest]), negatives))
    return triplets
