# SPDX-License-Identifier: MIT
"""Statistics: bootstrap intervals over queries, and tests of one method against another.

Neighbouring queries of a traverse show nearly the same thing, so they are right or wrong together.
Blocks of consecutive queries are drawn, not single ones, which keeps their dependence (circular
block bootstrap, Politis and Romano, 1992).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config_ini import INTERVAL_BLOCKS, is_interval_block
from patchnetvlad.errors import ArgumentError

RESAMPLES = 2000
LEVEL = 0.95
_DRAWN_TOGETHER = 2**17  # counts of queries in memory: what a cache holds

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
    def pieces(self) -> int:
        """How many blocks or groups there are, which are taken as independent."""
        if self.groups is not None:
            return len(set(self.groups))
        return math.ceil(self.num_queries / self.block_length)

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

        It is expanded for few blocks (Hesterberg, 2015): its quantiles are those that Student's t
        would have in place of the normal distribution.

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
        from scipy.special import ndtr, stdtrit

        found, pieces = self.distribution(statistic), self.pieces
        tail = 0.0
        if pieces > 1:
            away = stdtrit(pieces - 1, (1 - level) / 2) * math.sqrt(pieces / (pieces - 1))
            tail = float(ndtr(away))
        low, high = np.nanquantile(found, [tail, 1 - tail], axis=0)
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
    curve = weighted_curve(right, scores, answerable, ())
    return lambda weights: curve(weights)[:, 0]


def weighted_curve(
    right: NDArray[np.bool_],
    scores: NDArray[np.floating],
    answerable: NDArray[np.bool_],
    levels: Sequence[float] | NDArray[np.floating],
) -> Statistic:
    """Return the statistics of the precision-recall curve.

    Parameters
    ----------
    right, scores, answerable
        As for :func:`weighted_auc`.
    levels : sequence of L float
        Recalls, from 0 to 1.

    Returns
    -------
    callable
        Of weights [b, Q], it gives [b, 2 + L]: the area by the trapezoid rule, the area of steps
        (average precision), and the precision where recall first reaches each level, which is
        NaN where it never does.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[np.isfinite(scores[order])]
    last_of_score = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    tied = len(last_of_score) < len(order)
    is_right = right[order].astype(np.float32)
    counts = answerable.astype(np.float64)
    wanted = np.asarray(levels, dtype=np.float64)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        # Whole numbers, which float32 holds exactly.
        drawn = np.take(weights.astype(np.float32), order, axis=1)  # [b, accepted]
        found = drawn * is_right
        accepted, true = np.cumsum(drawn, axis=1), np.cumsum(found, axis=1)
        if tied:
            accepted, true = accepted[:, last_of_score], true[:, last_of_score]
            found = np.diff(true, axis=1, prepend=0)
        relevant = weights @ counts
        precision = np.divide(true, accepted, out=np.ones_like(true), where=accepted > 0)
        steps = np.einsum("bt,bt->b", found, precision)
        before = np.einsum("bt,bt->b", found[:, 1:], precision[:, :-1]) + found[:, :1].sum(axis=1)
        values = np.full((len(weights), 2 + len(wanted)), np.nan)
        values[:, 0] = (steps + before) / 2
        values[:, 1] = steps
        values[:, :2] /= np.maximum(relevant, 1)[:, None]
        for b in range(len(weights)) if len(wanted) else ():
            at = np.searchsorted(true[b], wanted * relevant[b] * (1 - 1e-6))
            reached = at < true.shape[1]
            values[b, 2:][reached] = precision[b, at[reached]]
        return values

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
    from scipy.special import bdtr

    if len(ours) != len(theirs):
        raise ArgumentError(f"{len(ours)} queries on one side, {len(theirs)} on the other")
    won, lost = int(np.sum(ours & ~theirs)), int(np.sum(theirs & ~ours))
    return min(1.0, 2 * float(bdtr(min(won, lost), won + lost, 0.5)))


def widened(
    low: NDArray[np.floating], high: NDArray[np.floating], pieces: int, level: float = LEVEL
) -> NDArray[np.float64]:
    """Return intervals of shares, of which none ends where every resample is 0 or 1.

    A bootstrap of queries that are all right draws nothing else, which does not show that the
    next one will be right. The exact interval of as many independent trials as there are blocks,
    all of which are right or all wrong, takes its stead (Clopper and Pearson, 1934).

    Parameters
    ----------
    low, high : ndarray [...] of float
    pieces : int
        :attr:`Bootstrap.pieces`.
    level : float, default 0.95

    Returns
    -------
    ndarray [..., 2] of float64

    Examples
    --------
    >>> widened(np.array([1.0, 0.7]), np.array([1.0, 0.9]), pieces=30).round(2).tolist()
    [[0.88, 1.0], [0.7, 0.9]]
    """
    least = ((1 - level) / 2) ** (1 / pieces)
    low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    all_right, all_wrong = low >= 1 - 1e-9, high <= 1e-9
    return np.stack(
        [np.where(all_right, least, low), np.where(all_wrong, 1 - least, high)], axis=-1
    )


