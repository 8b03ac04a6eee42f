# SPDX-License-Identifier: MIT
"""Answers to one image after the other: those before help, as they come."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.datasets.traverses import find_traverses
from patchnetvlad.errors import ArgumentError
from patchnetvlad.places.answers import Answer
from patchnetvlad.places.description import Description
from patchnetvlad.places.inputs import ImageLike
from patchnetvlad.search.sequences import IndexOrder, SequenceSearch, rescore_last, standardised

if TYPE_CHECKING:
    from patchnetvlad.places.index import PlaceIndex


class PlaceSequence:
    """Queries of one camera on its way, each answered with the help of those before it.

    :meth:`PlaceIndex.sequence` makes it. The answers are those that
    :func:`~patchnetvlad.search.sequences.rescore` gives for the whole traverse with ``ahead = 0``.
    It is for one camera, and one thread.

    Attributes
    ----------
    search : SequenceSearch
        With ``ahead = 0``.
    """

    def __init__(
        self,
        index: PlaceIndex,
        search: SequenceSearch,
        traverses: str | Path = "auto",
        gap: float | None = None,
    ) -> None:
        if search.after:
            raise ArgumentError(f"ahead = {search.after}: answers to a camera cannot look ahead")
        self.search = search
        self._index = index
        self._traverses, self._gap = traverses, gap
        self._seen: deque[tuple[NDArray[np.int64], NDArray[np.float64]]]
        self._seen = deque(maxlen=search.length)
        self._keys: tuple[str, ...] = ()
        self._order = IndexOrder.of([], search)
        self._lay_out()

    def _lay_out(self) -> None:
        """Lay the images of the index out again, if there are new ones."""
        if len(self._index) != len(self._keys):
            keys = tuple(self._index.keys)
            (found,) = find_traverses(self._traverses, keys)
            self._order = IndexOrder.of(found.pieces(self._gap), self.search)
            self._keys = keys

    def query(
        self,
        image: ImageLike | Description,
        top_k: int = 5,
        rerank: bool = True,
        *,
        threshold: float | None = None,
        candidates: int = 100,
        budget_ms: float | None = None,
    ) -> Answer:
        """Find the places most similar to the next image.

        Parameters
        ----------
        image, top_k, rerank, candidates, budget_ms
            As for :meth:`PlaceIndex.query`.
        threshold : float, optional
            If the score of the first place is lower, ``Answer.best`` is None. Scores are those of
            sequences.

        Returns
        -------
        Answer

        Raises
        ------
        PatchNetVLADError
            As of :meth:`PlaceIndex.query`.
        """
        most = max(top_k, candidates) if top_k > 0 else top_k  # which is refused there
        answer = self._index.query(
            image, most, rerank, threshold=threshold, candidates=candidates, budget_ms=budget_ms
        )
        return self.add(answer, top_k)

    def add(self, answer: Answer, top_k: int | None = None) -> Answer:
        """Take the answer of the index to the next image; return it as those before suggest.

        Parameters
        ----------
        answer : Answer
            Of :meth:`PlaceIndex.query`. Only its places can be answers, so ask for many.
        top_k : int, optional
            Maximum number of places to return; by default all.

        Returns
        -------
        Answer
            Whose places are in order of their scores, which are those of sequences. They have no
            confidence: that of ``answer`` is of the image alone.

        Raises
        ------
        ArgumentError
            The answer is of another index.
        """
        self._lay_out()
        places = answer.places
        if any(place.row >= len(self._keys) for place in places):
            raise ArgumentError("the answer is of another index than the sequence")
        if not places:
            return answer
        rows = np.array([place.row for place in places])
        self._seen.append((rows, standardised(np.array([place.score for place in places]))))
        slots = [self._order.slots[rows] for rows, _ in self._seen]
        scores = rescore_last(slots, [of for _, of in self._seen], self._order, self.search)
        order = np.argsort(-scores, kind="stable")[:top_k].tolist()
        ranked = enumerate(order, start=1)
        found = tuple(
            replace(places[i], score=float(scores[i]), rank=rank, confidence=None)
            for rank, i in ranked
        )
        return replace(answer, places=found, min_confidence=None)

    def restart(self) -> None:
        """Forget the images before, for example after the camera was carried elsewhere."""
        self._seen.clear()
