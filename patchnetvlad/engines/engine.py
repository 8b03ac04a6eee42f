# SPDX-License-Identifier: MIT
"""The engine of a run: what a conductor may ask for, wherever it is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.config import Config
from patchnetvlad.features.interface import Reader
from patchnetvlad.models.grid import PatchGrid
from patchnetvlad.search.retrieve import IndexSpec

Array = NDArray[np.float32]

PatchReader = Callable[[int], Sequence[Tensor] | Sequence[NDArray[np.float32]]]
GridReader = Callable[[int], Sequence[PatchGrid]]
Names = Sequence[str] | Mapping[int, str]
Candidates = NDArray[np.int64] | Mapping[int, NDArray[np.int64]]
Run = Callable[[Sequence[int], NDArray[np.int64]], Iterator[tuple[int, NDArray[np.float64]]]]


class Engine(Protocol):
    """Who computes.

    Attributes
    ----------
    device : torch.device
    """

    device: torch.device

    def rows(self, reader: Reader) -> Any:
        """Give the global descriptors [N, P] of the index as :meth:`search` wants them."""

    def search(self, queries: Array, index: Any, top_k: int, spec: IndexSpec) -> NDArray[np.int64]:
        """Retrieve; see :func:`patchnetvlad.search.retrieve.retrieve`."""

    def matching(
        self,
        config: Config,
        readers: tuple[Reader, Reader],
        paths: tuple[Sequence[Path | str], Sequence[Path | str]],
        names: tuple[Sequence[str], Sequence[str]],
    ) -> contextlib.AbstractContextManager[Run]:
        """Make ready to score the candidates of queries; see :func:`collect_scores`."""
