# SPDX-License-Identifier: MIT
"""What every writer of features can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Sink(Protocol):
    """What described images are given to; one thread at a time."""

    def write(
        self, i: int, descriptor: NDArray[np.float32], arrays: Sequence[Any], modified: int = 0
    ) -> None:
        """Write the features of image ``i``: [P] and what :func:`encode_patches` made."""

    def commit(self) -> None:
        """Make sure that everything written survives."""


class Writer(Sink, Protocol):
    """What extraction writes the features of an image list with."""

    done: NDArray[np.bool_]
    """Images [N] whose features are on disk."""

    def start(self) -> None:
        """Make ready to write; features that are to be replaced make way."""

    def finish(self, failed: Mapping[str, str] | None = None) -> None:
        """Write ``globalfeats.npy``; FeatureError if images other than ``failed`` are missing."""

    def close(self) -> None:
        """Let go of the files."""
