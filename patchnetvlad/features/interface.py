# SPDX-License-Identifier: MIT
"""The interface of writers of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


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


class Writer(Sink, Protocol):
    """Writes the features of an image list, and knows which images are done."""

    done: NDArray[np.bool_]
    """Images [N] whose features are on disk."""

    def start(self) -> None:
        """Prepare for writing; delete features that are to be replaced."""

    def finish(self, failed: Mapping[str, str] | None = None) -> None:
        """Write ``globalfeats.npy``; FeatureError if images other than ``failed`` are missing."""

    def close(self) -> None:
        """Close the files."""
