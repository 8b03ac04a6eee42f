# SPDX-License-Identifier: MIT
"""Several methods on the same queries: their recalls, differences, and whether these are luck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import ArgumentError
from patchnetvlad.evaluation.intervals import (
    choose_bootstrap,
    mcnemar,
    rising,
    weighted_mean,
    widened,
)
from patchnetvlad.evaluation.recall import first_right


@dataclass(frozen=True, eq=False)
class Difference:
    """How one method differs from another, at each N.

    Attributes
    ----------
    before, after : str
        Names of the two methods.
    values : ndarray [len(n_values)] of float64
        Recall@N of ``after`` less that of ``before``.
    ends : ndarray [len(n_values), 2] of float64
        Their 95 % intervals, of paired draws.
    won, lost : ndarray [len(n_values)] of int64
        Queries that only ``after``, or only ``before``, answers right among its first N.
    p_values : ndarray [len(n_values)] of float64
        Of McNemar's exact test, which takes queries as independent.
    """

    before: str
    after: str
    values: NDArray[np.float64]
    ends: NDArray[np.float64]
    won: NDArray[np.int64]
    lost: NDArray[np.int64]
    p_values: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several methods on the same queries.

    Attributes
    ----------
    names : tuple of M str
        Of the methods; the others are compared with the first.
    n_values : tuple of int
    hits : ndarray [M, Q, len(n_values)] of bool
        Whether one of the first N candidates of a query is right.
    recalls : ndarray [M, len(n_values)] of float64
    ends : ndarray [M, len(n_values), 2] of float64
        Their 95 % intervals.
    differences : dict of (str, str) to Difference
        By the names of the two methods, for each pair in the order of ``names``.
    drawn : str
        What the bootstrap drew.
    """

    names: tuple[str, ...]
    n_values: tuple[int, ...]
    hits: NDArray[np.bool_]
    recalls: NDArray[np.float64]
    ends: NDArray[np.float64]
    differences: dict[tuple[str, str], Difference]
    drawn: str

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.hits.shape[1]

    def sentences(self) -> list[str]:
        """Say of each pair how it differs at the first N, in words for a paper.

        Returns
        -------
        list of str
        """
        return [self._sentence(of) for of in self.differences.values()]

    def _sentence(self, of: Difference) -> str:
        n, queries = self.n_values[0], self.num_queries
        more = int(of.won[0] - of.lost[0])
        if more:
            finds = f"finds {abs(more)} of {queries} queries {'more' if more > 0 else 'fewer'} than"
        else:
            finds = f"finds as many of {queries} queries as"
        before, after = (
            _share(self.recalls[self.names.index(name), 0]) for name in (of.before, of.after)
        )
        low, high = (_share(end, signed=True) for end in of.ends[0])
        return (
            f"{of.after} {finds} {of.before} (R@{n} {before} -> {after}, difference "
            f"{_share(of.values[0], signed=True)} [{low}, {high}], {of.won[0]} won and "
            f"{of.lost[0]} lost, p = {p_text(of.p_values[0])}, McNemar exact)"
        )


def compare_methods(
    answers: Mapping[str, NDArray[np.integer] | Sequence[Sequence[int]]],
    positives: Sequence[NDArray[np.integer] | Sequence[int]],
    n_values: Sequence[int] = (1, 5, 10),
    *,
    interval_block: str = "auto",
    query_names: Sequence[str] = (),
) -> Comparison:
    """Compare methods on the same queries.

    Parameters
    ----------
    answers : mapping of str to [Q, k] of int
        Candidates of each query by name of the method, best first: rows of one index list.
    positives : sequence of Q sequences of int
        Right index images of each query.
    n_values : sequence of int, default (1, 5, 10)
        The N of recall@N; tests and sentences are of the first.
    interval_block, query_names
        As for :func:`~patchnetvlad.evaluation.intervals.choose_bootstrap`.

    Returns
    -------
    Comparison

    Raises
    ------
    ArgumentError
        There are fewer than two methods, no queries, or no N.
    ValueError
        The numbers of queries differ.

    Examples
    --------
    Of 40 queries, the second method answers 15 more than the first:

    >>> right = [[0]] * 40
    >>> answers = {"A": [[0]] * 20 + [[1]] * 20, "B": [[0]] * 35 + [[1]] * 5}
    >>> compared = compare_methods(answers, right, n_values=[1], interval_block="1")
    >>> print(*compared.sentences())
    B finds 15 of 40 queries more than A (R@1 .500 -> .875, difference +.375 [+.225, +.525], 15 \
won and 0 lost, p = 6e-05, McNemar exact)
    """
    if len(answers) < 2 or not len(positives) or not len(n_values):
        raise ArgumentError(
            f"{len(answers)} methods on {len(positives)} queries, for {len(n_values)} values of N: "
            "a comparison needs two methods, a query and an N"
        )
    names, ns = tuple(answers), tuple(int(n) for n in n_values)
    firsts = np.array([first_right(found, positives) for found in answers.values()])  # [M, Q]
    hits = firsts[:, :, None] < np.array(ns)  # [M, Q, n]
    pairs = list(combinations(range(len(names)), 2))
    gained = np.array([hits[b].astype(np.int64) - hits[a] for a, b in pairs])  # [pairs, Q, n]
    right = np.concatenate([hits[:, :, 0], gained[:, :, 0]]).T
    bootstrap = choose_bootstrap(interval_block, right, query_names)
    columns = np.concatenate([hits, gained]).transpose(1, 0, 2).reshape(len(positives), -1)
    low, high = (ends.reshape(-1, len(ns)) for ends in bootstrap.interval(weighted_mean(columns)))
    split = len(names)
    differences = {}
    for i, (a, b) in enumerate(pairs):
        tests = zip(hits[b].T, hits[a].T, strict=True)
        differences[names[a], names[b]] = Difference(
            names[a],
            names[b],
            gained[i].mean(axis=0),
            np.stack([low[split + i], high[split + i]], axis=-1),
            (gained[i] > 0).sum(axis=0),
            (gained[i] < 0).sum(axis=0),
            np.array([mcnemar(*both) for both in tests]),
        )
    ends = rising(widened(low[:split], high[:split], bootstrap.pieces), ns)
    return Comparison(names, ns, hits, hits.mean(axis=1), ends, differences, str(bootstrap))


def p_text(p_value: float) -> str:
    """Return a p-value with one digit, or two where it is not small.

    Examples
    --------
    >>> p_text(2.31e-9), p_text(0.0417), p_text(1.0)
    ('2e-09', '0.042', '1')
    """
    return f"{p_value:.0e}" if p_value < 0.001 else f"{p_value:.2g}"


def _share(value: float, signed: bool = False) -> str:
    """Return a share with three digits and without the zero before the point, as papers do."""
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text
