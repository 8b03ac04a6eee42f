# SPDX-License-Identifier: MIT
"""The candidates of one query, in order, and how sure the first is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config import Config
from patchnetvlad.evaluation.confidence import Confidence
from patchnetvlad.pipeline.selection import is_kept, select


@dataclass(frozen=True, eq=False)
class Ranked:
    """The candidates of a query.

    Attributes
    ----------
    distances : ndarray [k] of float32
        Of global descriptors, nearest first.
    rows : ndarray [k] of int64
        In the index.
    scores : ndarray [k] of float64
        Larger is more similar.
    order : ndarray [k] of int64
        Which of them is the first answer, the second and so on.
    confidence : float or None
        How likely the first answer is right.
    reranked : bool
    """

    distances: NDArray[np.float32]
    rows: NDArray[np.int64]
    scores: NDArray[np.float64]
    order: NDArray[np.int64]
    confidence: float | None
    reranked: bool = False

    def reordered(
        self,
        scores: NDArray[np.float64],
        order: NDArray[np.int64],
        confidence: Confidence | None,
        config: Config,
    ) -> Ranked:
        """Return those that were re-ranked, the nearest, in their new order.

        ``rerank = auto`` keeps an answer that is surer before.

        Parameters
        ----------
        scores : ndarray [m] of float64
            Raw scores of the m nearest candidates; larger is more similar.
        order : ndarray [m] of int64
            Which of them is first, second and so on.
        confidence : Confidence or None
        config : Config
            Its ``rerank`` counts.

        Returns
        -------
        Ranked
        """
        first, m = order[:1], len(scores)
        after = None if confidence is None else confidence.of_reranking(scores[None], first)
        found = replace(
            self,
            distances=self.distances[:m],
            rows=self.rows[:m],
            scores=scores,
            order=order,
            confidence=None if after is None else float(after[0]),
            reranked=True,
        )
        if config.rerank == "always" or after is None or self.confidence is None:
            return found
        if not is_kept(np.array([self.confidence]), after, first)[0]:
            return found
        return replace(found, order=self.order[:m], confidence=self.confidence)


def retrieved(
    distances: NDArray[np.float32], rows: NDArray[np.int64], confidence: Confidence | None
) -> Ranked:
    """Return candidates as they were retrieved, nearest first."""
    known = confidence is not None and len(rows) > 0
    return Ranked(
        distances,
        rows,
        -distances.astype(np.float64),
        np.arange(len(rows)),
        confidence.of_one(distances) if known and confidence is not None else None,
    )


def is_sure(config: Config, found: Ranked) -> bool:
    """Whether ``rerank = auto`` leaves a query as it was retrieved."""
    if found.confidence is None:
        return False
    selected = select(config, np.array([found.confidence]))
    return selected is not None and not selected[0]
