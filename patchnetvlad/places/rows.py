# SPDX-License-Identifier: MIT
"""The images of a place index, as held in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.names import normal_name
from patchnetvlad.features.store.index import Record
from patchnetvlad.places.lock import ReadWriteLock
from patchnetvlad.search.growing import GrowingIndex

Position = tuple[float, ...] | None
"""Two or three coordinates; None where they are not known."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of one image.

    Attributes
    ----------
    key : str
        As it was given.
    record : Record
        Where its features lie.
    position : tuple of float or None
    size : (int, int)
        Height and width, px, of the image as the network saw it.
    place : int
        Its number on the disk: the row, but where others before it are damaged.
    """

    key: str
    record: Record
    position: Position
    size: tuple[int, int]
    place: int


class Rows:
    """A list of images that only grows, with what finds them by key and by descriptor.

    Any number of threads may search while one adds; callers let one thread at a time add.

    Parameters
    ----------
    faiss : GrowingIndex
        Of the global descriptors, in the order of the list; empty.

    Attributes
    ----------
    dimension : int
        Coordinates of a position; 0 while none is known.
    names : list of str
        The keys, in the order in which they were added.
    """

    def __init__(self, faiss: GrowingIndex) -> None:
        self.faiss = faiss
        self.dimension = 0
        self.names: list[str] = []
        self._rows: list[Row] = []
        self._by_name: dict[str, int] = {}
        self._reading = ReadWriteLock()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Row:
        return self._rows[row]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def find(self, key: str | os.PathLike[str]) -> int | None:
        """Return the row of a key, where ``a//b`` is ``a/b``; None if there is none."""
        return self._by_name.get(normal_name(key))

    def keys(self) -> tuple[str, ...]:
        """Return the keys, in the order in which they were added."""
        return tuple(self.names)

    def positions(self) -> NDArray[np.float64] | None:
        """Return the positions [N, 2 or 3], NaN where there is none; None if there are none."""
        with self._reading.shared():
            known, dimension = [row.position for row in self._rows], self.dimension
        if dimension == 0:
            return None
        unknown = (math.nan,) * dimension
        return np.array([p if p is not None and len(p) == dimension else unknown for p in known])

    def search(
        self, descriptor: NDArray[np.float32], k: int, without: Collection[int] = ()
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the nearest images.

        Parameters
        ----------
        descriptor : ndarray [P] of float32
            Global descriptor.
        k : int
            How many, at most.
        without : collection of int
            Rows that are passed over.

        Returns
        -------
        distances : ndarray [m] of float32
            Euclidean, nearest first.
        rows : ndarray [m] of int64
        """
        left_out = [*without]
        with self._reading.shared():
            wanted = min(k + len(left_out), len(self._rows))
            distances, rows = self.faiss.search(descriptor, wanted)
        kept = np.flatnonzero(~np.isin(rows, left_out))[:k]
        return distances[kept], rows[kept]

    def add(self, rows: Sequence[Row], descriptors: Sequence[NDArray[np.float32]]) -> None:
        """Let images that are on the disk be found: FAISS last, which says what can be.

        Parameters
        ----------
        rows : sequence of Row
        descriptors : sequence of ndarray [P] of float32
            Global descriptors, one per row.
        """
        if not rows:
            return
        with self._reading.alone():
            self._list(rows)
            self.faiss.add(np.stack(descriptors))

    def restore(self, rows: Sequence[Row]) -> None:
        """List the images of a saved index, whose descriptors the caller puts into ``faiss``."""
        with self._reading.alone():
            self._list(rows)

    def _list(self, rows: Sequence[Row]) -> None:
        names = [normal_name(row.key) for row in rows]
        start = len(self._rows)
        self._rows += rows
        self.names += [row.key for row in rows]
        self._by_name.update({name: i for i, name in enumerate(names, start=start)})
        known = (len(row.position) for row in rows if row.position is not None)
        self.dimension = next(known, self.dimension)

    def forget_readers(self) -> None:
        """Let go of other threads' locks, in a forked process, which has not got these threads."""
        self._reading = ReadWriteLock()

    def drop_unfinished(self) -> int:
        """Drop rows that an interruption kept out of FAISS, and return how many are left."""
        whole = min(len(self._rows), len(self.faiss))
        del self._rows[whole:], self.names[whole:]
        return whole
