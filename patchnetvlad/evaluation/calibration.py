# SPDX-License-Identifier: MIT
"""How good confidences are: calibration, and the risk of what is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.arguments import argument_errors
from patchnetvlad.errors import ArgumentError

BINS = 10


@dataclass(frozen=True, eq=False)
class Calibration:
    """How far the confidences of first answers can be trusted.

    Attributes
    ----------
    queries : int
        Q.
    expected_error : float
        Expected calibration error (ECE): how far the mean confidence is from the share of right
        answers, within each of ten bins of equal width, averaged over the queries (Guo et al.,
        2017).
    aurc : float
        Area under the risk-coverage curve: the share of wrong answers among the surest n, averaged
        over n from 1 to Q (Geifman and El-Yaniv, 2017). 0 is best; the share of all wrong answers
        is what an order without meaning has.
    recall_at_full_precision : float
        Share of the queries that have a right answer in the index that are answered before the
        first mistake.
    bins : ndarray [3, B] of float64
        Of the bins that are not empty: mean confidence, share of right answers, number of queries.
    risk : ndarray [2, T] of float64
        Coverage, the share of queries that are answered, and risk, the share of these that are
        wrong, at each different confidence, highest first.
    """

    queries: int
    expected_error: float
    aurc: float
    recall_at_full_precision: float
    bins: NDArray[np.float64]
    risk: NDArray[np.float64]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        names = ("confidence", "right", "queries"), ("coverage", "risk")
        tables = (
            dict(zip(of, table.round(6).tolist(), strict=True))
            for of, table in zip(names, (self.bins, self.risk), strict=True)
        )
        return {
            "queries": self.queries,
            "expected_calibration_error": self.expected_error,
            "aurc": self.aurc,
            "recall_at_full_precision": self.recall_at_full_precision,
            **dict(zip(("bins", "risk_coverage"), tables, strict=True)),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Return what :meth:`to_dict` returned; KeyError, TypeError or ValueError if it did not."""

        def table(name: str, *rows: str) -> NDArray[np.float64]:
            found = np.array([values[name][row] for row in rows], dtype=np.float64)
            if found.ndim != 2 or not (found >= 0).all() or not (found[:2] <= 1).all():
                raise ValueError(f"{name} is {values[name]!r:.80}")
            return found

        numbers = [
            float(values[name])
            for name in ("expected_calibration_error", "aurc", "recall_at_full_precision")
        ]
        if not all(0 <= number <= 1 for number in numbers):
            raise ValueError(f"the confidence has {numbers}, which are no shares")
        bins = table("bins", "confidence", "right", "queries")
        risk = table("risk_coverage", "coverage", "risk")
        expected_error, aurc, full = numbers
        return cls(int(values["queries"]), expected_error, aurc, full, bins, risk)


@argument_errors("measure_calibration cannot use these values")
def measure_calibration(
    confidences: NDArray[np.floating] | Sequence[float],
    right: NDArray[np.bool_] | Sequence[bool],
    relevant: int | None = None,
) -> Calibration:
    """Measure how good confidences are.

    Parameters
    ----------
    confidences : [Q] of float
        Probability that the first answer to each query is right, from 0 to 1.
    right : [Q] of bool
        Whether it is.
    relevant : int, optional
        Queries that have a right answer in the index; by default those that are answered right.

    Returns
    -------
    Calibration

    Raises
    ------
    ValueError
        The lengths differ, there are no queries, or a confidence is no probability.

    Examples
    --------
    Of the two surest answers both are right, and the third is wrong:

    >>> found = measure_calibration([0.9, 0.9, 0.4], [True, True, False])
    >>> round(found.expected_error, 3), round(found.aurc, 3), found.recall_at_full_precision
    (0.2, 0.111, 1.0)
    """
    sure = np.asarray(confidences, dtype=np.float64)
    is_right = np.asarray(right, dtype=bool)
    if sure.ndim != 1 or sure.shape != is_right.shape or not len(sure):
        raise ArgumentError(
            f"confidences have shape {list(sure.shape)}, right answers {list(is_right.shape)}; "
            "needed is one per query"
        )
    if not ((sure >= 0) & (sure <= 1)).all():
        raise ArgumentError("confidences must be probabilities, from 0 to 1")
    of = np.minimum((sure * BINS).astype(np.int64), BINS - 1)
    counts, sums, hits = (
        np.bincount(of, weights=weights, minlength=BINS) for weights in (None, sure, is_right)
    )
    _, of = np.unique(-sure, return_inverse=True)
    answered, true = (np.cumsum(np.bincount(of, weights=weights)) for weights in (None, is_right))
    before_a_mistake = float(true[answered == true].max(initial=0))
    used = counts > 0
    bins = np.stack([sums[used], hits[used], counts[used]]).astype(np.float64)
    bins[:2] /= bins[2]
    return Calibration(
        len(sure),
        float(np.abs(sums - hits).sum() / len(sure)),
        area_under_risk_coverage(sure, is_right),
        before_a_mistake / max(int(is_right.sum()) if relevant is None else relevant, 1),
        bins,
        np.stack([answered / len(sure), 1 - true / answered]),
    )


@argument_errors("area_under_risk_coverage cannot use these values")
def area_under_risk_coverage(
    scores: NDArray[np.floating] | Sequence[float], right: NDArray[np.bool_] | Sequence[bool]
) -> float:
    """Average the share of wrong answers among the best n over n from 1 to Q (AURC).

    Parameters
    ----------
    scores : [Q] of float
        What answers are put in order by; larger is surer. Equal ones are taken in a random order,
        of which this is the mean.
    right : [Q] of bool
        Whether the answers are right.

    Returns
    -------
    float

    Examples
    --------
    >>> area_under_risk_coverage([3, 2, 1, 0], [True, False, True, True])  # (0 + 1/2 + 1/3 + 1/4)/4
    0.2708333333333333
    """
    values = np.asarray(scores, dtype=np.float64)
    wrong = ~np.asarray(right, dtype=bool)
    if values.ndim != 1 or values.shape != wrong.shape or not len(values):
        raise ArgumentError(f"{values.size} scores for {wrong.size} answers")
    _, of, counts = np.unique(-values, return_inverse=True, return_counts=True)
    expected = (np.bincount(of, weights=wrong) / counts)[np.sort(of)]
    return float(np.mean(np.cumsum(expected) / np.arange(1, len(values) + 1)))
