# SPDX-License-Identifier: MIT
"""What metrics are averages of: how each query is answered; and the intervals of the averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.evaluation.intervals import LEVEL, Bootstrap, rising, weighted_curve, widened
from patchnetvlad.evaluation.recall import check_counts, first_right

RECALLS = ("recall", "recall_of_queries_with_positives")
MAPS = ("map", "map_of_queries_with_positives")
AREAS = ("auc", "average_precision")
_LEVELS = np.linspace(0.0, 1.0, 41)[1:]  # recalls at which the precision has an interval


@dataclass(frozen=True, eq=False)
class PerQuery:
    """How a method answers each query.

    Attributes
    ----------
    n_values : tuple of int
        The N, from 1.
    first_right : ndarray [Q] of float64
        Number of candidates before the first right one; inf where none is right.
    average_precisions : ndarray [Q, len(n_values)] of float64
        See :func:`average_precisions`.
    answerable : ndarray [Q] of bool
        Whether a query has a right answer in the index.
    scores : ndarray [Q] of float64 or None
        Of the first candidates; larger is better, -inf where there is none.
    """

    n_values: tuple[int, ...]
    first_right: NDArray[np.float64]
    average_precisions: NDArray[np.float64]
    answerable: NDArray[np.bool_]
    scores: NDArray[np.float64] | None

    @classmethod
    def of(
        cls,
        predictions: NDArray[np.integer] | Sequence[Sequence[int]],
        positives: Sequence[NDArray[np.integer] | Sequence[int]],
        n_values: Sequence[int],
        scores: NDArray[np.floating] | Sequence[float] | None = None,
    ) -> PerQuery:
        """Judge candidates; see :func:`~patchnetvlad.evaluation.metrics.evaluate_predictions`."""
        best = None
        if scores is not None:
            best = np.asarray(scores, dtype=np.float64)
            best = best[:, 0] if best.ndim == 2 and best.shape[1] else best
        return cls(
            tuple(int(n) for n in n_values),
            first_right(predictions, positives),
            average_precisions(predictions, positives, n_values),
            np.array([len(right) > 0 for right in positives], dtype=bool),
            best,
        )

    @cached_property
    def hits(self) -> NDArray[np.bool_]:
        """Whether one of the first N is right [Q, len(n_values)]."""
        return self.first_right[:, None] < np.array(self.n_values)

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether the first candidate is right [Q]."""
        return self.first_right == 0


def average_precisions(
    predictions: NDArray[np.integer] | Sequence[Sequence[int]],
    positives: Sequence[NDArray[np.integer] | Sequence[int]],
    n_values: Sequence[int],
) -> NDArray[np.float64]:
    """Compute the average precision of the first N candidates of each query.

    Parameters
    ----------
    predictions, positives, n_values
        As for :func:`~patchnetvlad.evaluation.metrics.mean_average_precision_at_n`.

    Returns
    -------
    ndarray [Q, len(n_values)] of float64
        0 for a query without positives.

    Raises
    ------
    ValueError
        There are not as many positives as predictions, or an N is less than 1.
    """
    check_counts(predictions, positives)
    if min(n_values, default=1) < 1:
        raise ValueError(f"N = {min(n_values)} must be 1 or more")
    ns = np.asarray(n_values, dtype=np.int64)
    found = np.zeros((len(predictions), len(ns)))
    for q, (candidates, right) in enumerate(zip(predictions, positives, strict=True)):
        answers = np.unique(np.asarray(right, dtype=np.int64))
        if len(answers) == 0:
            continue
        row = np.asarray(candidates, dtype=np.int64)
        _, first = np.unique(row, return_index=True)
        new = np.zeros(len(row), dtype=bool)
        new[first] = True
        ranks = np.flatnonzero(new & np.isin(row, answers)) + 1  # [hits], from 1
        precisions = np.arange(1, len(ranks) + 1) / ranks
        up_to = np.concatenate([[0.0], np.cumsum(precisions)])
        found[q] = up_to[np.searchsorted(ranks, ns, side="right")] / np.minimum(ns, len(answers))
    return found


