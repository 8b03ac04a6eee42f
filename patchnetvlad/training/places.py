# SPDX-License-Identifier: MIT
"""Places as cells of positions, and batches of several images of several places."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import GroundTruthError
from patchnetvlad.training.areas import number_rows
from patchnetvlad.training.tuples import Area, Rows

logger = logging.getLogger(__name__)

LEAST = 2
"""Images of a place that can be learnt from."""

_LOOKED_AT = 1024  # places, for those that are far enough from others of a batch


@dataclass(frozen=True, eq=False)
class PlaceSet:
    """Images with positions, from which batches of places are drawn.

    Attributes
    ----------
    images : tuple of Path or str
        N images, each once.
    areas : ndarray [N] of int64
        Numbers of their areas, between which positions cannot be compared.
    positions : ndarray [N, c] of float64
    headings : ndarray [N] of float64
        In degrees; NaN where they are not known.
    cell, turn : float
        Side of a cell, in the unit of the positions, and the angle of its headings, in degrees;
        0: all headings.
    gap : float
        Images of two places in a batch are further apart than this.
    """

    images: tuple[Path | str, ...]
    areas: NDArray[np.int64]
    positions: NDArray[np.float64]
    headings: NDArray[np.float64]
    cell: float
    turn: float
    gap: float

    @classmethod
    def of_areas(cls, areas: Sequence[Area], cell: float, turn: float, gap: float) -> PlaceSet:
        """Combine the queries and the index images of areas.

        Parameters
        ----------
        areas : sequence of Area
        cell, turn, gap : float
            See the attributes.

        Returns
        -------
        PlaceSet

        Raises
        ------
        GroundTruthError
            No cell has two images, or only one has.
        """
        rows: dict[Path | str, tuple[int, NDArray[np.float64], float]] = {}
        for number, area in enumerate(areas):
            unknown = np.full(len(area.index), np.nan)
            headings = unknown if area.headings is None else area.headings
            for image, at, heading in zip(area.index, area.utm_index, headings, strict=True):
                rows.setdefault(image, (number, at, float(heading)))
            for image, at in zip(area.queries, area.utm_queries, strict=True):
                rows.setdefault(image, (number, at, float("nan")))
        found = cls(
            tuple(rows),
            np.array([number for number, _, _ in rows.values()], dtype=np.int64),
            np.array([at for _, at, _ in rows.values()]),
            np.array([heading for _, _, heading in rows.values()]),
            cell,
            turn,
            gap,
        )
        found._check()
        return found

    def without(self, images: Sequence[Path | str]) -> PlaceSet:
        """Return the set without some images; the errors are those of :meth:`of_areas`."""
        if not images:
            return self
        left_out = set(images)
        kept = np.array([image not in left_out for image in self.images], dtype=bool)
        rest = replace(
            self,
            images=tuple(image for image, ok in zip(self.images, kept, strict=True) if ok),
            areas=self.areas[kept],
            positions=self.positions[kept],
            headings=self.headings[kept],
        )
        rest._check()
        return rest

    def _check(self) -> None:
        places = self.places()
        used = sum(map(len, places))
        if not places:
            raise GroundTruthError(
                f"none of {len(self.images)} images shares a cell of {self.cell:g} with another: "
                "to learn from a place, it takes two images of it; raise cellsize, or add images"
            )
        if not any(len(batch) >= 2 for batch in self._apart(places, np.random.default_rng(0), 2)):
            raise GroundTruthError(
                f"all of {used} images lie within {self.gap:g} of each other: there is one place, "
                "and nothing to tell it from; lower negdistthr, or add images of other places"
            )
        logger.info(
            "%d places of %d images; %d images are alone in their cells of %g, and left out",
            len(places), used, len(self.images) - used, self.cell,
        )  # fmt: skip

    def places(self, shift: NDArray[np.float64] | float = 0.0) -> Rows:
        """Return the rows of the images of each place that has two or more.

        Parameters
        ----------
        shift : ndarray [c + 1] of float64 or float, default 0
            Of the cells, and of the headings, as a share of their sides.

        Returns
        -------
        list of ndarray of int64
        """
        shift = np.broadcast_to(shift, self.positions.shape[1] + 1)
        corners = np.floor(self.positions / self.cell + shift[:-1])  # [N, c]
        facing = np.zeros(len(self.images))
        if self.turn:
            sides = max(1, round(360 / self.turn))
            known = np.nan_to_num(np.floor(self.headings * sides / 360 + shift[-1]) % sides)
            facing = np.where(np.isfinite(self.headings), known, -1)
        numbers = number_rows(np.column_stack([self.areas, corners, facing]))
        order = np.argsort(numbers, kind="stable")
        cells = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
        return [rows for rows in cells if len(rows) >= LEAST]

    def draw(self, random: np.random.Generator, places: int, images: int) -> list[Rows]:
        """Draw the batches of an epoch: each place once, in cells that are laid out anew.

        Parameters
        ----------
        random : numpy.random.Generator
        places, images : int
            Places of a batch, and images of each, at most.

        Returns
        -------
        list of list of ndarray of int64
            Rows of the images of each place of each batch. Batches are smaller where not enough
            places are further apart than ``gap``; a place that no other is far enough from is left
            out.
        """
        cells = self.places(random.random(self.positions.shape[1] + 1))
        batches = list(self._apart(cells, random, places)) if cells else []
        return [
            [random.permutation(cells[place])[:images] for place in batch]
            for batch in batches
            if len(batch) >= 2
        ]

    def _apart(
        self, places: Rows, random: np.random.Generator, size: int
    ) -> Iterator[NDArray[np.int64]]:
        """Group places, in an order by chance, so that those of a group are far apart."""
        centres = np.stack([self.positions[rows].mean(axis=0) for rows in places])  # [n, c]
        reach = np.array([
            np.linalg.norm(self.positions[rows] - centre, axis=1).max()
            for rows, centre in zip(places, centres, strict=True)
        ])  # fmt: skip
        area = self.areas[[rows[0] for rows in places]]
        waiting = random.permutation(len(places))
        while len(waiting):
            looked_at = waiting[:_LOOKED_AT]
            free = np.ones(len(looked_at), dtype=bool)
            taken: list[int] = []
            while len(taken) < size and free.any():
                row = int(free.argmax())
                place = looked_at[row]
                taken.append(row)
                distance = np.linalg.norm(centres[looked_at] - centres[place], axis=1)
                near = distance - reach[looked_at] - reach[place] <= self.gap
                free &= ~(near & (area[looked_at] == area[place]))
                free[row] = False
            yield looked_at[taken]
            waiting = np.delete(waiting, taken)
