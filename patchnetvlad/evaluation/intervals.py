# SPDX-License-Identifier: MIT
"""Statistics: bootstrap intervals over queries, and tests of one method against another.

Neighbouring queries of a traverse show nearly the same thing, so they are right or wrong together.
Blocks of consecutive queries are drawn, not single ones, which keeps their dependence (circular
block bootstrap, Politis and Romano, 1992).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import ArgumentError

RESAMPLES = 2000
LEVEL = 0.95
_DRAWN_TOGETHER = 2**22  # counts of queries in memory

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Draws queries with replacement, in blocks.

    Two figures of the same queries are compared on the same draws.

    Attributes
    ----------
    num_queries : int
        Q.
    block : int, default 0
        Consecutive queries that are drawn together; 1 for independent queries. 0 chooses the whole
        number next to the cube root of Q, the order at which the error of the variance is least
        (Künsch, 1989).
    groups : sequence of Q hashables, optional
        Draw groups of queries, such as traverses, in place of blocks.
    resamples : int, default 2000
    seed : int, default 0

    Raises
    ------
    ArgumentError
        A number is out of range, or there is not one group per query.
    """

    num_queries: int
    block: int = 0
    groups: Sequence[object] | None = None
    resamples: int = RESAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num_queries", self.num_queries, 1),
            ("block", self.block, 0),
            ("resamples", self.resamples, 1),
        ):
            if value < least:
                raise ArgumentError(f"{name} = {value} must be {least} or more")
        if self.groups is not None and len(self.groups) != self.num_queries:
            raise ArgumentError(f"{len(self.groups)} groups for {self.num_queries} queries")

    @property
    def block_length(self) -> int:
        """Consecutive queries that are drawn together."""
        return min(self.block or max(1, round(self.num_queries ** (1 / 3))), self.num_queries)

    def __str__(self) -> str:
        if self.groups is not None:
            return f"{len(set(self.groups))} groups of queries"
        length = self.block_length
        return "single queries" if length == 1 else f"blocks of {length} consecutive queries"

    def draws(self) -> Iterator[NDArray[np.float64]]:
        """Draw, a few resamples at a time.

        Yields
        ------
        ndarray [b, Q] of float64
            How often each query was drawn; these are the same whenever the method is called.
        """
        random = np.random.default_rng(self.seed)
        at_a_time = max(1, _DRAWN_TOGETHER // self.num_queries)
        for start in range(0, self.resamples, at_a_time):
            count = min(at_a_time, self.resamples - start)
            yield self._groups(random, count) if self.groups else self._blocks(random, count)

    def _blocks(self, random: np.random.Generator, count: int) -> NDArray[np.float64]:
        q, length = self.num_queries, self.block_length
        starts = random.integers(q, size=(count, math.ceil(q / length)))
        rows = (starts[:, :, None] + np.arange(length)) % q  # [b, blocks, length]
        rows = rows.reshape(count, -1)[:, :q] + q * np.arange(count)[:, None]
        return np.bincount(rows.ravel(), minlength=count * q).reshape(count, q).astype(np.float64)

    def _groups(self, random: np.random.Generator, count: int) -> NDArray[np.float64]:
        assert self.groups is not None
        number: dict[object, int] = {}
        of = np.array([number.setdefault(group, len(number)) for group in self.groups])
        drawn = random.multinomial(len(number), [1 / len(number)] * len(number), size=count)
        return drawn[:, of].astype(np.float64)

    def distribution(self, statistic: Statistic) -> NDArray[np.float64]:
        """Compute a statistic [b, ...] of weights [b, Q] on all resamples [B, ...]."""
        return np.concatenate([statistic(weights) for weights in self.draws()])

    def interval(
        self, statistic: Statistic, level: float = LEVEL
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the lower and the upper end of the percentile interval of a statistic.

        Parameters
        ----------
        statistic : callable
            Computes [b, ...] from the weights [b, Q] of the queries.
        level : float, default 0.95
            Its coverage, between 0 and 1.

        Returns
        -------
        low, high : ndarray [...] of float64
        """
        found = self.distribution(statistic)
        low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high


def weighted_mean(values: NDArray[np.floating] | NDArray[np.bool_]) -> Statistic:
    """Return the statistic that averages values [Q] or [Q, M] over the queries.

    Examples
    --------
    >>> low, high = Bootstrap(100, block=1).interval(weighted_mean(np.arange(100) < 80))
    >>> bool(low < 0.8 < high)
    True
    """
    per_query = np.asarray(values, dtype=np.float64)
    return lambda weights: (
        (weights @ per_query) / weights.sum(axis=1).reshape(-1, *[1] * (per_query.ndim - 1))
    )


def weighted_auc(
    right: NDArray[np.bool_], scores: NDArray[np.floating], answerable: NDArray[np.bool_]
) -> Statistic:
    """Return the statistic that is the area under the precision-recall curve.

    Parameters
    ----------
    right : ndarray [Q] of bool
        Whether the best candidate of each query is a positive.
    scores : ndarray [Q] of float
        Its score; larger is better, -inf is never accepted.
    answerable : ndarray [Q] of bool
        Queries that count in the denominator of recall.

    Returns
    -------
    callable
        Of weights that are all 1, :attr:`~patchnetvlad.evaluation.metrics.PrecisionRecall.auc`.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[np.isfinite(scores[order])]
    last_of_score = np.flatnonzero(np.diff(scores[order], append=-np.inf))

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        drawn = weights[:, order]  # [b, accepted]
        accepted = np.cumsum(drawn, axis=1)[:, last_of_score]
        true = np.cumsum(drawn * right[order], axis=1)[:, last_of_score]
        relevant = (weights @ answerable.astype(np.float64))[:, None]
        one = np.ones((len(weights), 1))
        precision = np.divide(true, accepted, out=np.ones_like(true), where=accepted > 0)
        precision = np.concatenate([one, precision], axis=1)
        recall = np.divide(true, relevant, out=np.zeros_like(true), where=relevant > 0)
        recall = np.concatenate([0 * one, recall], axis=1)
        return np.sum(np.diff(recall) * (precision[:, 1:] + precision[:, :-1]) / 2, axis=1)

    return statistic


def mcnemar(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Under its hypothesis, of the queries on which two methods differ each is as likely to be right.
    Queries are taken as independent.

    Parameters
    ----------
    ours, theirs : ndarray [Q] of bool
        Whether each query is answered right.

    Returns
    -------
    float
        1 if the methods differ nowhere.

    Raises
    ------
    ArgumentError
        The lengths differ.

    Examples
    --------
    Nine queries won and one lost:

    >>> mcnemar(np.array([True] * 9 + [False]), np.array([False] * 9 + [True])).__round__(4)
    0.0215
    """
    from scipy.stats import binomtest

    if len(ours) != len(theirs):
        raise ArgumentError(f"{len(ours)} queries on one side, {len(theirs)} on the other")
    won, lost = int(np.sum(ours & ~theirs)), int(np.sum(theirs & ~ours))
    return 1.0 if won + lost == 0 else float(binomtest(won, won + lost, 0.5).pvalue)
