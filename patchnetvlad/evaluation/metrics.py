# SPDX-License-Identifier: MIT
"""Mean average precision, precision and recall, and all metrics of a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.arguments import argument_errors
from patchnetvlad.base.text import json_text, plain_json
from patchnetvlad.evaluation.calibration import Calibration, measure_calibration
from patchnetvlad.evaluation.intervals import Bootstrap, choose_bootstrap
from patchnetvlad.evaluation.per_query import (
    Intervals,
    PerQuery,
    average_precisions,
    measure_intervals,
)
from patchnetvlad.evaluation.recall import queries_without_positives

PRECISIONS = (1.0, 0.99, 0.95, 0.9)
METHODS = ("NetVLAD", "PatchNetVLAD", "Sequence")
"""In the order in which they work on each other's candidates."""

SEQUENCE = METHODS[-1]

Predictions = NDArray[np.integer] | Sequence[Sequence[int]]
Positives = Sequence[NDArray[np.integer] | Sequence[int]]


@argument_errors("mean_average_precision_at_n cannot use these values")
def mean_average_precision_at_n(
    predictions: Predictions,
    positives: Positives,
    n_values: Sequence[int],
    all_queries: bool = True,
) -> NDArray[np.float64]:
    """Compute the mean over queries of the average precision of their first N candidates (mAP@N).

    The average precision of a query with P positives is the sum, over the ranks r from 1 to N at
    which there is a positive, of the precision at r, divided by min(P, N): 1 if and only if the
    first min(P, N) candidates are positives. The precision at r is the share of positives among
    the first r candidates. A candidate that is repeated counts as a positive once. A query
    without positives has 0, and counts unless ``all_queries`` is False.

    Parameters
    ----------
    predictions : [Q, k] of int
        Candidates of each query, best first. Ranks beyond k hold no positive.
    positives : sequence of Q sequences of int
        Right index images of each query.
    n_values : sequence of int
        The N, from 1.
    all_queries : bool, default True
        Divide by the number of all queries; otherwise by that of the queries that have positives.

    Returns
    -------
    ndarray [len(n_values)] of float64
        Between 0 and 1, in the order of ``n_values``; 0 where no query counts.

    Raises
    ------
    ValueError
        There are not as many positives as predictions, or an N is less than 1.

    Examples
    --------
    Right answers at ranks 1 and 3 have precisions 1 and 2/3:

    >>> mean_average_precision_at_n([[4, 7, 8]], [[4, 8]], n_values=[1, 3]).round(3).tolist()
    [1.0, 0.833]
    """
    found = average_precisions(predictions, positives, n_values)
    counted = len(found) if all_queries else len(found) - queries_without_positives(positives)
    return found.sum(axis=0) / max(counted, 1)


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """Precision and recall over queries, at every threshold that makes a difference.

    A query is accepted at threshold t if its best candidate's score is t or more; otherwise it
    is answered "no match". Precision is the share of right ones among the accepted queries;
    recall is the number of right accepted queries over ``relevant``.

    Attributes
    ----------
    thresholds : ndarray [T] of float64
        The different scores, highest first: from the strictest threshold to the most lenient.
    precision, recall : ndarray [T] of float64
        At each threshold; recall never falls.
    relevant : int
        Denominator of recall.
    correct : int
        Queries whose best candidate is right, accepted or not.
    """

    thresholds: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    relevant: int
    correct: int

    @property
    def average_precision(self) -> float:
        """Area under the curve as steps: sum of (R_i - R_{i-1}) P_i, with R_{-1} = 0.

        It is scikit-learn's ``average_precision_score(right, scores)`` times ``correct /
        relevant``: scikit-learn knows nothing of queries that have positives but a wrong best
        candidate. The two are equal where ``relevant`` is ``correct``. 0 if nothing is right.
        """
        return float(np.sum(np.diff(self.recall, prepend=0.0) * self.precision))

    @property
    def auc(self) -> float:
        """Area under the curve by the trapezoid rule, from the point (recall 0, precision 1).

        It is scikit-learn's ``auc(recall, precision)`` of its ``precision_recall_curve``, again
        times ``correct / relevant``. 0 if nothing is right.
        """
        recall = np.concatenate([[0.0], self.recall])
        precision = np.concatenate([[1.0], self.precision])
        return float(np.sum(np.diff(recall) * (precision[1:] + precision[:-1]) / 2))

    @property
    def f1(self) -> NDArray[np.float64]:
        """Harmonic mean 2 P R / (P + R) of precision and recall at each threshold [T]."""
        product, total = self.precision * self.recall, self.precision + self.recall
        return np.divide(2 * product, total, out=np.zeros_like(total), where=total > 0)

    def best(self) -> int | None:
        """Return the index of the threshold of largest F1, of equals the strictest.

        None if nothing is right at any threshold.
        """
        return int(self.f1.argmax()) if self.f1.any() else None

    def at_precision(self, precision: float) -> int | None:
        """Return the index of the most lenient threshold of at least a precision, 0 to 1.

        None if there is none, as for precision 1 if the best score of all is a wrong answer's.
        The recall there is the largest at that precision (the recall at 100 % precision, for 1),
        and answering "no match" below that threshold keeps the precision.
        """
        # Precisions are quotients of whole numbers: 0.95 * 20 of 20 must count as 0.95.
        enough = np.flatnonzero(self.precision >= precision - 1e-12)
        return int(enough[-1]) if len(enough) else None


