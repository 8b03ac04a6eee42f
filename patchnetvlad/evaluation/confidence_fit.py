# SPDX-License-Identifier: MIT
"""Fitting confidences to queries whose right answers are known, and cross-validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.evaluation.calibration import area_under_risk_coverage, measure_calibration
from patchnetvlad.evaluation.confidence import Logistic
from patchnetvlad.evaluation.intervals import traverses

_BLOCKS = 5  # of a single traverse


@dataclass(frozen=True, eq=False)
class Answers:
    """First answers to queries by one method.

    Attributes
    ----------
    signals : ndarray [n, S] of float64
        See :mod:`patchnetvlad.evaluation.signals`.
    right : ndarray [n] of bool
    answerable : ndarray [n] of bool
        Whether there is a right answer in the index.
    distances : ndarray [n] of float64
        Smallest distance of global descriptors, for comparison.
    groups : sequence of n str
        Groups of queries, such as floors, of which each is left out in turn.
    """

    signals: NDArray[np.float64]
    right: NDArray[np.bool_]
    answerable: NDArray[np.bool_]
    distances: NDArray[np.float64]
    groups: Sequence[str]

    @cached_property
    def held_out(self) -> NDArray[np.float64]:
        """Confidences [n], each by a fit to the other groups."""
        groups = np.array(self.groups)
        found = np.zeros(len(groups))
        for group in dict.fromkeys(self.groups):
            there = groups == group
            fitted = fit_logistic(self.signals[~there], self.right[~there])
            found[there] = fitted.probability(self.signals[there])
        return found

    def quality(self) -> dict[str, Any]:
        """Return how good confidences are in cross-validation, as JSON types."""
        sure, right = self.held_out, self.right
        found = measure_calibration(sure, right, int(self.answerable.sum()))
        likely = np.clip(np.where(right, sure, 1 - sure), 1e-9, 1)
        numbers = {
            "log_loss": -float(np.log(likely).mean()),
            "expected_calibration_error": found.expected_error,
            "aurc": found.aurc,
            "aurc_of_distance": area_under_risk_coverage(-self.distances, right),
            "recall_at_full_precision": found.recall_at_full_precision,
        }
        return {
            "queries": len(right),
            "right": int(right.sum()),
            "groups_left_out": len(set(self.groups)),
            **{name: round(value, 4) for name, value in numbers.items()},
        }


def fit_logistic(signals: NDArray[np.floating], right: NDArray[np.bool_]) -> Logistic:
    """Fit the probability that answers are right, by logistic regression.

    Signals are standardised, and their coefficients penalised by half of the sum of their squares.
    A signal with a negative coefficient is left out, so that the probability never falls where a
    signal grows.

    Parameters
    ----------
    signals : ndarray [n, S] of float
    right : ndarray [n] of bool
        If all are the same, the probability is constant: (number of right ones + 1) / (n + 2).

    Returns
    -------
    Logistic
    """
    from sklearn.linear_model import LogisticRegression

    values = np.asarray(signals, dtype=np.float64)
    coefficients = np.zeros(values.shape[1])
    hits = int(right.sum())
    intercept = math.log((hits + 1) / (len(right) - hits + 1))
    if hits in (0, len(right)):
        return Logistic(intercept, tuple(coefficients.tolist()))
    mean, scale = values.mean(axis=0), values.std(axis=0)
    used = np.flatnonzero(scale > 0)
    while len(used):
        model = LogisticRegression(C=1.0, max_iter=1000)
        model.fit((values[:, used] - mean[used]) / scale[used], right)
        slopes = model.coef_[0]
        if slopes.min() >= 0:
            coefficients[used] = slopes / scale[used]
            intercept = float(model.intercept_[0] - coefficients @ mean)
            break
        used = np.delete(used, slopes.argmin())
    return Logistic(intercept, tuple(coefficients.tolist()))


def groups_of(names: Sequence[str]) -> list[str]:
    """Return groups of queries that are left out together in cross-validation.

    They are the folders of their names, such as floors or days; where there is one, traverses by
    name (:func:`~patchnetvlad.evaluation.intervals.traverses`).

    Parameters
    ----------
    names : sequence of Q str

    Returns
    -------
    list of Q str

    Examples
    --------
    >>> groups_of(["floor1/hall_1.jpg", "floor1/hall_2.jpg", "floor2/hall_1.jpg"])
    ['floor1', 'floor1', 'floor2']
    """
    folders = [name.rpartition("/")[0] for name in names]
    return folders if len(set(folders)) > 1 else traverses(names)


def split_groups(groups: Sequence[str]) -> list[str]:
    """Return groups as they are; five of consecutive queries if there is only one.

    Examples
    --------
    >>> split_groups(["day"] * 10)[::2]
    ['day 0', 'day 1', 'day 2', 'day 3', 'day 4']
    """
    if len(set(groups)) > 1:
        return list(groups)
    return [f"{group} {i * _BLOCKS // len(groups)}" for i, group in enumerate(groups)]
