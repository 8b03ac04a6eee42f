# SPDX-License-Identifier: MIT
"""The report's data about each query and its candidates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.evaluation.exports import candidate_distances
from patchnetvlad.evaluation.usual import Usual, agreeing, known_usual, measure_usual, patches_of
from patchnetvlad.matching.fusion import reorder
from patchnetvlad.report.results import Results

RIGHT, WRONG, RESCUED, HURT, NO_ANSWER = "r", "w", "s", "h", "n"
CHANGED, UNCHANGED = "c", "u"


@dataclass(frozen=True, eq=False)
class Shown:
    """Candidates of a query to show on the page.

    Attributes
    ----------
    columns : list of int
        Where they stand in ``retrieved``, in the order after re-ranking.
    missed : int or None
        The nearest right index image, where none is among the candidates.
    """

    columns: list[int]
    missed: int | None


@dataclass(frozen=True, eq=False)
class Table:
    """Data about every query, and about its candidates in the order of ``retrieved``.

    Attributes
    ----------
    status : str
        A letter a query.
    after : ndarray [Q, k] of int64
        Rank after re-ranking of each candidate, from 0.
    first : dict of str to ndarray [Q] of int64
        Rank of the first right candidate by method, from 0; -1 for none.
    right : ndarray [Q, k] of bool or None
    distances : ndarray [Q, k] of float64 or None
        NaN for frames of other clips.
    raw : ndarray [Q, k] of float64 or None
        Scores of Patch-NetVLAD.
    nearest : ndarray [Q] of int64
        The right index image nearest to each query; -1 for none.
    patches : tuple of int
        Patches of a query at each size; empty where their number is not known.
    agree : ndarray [Q, k, S] of int64 or None
        How many of these agree.
    usual : tuple of Usual
        How right and wrong pairs score, in this run or else on other data; empty: not known.
    """

    status: str
    retrieved: NDArray[np.int64]
    after: NDArray[np.int64]
    first: dict[str, NDArray[np.int64]]
    right: NDArray[np.bool_] | None
    distances: NDArray[np.float64] | None
    raw: NDArray[np.float64] | None
    nearest: NDArray[np.int64]
    patches: tuple[int, ...]
    agree: NDArray[np.int64] | None
    usual: tuple[Usual, ...]

    @classmethod
    def of(cls, results: Results) -> Table:
        """Make the table of all queries of a run."""
        record, retrieved = results.record, results.record.retrieved
        final, methods = record.final, ("NetVLAD", record.method)
        num_queries, k = retrieved.shape
        ranks = np.tile(np.arange(k, dtype=np.float64), (num_queries, 1))
        after = reorder(ranks, final, retrieved).astype(np.int64)
        raw = record.scores.get("PatchNetVLAD")
        if raw is not None and record.reranked is not None:
            raw = reorder(raw, record.reranked, retrieved)
        nearest = np.full(num_queries, -1)
        right = distances = None
        first: dict[str, NDArray[np.int64]] = {}
        if results.truth is not None and results.positives is not None:
            truth = results.truth
            if truth.distance is not None:
                distances = candidate_distances(truth.utm_queries, truth.utm_index, retrieved)
                if truth.has_clips:  # whose numbers are no distances
                    clips = truth.utm_index[retrieved, 0], truth.utm_queries[:, :1]
                    distances[clips[0] != clips[1]] = np.nan
            right = np.array(
                [np.isin(row, of) for row, of in zip(retrieved, results.positives, strict=True)]
            )
            for q, of in enumerate(results.positives):
                if len(of):
                    away = np.linalg.norm(truth.utm_index[of] - truth.utm_queries[q], axis=1)
                    nearest[q] = of[away.argmin()]
            for method, order in zip(methods, (ranks, after), strict=True):
                best = np.where(right, order, k).min(axis=1)
                first[method] = np.where(best < k, best, -1).astype(np.int64)
            before, now = (first[method] == 0 for method in methods)
            pairs = zip(before, now, nearest >= 0, strict=True)
            words = {
                (True, True): RIGHT, (False, False): WRONG, (False, True): RESCUED,
                (True, False): HURT,
            }  # fmt: skip
            status = "".join(words[b, a] if has else NO_ANSWER for b, a, has in pairs)
        else:
            status = "".join(UNCHANGED if row == 0 else CHANGED for row in after[:, 0])
        patches, agree = _agreeing(results)
        usual = _usual(results, right, raw, after, agree)
        return cls(
            status, retrieved, after, first, right, distances, raw, nearest, patches, agree, usual
        )

    def shown(self, q: int, most: int) -> Shown:
        """Choose the candidates of query ``q`` that the page shows, at least ``most`` of them."""
        after = self.after[q]
        columns = dict.fromkeys(np.argsort(after)[:most].tolist())
        columns |= dict.fromkeys(range(min(most, len(after))))
        for first, order in zip(self.first.values(), (np.arange(len(after)), after), strict=False):
            if first[q] >= 0:
                columns[int(np.flatnonzero(order == first[q])[0])] = None
        missed = None
        if self.right is not None and self.nearest[q] >= 0 and not self.right[q].any():
            missed = int(self.nearest[q])
        return Shown(sorted(columns, key=lambda j: int(after[j])), missed)


def _agreeing(results: Results) -> tuple[tuple[int, ...], NDArray[np.int64] | None]:
    """Return the number of patches at each size, and how many agree [Q, k, S], if it is known."""
    config, scores = results.config, results.record.patch_scores
    some = results.record.was_reranked
    if config is None or scores is None or (some is not None and not some.all()):
        return (), None
    patches = patches_of(config)
    agree = agreeing(scores, patches, config.matcher)
    return (patches, agree) if agree is not None else ((), None)


def _usual(
    results: Results,
    right: NDArray[np.bool_] | None,
    raw: NDArray[np.float64] | None,
    after: NDArray[np.int64],
    agree: NDArray[np.int64] | None,
) -> tuple[Usual, ...]:
    """Measure how right and wrong pairs score where that is known, or take what is known of them.

    All arrays are in the order of ``retrieved``.
    """
    if raw is None:
        return ()
    if right is None:
        origin = results.origin
        checkpoint = (origin.checkpoint if origin is not None else None) or ""
        return () if results.config is None else known_usual(results.config, checkpoint)
    order = np.argsort(after, axis=1)
    ranked = None if agree is None else np.take_along_axis(agree, order[:, :, None], 1)
    measured = measure_usual(
        np.take_along_axis(right, order, 1), np.take_along_axis(raw, order, 1), ranked
    )
    return (measured,)
