# SPDX-License-Identifier: MIT
"""Which queries are re-ranked, and which answers stay, by how sure they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config import Config
from patchnetvlad.engines.rerank import Reranking
from patchnetvlad.evaluation.confidence import Confidence
from patchnetvlad.matching.fusion import raw_scores, reorder
from patchnetvlad.pipeline.record import Ranking, Selection


def select(config: Config, confidences: NDArray[np.float64] | None) -> NDArray[np.bool_] | None:
    """Choose the queries that are re-ranked.

    Parameters
    ----------
    config : Config
        Its ``rerank`` and ``sure`` count.
    confidences : ndarray [Q] of float64 or None
        How likely the answers of retrieval are right.

    Returns
    -------
    ndarray [Q] of bool or None
        None for all, as ``rerank = always`` has it.
    """
    if config.rerank == "always" or confidences is None:
        return None
    return confidences < config.sure


def settle(
    config: Config,
    retrieved: Ranking,
    found: Reranking,
    selected: NDArray[np.bool_] | None,
    confidence: Confidence | None,
) -> Ranking:
    """Decide on the answers after re-ranking.

    Parameters
    ----------
    config : Config
    retrieved : Ranking
    found : Reranking
        Of its candidates [Q, k].
    selected : ndarray [Q] of bool or None
        As :func:`select` chose; the answer of such a query is not replaced by one that is less
        sure. None leaves every query as it was re-ranked.
    confidence : Confidence or None

    Returns
    -------
    Ranking
        Without scores where queries were not re-ranked: theirs would be of another kind.
    """
    rows, before = found.predictions, retrieved.confidences
    raw = raw_scores(found.scores, config.patch_weights)
    first = (retrieved.rows == rows[:, :1]).argmax(axis=1)
    after = None if confidence is None else confidence.of_reranking(raw, first)
    ordering = reorder(0.0 - found.fused, retrieved.rows, rows)
    if selected is None or before is None or after is None or retrieved.ordering is None:
        scores = reorder(raw, retrieved.rows, rows)
        return Ranking("PatchNetVLAD", rows, scores, ordering, found.scores, after)
    kept = selected & is_kept(before, after, first)
    stays = kept | ~selected
    rows = np.where(stays[:, None], retrieved.rows, rows)
    return Ranking(
        "PatchNetVLAD",
        rows,
        reorder(raw, retrieved.rows, rows) if selected.all() else None,
        np.where(stays[:, None], retrieved.ordering, ordering),
        found.scores,
        np.where(stays, before, after),
        Selection(
            len(rows), int(selected.sum()), int(kept.sum()), float(config.sure), found.seconds
        ),
        selected,
    )


def is_kept(
    before: NDArray[np.float64], after: NDArray[np.float64], first: NDArray[np.integer]
) -> NDArray[np.bool_]:
    """Return whether answers of retrieval stay, because re-ranking found others less sure.

    Parameters
    ----------
    before, after : ndarray [Q] of float64
        How likely the answers before and after re-ranking are right.
    first : ndarray [Q] of int
        Rank in retrieval, from 0, of the answers after it.

    Returns
    -------
    ndarray [Q] of bool

    Examples
    --------
    The second answer changed and is less sure; the third stayed the same:

    >>> before, after = np.array([0.5, 0.7, 0.7]), np.array([0.9, 0.6, 0.6])
    >>> is_kept(before, after, np.array([3, 3, 0])).tolist()
    [False, True, False]
    """
    return (first > 0) & (after < before)