@argument_errors("precision_recall cannot use these values")
def precision_recall(
    right: NDArray[np.bool_] | Sequence[bool],
    scores: NDArray[np.floating] | Sequence[float],
    relevant: int | None = None,
) -> PrecisionRecall:
    """Compute precision and recall over queries from their best candidates.

    Parameters
    ----------
    right : [Q] of bool
        Whether the best candidate of each query is a positive.
    scores : [Q] of float
        Its score, comparable between queries; larger is better. -inf means a query
        without a candidate, which is never accepted. Queries of equal score are accepted
        together.
    relevant : int, optional
        Denominator of recall: usually the number of queries that have positives, or of all
        queries. By default, as in scikit-learn, the number of queries whose best candidate is
        right.

    Returns
    -------
    PrecisionRecall

    Raises
    ------
    ValueError
        The lengths differ, a score is NaN or +inf, or ``relevant`` is smaller than the number
        of right queries.

    Examples
    --------
    >>> curve = precision_recall([True, True, False, True], [0.9, 0.7, 0.6, 0.4])
    >>> curve.precision.round(2).tolist()
    [1.0, 1.0, 0.67, 0.75]
    >>> curve.recall.round(2).tolist()
    [0.33, 0.67, 0.67, 1.0]
    >>> curve.thresholds[curve.at_precision(1.0)]  # from here on all answers are right
    np.float64(0.7)
    """
    is_right = np.asarray(right, dtype=bool)
    values = np.asarray(scores, dtype=np.float64)
    if is_right.ndim != 1 or values.shape != is_right.shape:
        raise ValueError(
            f"scores have shape {list(values.shape)}, right answers {list(is_right.shape)}; needed "
            "is one per query"
        )
    unusable = np.flatnonzero(np.isnan(values) | np.isposinf(values))
    if len(unusable):
        raise ValueError(f"the score of query {unusable[0]} is {values[unusable[0]]}")
    correct = int(is_right.sum())
    relevant = correct if relevant is None else int(relevant)
    if relevant < correct:
        raise ValueError(f"{correct} queries are right, of {relevant} that have an answer")
    answered = np.isfinite(values)
    different, of_score = np.unique(-values[answered], return_inverse=True)
    accepted = np.cumsum(np.bincount(of_score, minlength=len(different)))
    hits = np.bincount(of_score, weights=is_right[answered], minlength=len(different))
    true = np.cumsum(hits)
    recall = true / relevant if relevant else np.zeros(len(different))
    return PrecisionRecall(-different + 0.0, true / accepted, recall, relevant, correct)


