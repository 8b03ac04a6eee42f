# SPDX-License-Identifier: MIT
"""Answers of sequences: the candidates of a method, ordered by those of neighbouring queries."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.arguments import shown
from patchnetvlad.datasets.traverses import Traverses, find_traverses
from patchnetvlad.errors import ArgumentError, ResultsError
from patchnetvlad.evaluation.metrics import SEQUENCE
from patchnetvlad.pipeline.record import Ranking
from patchnetvlad.search.sequences import SequenceSearch, rescore

logger = logging.getLogger(__name__)

LEAST_SPEED, MOST_SPEED = 0.05, 20.0
"""Of the expected speed that is taken from the lists."""

_NO_SCORES = "have no scores, by which queries could help each other"


@dataclass(frozen=True)
class SequenceOptions:
    """How the queries of a traverse help each other.

    Attributes
    ----------
    length, ahead, method
        As for :class:`~patchnetvlad.search.sequences.SequenceSearch`.
    speed : float, optional
        Expected motion from one query to the next, in index images. By default the ratio of the
        mean steps of the two lists, in frames or in time, within 0.05 and 20; 1 where traverses
        are in the order of the lists.
    traverses : str or Path, default "auto"
        As for :func:`~patchnetvlad.datasets.traverses.find_traverses`.
    gap : float, optional
        Images further apart than this are of two traverses: frames, rows of the list, or the unit
        of time stamps.

    Raises
    ------
    ArgumentError
        A value is out of range.
    """

    length: int = 10
    ahead: int | None = None
    method: str = "viterbi"
    speed: float | None = None
    traverses: str | Path = "auto"
    gap: float | None = None

    def __post_init__(self) -> None:
        self.search(1.0)
        if self.gap is not None and not (math.isfinite(self.gap) and self.gap > 0):
            raise ArgumentError(f"gap = {shown(self.gap)} must be more than 0")

    def search(self, expected: float) -> SequenceSearch:
        """Return the search for this expected speed, unless one was given."""
        speed = expected if self.speed is None else self.speed
        return SequenceSearch(self.length, self.ahead, self.method, speed)


@dataclass(frozen=True, eq=False)
class Sequenced:
    """Answers of sequences, and how they were found.

    Attributes
    ----------
    ranking : Ranking
    about : dict of str
        For ``run.json``: the method whose candidates these are, the settings of the search, and
        where the traverses are from.
    """

    ranking: Ranking
    about: dict[str, Any]


def check_sequence(
    options: SequenceOptions,
    query_names: Sequence[str],
    index_names: Sequence[str],
    candidates: int,
    *,
    scored: bool = True,
) -> None:
    """Check, before any work is done, that queries can help each other.

    Parameters
    ----------
    options : SequenceOptions
    query_names, index_names : sequence of str
    candidates : int
        How many a query will have.
    scored : bool, default True
        Whether they will have scores.

    Raises
    ------
    ResultsError
        There will be no scores, each query will have one candidate, or no two images are of one
        traverse.
    ImageListError
        The traverses are not known.
    """
    if not scored:
        raise ResultsError(f"the given candidates {_NO_SCORES}")
    _check_several(candidates)
    _traverses(options, query_names, index_names)


def _check_several(candidates: int) -> None:
    """Raise ResultsError unless there is something to order."""
    if candidates < 2:
        raise ResultsError(
            f"each query has {candidates} candidate; sequences order several: raise n_values_all"
        )


def _traverses(
    options: SequenceOptions, query_names: Sequence[str], index_names: Sequence[str]
) -> list[tuple[Traverses, list[NDArray[np.int64]]]]:
    """Return the traverses of queries and index images, and the rows in each."""
    found = find_traverses(options.traverses, query_names, index_names)
    pieces = [(of, of.pieces(options.gap)) for of in found]
    for what, (of, rows) in zip(("queries", "index images"), pieces, strict=True):
        if max(map(len, rows), default=0) < 2:
            raise ResultsError(
                f"no two of the {len(of.number)} {what} are of one traverse by {of.source}, so "
                "none can help another; give --traverses FILE, or a larger --gap"
            )
    return pieces


def rank_by_sequence(
    options: SequenceOptions,
    method: str,
    rows: NDArray[np.int64],
    scores: NDArray[np.float64] | None,
    query_names: Sequence[str],
    index_names: Sequence[str],
) -> Sequenced:
    """Order the candidates of every query by those of its neighbours; say how in the log.

    Parameters
    ----------
    options : SequenceOptions
    method : str
        Whose candidates these are.
    rows : ndarray [Q, k] of int64
        Rows of the index list.
    scores : ndarray [Q, k] of float64 or None
        Larger is more similar.
    query_names, index_names : sequence of str

    Returns
    -------
    Sequenced

    Raises
    ------
    ResultsError
        There are no scores, each query has one candidate, or no two images are of one traverse.
    ImageListError
        The traverses are not known.
    """
    if scores is None:
        raise ResultsError(f"the candidates of {method} {_NO_SCORES}")
    _check_several(rows.shape[1])
    (of_queries, queries), (of_index, index) = _traverses(options, query_names, index_names)
    search = options.search(_expected_speed(of_queries, of_index, options.gap))
    logger.info(
        "%s: %d queries before and %d after each, in %d traverses of queries and %d of index "
        "images by %s; %.3g index images from one query to the next",
        f"Sequences ({search.method})", search.before, search.after, len(queries), len(index),
        of_queries.source, search.speed,
    )  # fmt: skip
    found = rescore(rows, scores, queries, index, search)
    order = np.argsort(-found, axis=1, kind="stable")
    found = np.take_along_axis(found, order, axis=1)
    about = {"of": method, **asdict(replace(search, ahead=search.after))}
    about |= {"traverses": of_queries.source, "gap": options.gap}
    ranking = Ranking(SEQUENCE, np.take_along_axis(rows, order, axis=1), found, found)
    return Sequenced(ranking, about)


def _expected_speed(queries: Traverses, index: Traverses, gap: float | None) -> float:
    """Return the index images that a query is from the one before, if the lists tell."""
    if not (queries.measured and index.measured):
        return 1.0
    steps = queries.step(gap), index.step(gap)
    if steps[0] is None or steps[1] is None:
        return 1.0
    return min(max(steps[0] / steps[1], LEAST_SPEED), MOST_SPEED)
