# SPDX-License-Identifier: MIT
"""The interface of writers of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.features.store.index import Record


class Sink(Protocol):
    """Takes the features of images, from one thread at a time."""

    def write(
        self, i: int, descriptor: NDArray[np.float32], arrays: Sequence[Any], modified: int = 0
    ) -> None:
        """Write the features of image ``i``.

        Parameters
        ----------
        i : int
            Row in the image list.
        descriptor : ndarray [P] of float32
            Global descriptor.
        arrays : sequence of ndarray
            Patch descriptors or feature map, as encoded for the layout on disk.
        modified : int, default 0
            Time stamp of the image, ns; 0 if it is not known.
        """

    def commit(self) -> None:
        """Make everything written so far survive a crash."""


@dataclass(frozen=True, eq=False)
class Written:
    """What a :class:`Part` has written.

    Attributes
    ----------
    records : list of (str, Record)
        Of a store, by the names of the images.
    descriptors : dict of int to ndarray [P] of float32
        Global descriptors by row, where the :class:`Writer` has no quick way to read them.
    """

    records: list[tuple[str, Record]] = field(default_factory=list)
    descriptors: dict[int, NDArray[np.float32]] = field(default_factory=dict)


class Part(Sink, Protocol):
    """Writes the features of some images in another process, which it may be sent to."""

    def start(self) -> None:
        """Open the files; FeatureError if they cannot be created on this machine."""

    def finish(self) -> Written:
        """Flush everything to the disk, and return what :meth:`Writer.adopt` then enters."""

    def close(self) -> None:
        """Close the files, and delete those that are not finished."""


class Writer(Sink, Protocol):
    """Writes the features of an image list, and knows which images are done."""

    done: NDArray[np.bool_]
    """Images [N] whose features are on disk."""

    @property
    def location(self) -> Path | RemoteFolder:
        """Where the features are."""

    @property
    def allows_failures(self) -> bool:
        """Whether the features can be finished without those of some images."""

    @property
    def replaced_bytes(self) -> int:
        """The bytes that :meth:`start` will free."""

    def start(self) -> None:
        """Prepare for writing; delete features that are to be replaced."""

    def part(self, rows: Sequence[int]) -> Part:
        """Return a writer of the images in these rows of the list, for another process."""

    def adopt(self, written: Written) -> None:
        """Enter what a :class:`Part` has written."""

    def finish(self, failed: Mapping[str, str] | None = None) -> None:
        """Write ``globalfeats.npy``; FeatureError if images other than ``failed`` are missing."""

    def global_descriptors(self) -> NDArray[np.float32]:
        """Return the global descriptors [N, P] of a finished list."""

    def close(self) -> None:
        """Close the files."""