@dataclass(frozen=True, eq=False)
class Metrics:
    """The metrics of one method.

    Attributes
    ----------
    num_queries : int
        Q.
    num_without_positives : int
        Queries that no index image answers.
    n_values : tuple of int
        The N.
    recalls : ndarray [len(n_values)] of float64
        Recall@N over all queries, see :func:`~patchnetvlad.evaluation.recall.recall_at_n`.
    answerable_recalls : ndarray [len(n_values)] of float64
        The same over the queries that have positives.
    mean_average_precisions : ndarray [len(n_values)] of float64
        MAP@N over all queries, see :func:`mean_average_precision_at_n`.
    answerable_mean_average_precisions : ndarray [len(n_values)] of float64
        The same over the queries that have positives.
    curve : PrecisionRecall or None
        Precision and recall over queries; None without scores.
    intervals : Intervals or None
        Of all of these; None if they were not asked for.
    calibration : Calibration or None
        How good the confidences of the first answers are; None without confidences.
    """

    num_queries: int
    num_without_positives: int
    n_values: tuple[int, ...]
    recalls: NDArray[np.float64]
    answerable_recalls: NDArray[np.float64]
    mean_average_precisions: NDArray[np.float64]
    answerable_mean_average_precisions: NDArray[np.float64]
    curve: PrecisionRecall | None = None
    intervals: Intervals | None = None
    calibration: Calibration | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types; undefined values are None."""

        def by_n(values: NDArray[np.float64]) -> dict[str, float]:
            return {str(n): value for n, value in zip(self.n_values, values.tolist(), strict=True)}

        content: dict[str, Any] = {
            "queries": self.num_queries,
            "queries_without_positives": self.num_without_positives,
            "recall": by_n(self.recalls),
            "recall_of_queries_with_positives": by_n(self.answerable_recalls),
            "map": by_n(self.mean_average_precisions),
            "map_of_queries_with_positives": by_n(self.answerable_mean_average_precisions),
            "precision_recall": self._curve(),
        }
        if self.intervals is not None:
            content["intervals"] = self.intervals.to_dict(self.n_values)
        if self.calibration is not None:
            content["confidence"] = self.calibration.to_dict()
        return plain_json(content)

    def to_json(self) -> str:
        """Return :meth:`to_dict` as JSON text."""
        return json_text(self.to_dict())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Metrics:
        """Return what :meth:`to_dict` returned; KeyError, TypeError or ValueError if it did not."""
        n_values = tuple(int(n) for n in values["recall"])

        def by_n(key: str) -> NDArray[np.float64]:
            return np.array([values[key][str(n)] for n in n_values], dtype=np.float64)

        curve = None
        if (given := values["precision_recall"]) is not None:
            thresholds, precision, recall = (
                np.array(given["curve"][key], dtype=np.float64)
                for key in ("thresholds", "precision", "recall")
            )
            counts = given["relevant_queries"], given["right_queries"]
            curve = PrecisionRecall(thresholds, precision, recall, *counts)
        return cls(
            values["queries"],
            values["queries_without_positives"],
            n_values,
            by_n("recall"),
            by_n("recall_of_queries_with_positives"),
            by_n("map"),
            by_n("map_of_queries_with_positives"),
            curve,
            Intervals.from_dict(values["intervals"], n_values) if "intervals" in values else None,
            Calibration.from_dict(values["confidence"]) if "confidence" in values else None,
        )

    def _curve(self) -> dict[str, Any] | None:
        curve = self.curve
        if curve is None:
            return None

        def point(i: int | None) -> dict[str, float | None]:
            values = {
                "threshold": curve.thresholds,
                "precision": curve.precision,
                "recall": curve.recall,
                "f1": curve.f1,
            }
            return {name: None if i is None else float(of[i]) for name, of in values.items()}

        full = curve.at_precision(1.0)
        return {
            "relevant_queries": curve.relevant,
            "right_queries": curve.correct,
            "average_precision": curve.average_precision,
            "auc": curve.auc,
            "recall_at_full_precision": 0.0 if full is None else float(curve.recall[full]),
            "best": point(curve.best()),
            "at_precision": {str(p): point(curve.at_precision(p)) for p in PRECISIONS},
            "curve": {
                "thresholds": curve.thresholds,
                "precision": curve.precision,
                "recall": curve.recall,
            },
        }


@argument_errors("evaluate_predictions cannot use these values")
def evaluate_predictions(
    predictions: Predictions,
    positives: Positives,
    n_values: Sequence[int],
    scores: NDArray[np.floating] | Sequence[float] | None = None,
    all_queries: bool = False,
    bootstrap: Bootstrap | None = None,
) -> Metrics:
    """Compute all metrics of one method.

    Parameters
    ----------
    predictions : [Q, k] of int
        Candidates of each query, best first.
    positives : sequence of Q sequences of int
        Right index images of each query.
    n_values : sequence of int
        The N of recall@N and mAP@N, from 1.
    scores : [Q] or [Q, k] of float, optional
        Of the first candidate of each query, or of all in the order of ``predictions``;
        comparable between queries, larger is better, see :func:`precision_recall`. For global
        descriptors minus their Euclidean distance; for patches :func:`raw_scores` after
        :func:`reorder`. Without them there is no precision-recall curve.
    all_queries : bool, default False
        Denominator of the curve's recall: all queries; otherwise those that have positives.
    bootstrap : Bootstrap, optional
        Draws the queries for 95 % intervals of the metrics; without it there are none.

    Returns
    -------
    Metrics

    Raises
    ------
    ValueError
        The shapes do not fit, a score is NaN, or an N is less than 1.
    """
    judged = PerQuery.of(predictions, positives, n_values, scores)
    return _averaged(judged, all_queries, bootstrap)


def _averaged(
    of: PerQuery,
    all_queries: bool,
    bootstrap: Bootstrap | None,
    confidences: NDArray[np.floating] | None = None,
) -> Metrics:
    queries, answerable = len(of.first_right), int(of.answerable.sum())
    hits, precisions = of.hits.sum(axis=0), of.average_precisions.sum(axis=0)
    counts = max(queries, 1), max(answerable, 1)
    curve = None
    if of.scores is not None:
        curve = precision_recall(of.right, of.scores, queries if all_queries else answerable)
    return Metrics(
        queries,
        queries - answerable,
        of.n_values,
        hits / counts[0],
        hits / counts[1],
        precisions / counts[0],
        precisions / counts[1],
        curve,
        None if bootstrap is None else measure_intervals(of, bootstrap, all_queries),
        None
        if confidences is None or not queries
        else measure_calibration(confidences, of.right, answerable),
    )


def by_method(
    retrieved: NDArray[np.int64] | None,
    reranked: NDArray[np.int64] | None,
    sequenced: NDArray[np.int64] | None = None,
) -> dict[str, NDArray[np.int64]]:
    """Return candidates [Q, k] by the name of their method, without those that are None."""
    answers = dict(zip(METHODS, (retrieved, reranked, sequenced), strict=True))
    return {method: found for method, found in answers.items() if found is not None}


def evaluate_methods(
    answers: Mapping[str, Predictions],
    positives: Positives,
    n_values: Sequence[int],
    scores: Mapping[str, NDArray[np.floating]],
    *,
    interval_block: str = "auto",
    query_names: Sequence[str] = (),
    confidences: Mapping[str, NDArray[np.floating]] = MappingProxyType({}),
) -> dict[str, Metrics]:
    """Compute all metrics of each method, with intervals; all methods draw the same queries.

    Parameters
    ----------
    answers, scores : mapping of str to predictions or scores
        By method name; methods without scores may be among them.
    positives, n_values
        As for :func:`evaluate_predictions`.
    interval_block, query_names
        As for :func:`~patchnetvlad.evaluation.intervals.choose_bootstrap`.
    confidences : mapping of str to ndarray [Q] of float, optional
        How likely first answers are right, by method. They take the place of scores that a method
        does not have.

    Returns
    -------
    dict of str to Metrics
    """
    judged = {
        method: PerQuery.of(found, positives, n_values, scores.get(method, confidences.get(method)))
        for method, found in answers.items()
    }
    if not judged or len(positives) == 0:
        return {method: _averaged(of, False, None) for method, of in judged.items()}
    right = np.stack([of.right for of in judged.values()], axis=1)
    bootstrap = choose_bootstrap(interval_block, right, query_names)
    return {
        method: _averaged(of, False, bootstrap, confidences.get(method))
        for method, of in judged.items()
    }