@dataclass(frozen=True, eq=False)
class Intervals:
    """The 95 % intervals of the metrics of one method.

    Attributes
    ----------
    drawn : str
        What was drawn, such as "blocks of 6 consecutive queries".
    block : int or None
        Consecutive queries that were drawn together; None for traverses.
    resamples, seed : int
    by_n : dict of str to ndarray [len(n_values), 2] of float64
        Lower and upper ends, by the name that the metric has in ``metrics.json``.
    areas : dict of str to ndarray [2] of float64
        Of ``auc`` and ``average_precision``; empty without scores.
    band : ndarray [3, L] of float64 or None
        Recalls, and the ends of the precision there, of resamples that reach them; None without
        scores.
    """

    drawn: str
    block: int | None
    resamples: int
    seed: int
    by_n: dict[str, NDArray[np.float64]]
    areas: dict[str, NDArray[np.float64]]
    band: NDArray[np.float64] | None

    def to_dict(self, n_values: Sequence[int]) -> dict[str, Any]:
        """Return everything as JSON types."""

        def rounded(ends: NDArray[np.float64]) -> list[Any]:
            found: list[Any] = ends.round(6).tolist()
            return found

        content: dict[str, Any] = {
            "level": LEVEL,
            "drawn": self.drawn,
            "block": self.block,
            "resamples": self.resamples,
            "seed": self.seed,
        }
        for name, ends in self.by_n.items():
            content[name] = {str(n): of for n, of in zip(n_values, rounded(ends), strict=True)}
        content |= {name: rounded(ends) for name, ends in self.areas.items()}
        if self.band is not None:
            parts = zip(("recall", "low", "high"), rounded(self.band), strict=True)
            content["precision"] = dict(parts)
        return content

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], n_values: Sequence[int]) -> Intervals:
        """Return what :meth:`to_dict` returned; KeyError, TypeError or ValueError if it did not."""

        def shares(*given: Any) -> NDArray[np.float64]:
            found = np.array(given, dtype=np.float64)  # [rows, columns]
            if found.ndim != 2 or not ((found >= 0) & (found <= 1)).all():
                raise ValueError(f"intervals: {given!r:.80} are not shares")
            return found

        def ends(*given: Any) -> NDArray[np.float64]:
            found = shares(*given)
            if found.shape != (len(given), 2):
                raise ValueError(f"intervals: {given!r:.80} are not pairs")
            return found

        if not isinstance(values, Mapping):
            raise TypeError(f"intervals are {values!r:.80}")
        band = values.get("precision")
        return cls(
            str(values["drawn"]),
            values["block"],
            values["resamples"],
            values["seed"],
            {name: ends(*(values[name][str(n)] for n in n_values)) for name in (*RECALLS, *MAPS)},
            {name: ends(values[name])[0] for name in AREAS if name in values},
            None if band is None else shares(*(band[key] for key in ("recall", "low", "high"))),
        )


def measure_intervals(of: PerQuery, bootstrap: Bootstrap, all_queries: bool = False) -> Intervals:
    """Compute the intervals of all metrics of a method.

    Parameters
    ----------
    of : PerQuery
    bootstrap : Bootstrap
        Of as many queries.
    all_queries : bool, default False
        The recall of the precision-recall curve counts all queries; otherwise those that have
        positives.

    Returns
    -------
    Intervals

    Raises
    ------
    ArgumentError
        The numbers of queries differ.
    """
    values = np.hstack([of.hits, of.average_precisions])  # [Q, 2 n]
    answerable = of.answerable.astype(np.float64)
    counted = np.ones_like(of.answerable) if all_queries else of.answerable
    n = len(of.n_values)
    curve = None
    if of.scores is not None:
        reached = of.right[np.isfinite(of.scores)].sum() / max(int(counted.sum()), 1)
        levels = _LEVELS[reached + 1e-9 >= _LEVELS]
        curve = weighted_curve(of.right, of.scores, counted, levels)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = weights @ values
        drawn = np.maximum(weights @ answerable, 1)[:, None]
        parts = [sums / weights.sum(axis=1, keepdims=True), sums / drawn]
        return np.hstack(parts if curve is None else [*parts, curve(weights)])

    low, high = bootstrap.interval(statistic)
    ends = widened(low, high, bootstrap.pieces)
    columns = {RECALLS[0]: 0, MAPS[0]: n, RECALLS[1]: 2 * n, MAPS[1]: 3 * n}
    by_n = {name: ends[start:][:n] for name, start in columns.items()}
    by_n |= {name: rising(by_n[name], of.n_values) for name in RECALLS}
    band = None
    if curve is not None:
        band = np.stack([levels, low[4 * n + 2 :], high[4 * n + 2 :]])
        band = band[:, np.isfinite(band).all(axis=0)]
    return Intervals(
        str(bootstrap),
        None if bootstrap.groups is not None else bootstrap.block_length,
        bootstrap.resamples,
        bootstrap.seed,
        by_n,
        {} if curve is None else dict(zip(AREAS, ends[4 * n : 4 * n + 2], strict=True)),
        band,
    )