def rising(ends: NDArray[np.float64], n_values: Sequence[int]) -> NDArray[np.float64]:
    """Return intervals of recalls whose lower ends do not fall with N.

    What is right among the first 5 is right among the first 10, so the lower end of recall@5 is
    one of recall@10.

    Parameters
    ----------
    ends : ndarray [..., len(n_values), 2] of float64
    n_values : sequence of int

    Returns
    -------
    ndarray [..., len(n_values), 2] of float64

    Examples
    --------
    >>> rising(np.array([[0.97, 1.0], [0.9, 1.0]]), [1, 5]).tolist()
    [[0.97, 1.0], [0.97, 1.0]]
    """
    order = np.argsort(n_values, kind="stable")
    found = ends.copy()
    found[..., order, 0] = np.maximum.accumulate(ends[..., order, 0], axis=-1)
    return found


def traverses(names: Sequence[str]) -> list[str]:
    """Return what the names of the images of a traverse have in common.

    Of each name it is what stands before its last number, such as ``night/Image`` of
    ``night/Image007.jpg``; or its folder, if more than half of the names would be alone.

    Parameters
    ----------
    names : sequence of Q str

    Returns
    -------
    list of Q str

    Examples
    --------
    >>> traverses(["a/1.jpg", "a/2.jpg", "b/x_1.jpg", "b/x_2.jpg", "b/y_7.jpg", "b/y_8.jpg"])
    ['a/', 'a/', 'b/x_', 'b/x_', 'b/y_', 'b/y_']
    """
    stems = [re.sub(r"\d+[^\d/]*$", "", name) for name in names]
    if 2 * len(set(stems)) <= len(names):
        return stems
    return [name.rpartition("/")[0] for name in names]


def dependent_length(hits: NDArray[np.bool_] | NDArray[np.floating]) -> int:
    """Return the length of blocks that fits how alike neighbouring queries are.

    It is the length at which the error of the variance is least, estimated from the
    autocorrelation of the hits (Politis and White, 2004, corrected by Patton et al., 2009), or
    the whole number next to the cube root of Q if that is more.

    Parameters
    ----------
    hits : ndarray [Q] or [Q, M]
        Whether each query is answered right, by each of M methods: the longest of their blocks
        counts.

    Returns
    -------
    int
        Between 1 and Q.

    Examples
    --------
    >>> random = np.random.default_rng(0)
    >>> dependent_length(random.random(1000) < 0.7)
    10
    >>> dependent_length(np.repeat(random.random(100) < 0.7, 10))  # ten are right together
    20
    """
    columns = np.asarray(hits, dtype=np.float64).reshape(len(hits), -1)
    q = len(columns)
    longest = max(1, round(q ** (1 / 3)))
    in_a_row = max(5, math.ceil(math.sqrt(math.log10(max(q, 2)))))
    lags = min(math.ceil(math.sqrt(q)) + in_a_row, q - 1)
    for values in columns.T - columns.mean(axis=0)[:, None]:
        if not values.any() or lags < 1:
            continue
        covariance = np.array([values[: q - k] @ values[k:] for k in range(lags + 1)]) / q
        high = np.abs(covariance[1:]) > 2 * math.sqrt(math.log10(q) / q) * covariance[0]
        runs = [k for k in range(lags) if not high[k : k + in_a_row].any()]
        band = min(2 * runs[0] if runs else lags, lags)
        if band == 0:
            continue
        lag = np.arange(1, band + 1)
        weight = np.clip(2 * (1 - lag / band), 0, 1) * covariance[1 : band + 1]
        spread = covariance[0] + 2 * weight.sum()
        if spread > 0:
            length = (1.5 * (2 * (lag * weight).sum() / spread) ** 2 * q) ** (1 / 3)
            most = min(3 * math.sqrt(q), q / 3)
            longest = max(longest, math.ceil(min(length, most)))
    return min(longest, q)


def choose_bootstrap(
    interval_block: str, hits: NDArray[np.bool_], names: Sequence[str] = ()
) -> Bootstrap:
    """Return the bootstrap that a setting means.

    Parameters
    ----------
    interval_block : str
        ``auto`` for blocks of :func:`dependent_length`, ``traverse`` for :func:`traverses`, or a
        number of consecutive queries; ``1`` takes queries as independent.
    hits : ndarray [Q, M] of bool
        Whether each query is answered right, by each of M methods.
    names : sequence of Q str, optional
        Of the queries; without them, or where they are of one traverse, ``traverse`` is ``auto``.

    Returns
    -------
    Bootstrap

    Raises
    ------
    ArgumentError
        The setting is none of these.

    Examples
    --------
    >>> hits = np.ones((216, 1), dtype=bool)
    >>> print(choose_bootstrap("auto", hits))
    blocks of 6 consecutive queries
    >>> print(choose_bootstrap("1", hits))
    single queries
    """
    if not is_interval_block(interval_block):
        raise ArgumentError(f"interval_block = {interval_block!r} is not {INTERVAL_BLOCKS}")
    q = len(hits)
    if interval_block == "traverse" and len(names) == q:
        groups = traverses(names)
        if len(set(groups)) > 1:
            return Bootstrap(q, groups=groups)
    if interval_block in ("auto", "traverse"):
        return Bootstrap(q, block=dependent_length(hits))
    return Bootstrap(q, block=min(int(interval_block), q))
