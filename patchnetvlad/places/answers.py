# SPDX-License-Identifier: MIT
"""Answers of a :class:`~patchnetvlad.PlaceIndex`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import DrawingError
from patchnetvlad.places.description import Description
from patchnetvlad.plots.answer import plot_answers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Place:
    """An answer to a query.

    Attributes
    ----------
    key : str
        Key of the index image.
    score : float
        Larger is more similar. After re-ranking, the similarity of the patches, as in
        :func:`patchnetvlad.match`; otherwise the negated ``distance``. Comparable between
        queries. Places are ordered by the fused scores of the paper (section 3.5), which
        standardise patch scores per query, so ``score`` need not decrease along the ranking.
    rank : int
        From 1 (best).
    distance : float
        Euclidean distance of the global descriptors.
    position : tuple of float or None
        As given to :meth:`PlaceIndex.add`.
    row : int
        Row in ``PlaceIndex.keys``.
    confidence : float or None
        Of the first place: how likely it is the right answer, 0 to 1, if the configuration says
        where this is known from (``confidence``). None for other places.
    """

    key: str
    score: float
    rank: int
    distance: float
    position: tuple[float, ...] | None
    row: int
    confidence: float | None = None


class HasImages(Protocol):
    """A source of images of places: a :class:`~patchnetvlad.places.index.PlaceIndex`."""

    def picture(self, key: str) -> NDArray[np.uint8]:
        """Return the RGB image [H, W, 3] of a place in its original aspect ratio."""


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer of a :class:`~patchnetvlad.places.index.PlaceIndex` to a query.

    Attributes
    ----------
    places : tuple of Place
        Best first; empty if the index is empty.
    query : Description
        The features of the query image.
    reranked : bool
        Whether places were re-ranked by patches.
    threshold : float or None
        Lowest score that counts as a match.
    min_confidence : float or None
        Lowest confidence that counts as a match.
    num_reranked : int
        Images that were re-ranked, those nearest by global descriptor: fewer than were asked for if
        time was limited (``budget_ms``).
    """

    places: tuple[Place, ...]
    query: Description
    reranked: bool
    threshold: float | None
    _index: HasImages | None = field(default=None, repr=False)
    min_confidence: float | None = None
    num_reranked: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}  # which stays where it is

    @property
    def best(self) -> Place | None:
        """The first place, or None (no match) if its score or its confidence is too low.

        Other places do not count, even if their scores are higher: see :class:`Place`.
        """
        if not self.places:
            return None
        first = self.places[0]
        if self.threshold is not None and first.score < self.threshold:
            return None
        sure = first.confidence
        if self.min_confidence is not None and (sure is None or sure < self.min_confidence):
            return None
        return first

    def plot(self, **options: Any) -> Figure:
        """Draw the query next to its places.

        The options are those of :func:`patchnetvlad.plots.answer.plot_answers`.

        Raises
        ------
        DrawingError
            The answer was copied or pickled, without the index.
        ImageError
            As of :meth:`PlaceIndex.picture`.
        """
        if self._index is None:
            raise DrawingError("an answer that was copied or pickled has no images to be drawn")
        images = [self._index.picture(place.key) for place in self.places]
        return plot_answers(
            [self.query.picture],
            [images],
            scores=[[place.score for place in self.places]],
            names=[[Path(place.key).name for place in self.places]],
            query_names=[Path(self.query.name).name],
            **options,
        )
