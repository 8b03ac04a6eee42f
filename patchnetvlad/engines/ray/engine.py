# SPDX-License-Identifier: MIT
"""The engine of a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.base.device import choose_precision
from patchnetvlad.config import Config
from patchnetvlad.engines.engine import Extraction, Reader, Run
from patchnetvlad.engines.ray.extract import RayExtractor
from patchnetvlad.engines.ray.extract_worker import use_gpus
from patchnetvlad.engines.ray.pool import TRIES
from patchnetvlad.engines.ray.rerank import matching
from patchnetvlad.engines.ray.search import retrieve
from patchnetvlad.search.retrieve import IndexSpec
from patchnetvlad.search.rows import Rows


class RayEngine:
    """The engine that computes on the connected Ray cluster.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        ``cuda``: one worker per GPU. ``cpu``: workers on all nodes that have processors. ``auto``
        is ``cuda`` where there is one.
    progress : bool, default True
        Show progress bars.

    Attributes
    ----------
    device : torch.device
        What the workers compute on.
    """

    attempts = TRIES
    leaves_out = True

    def __init__(self, device: str, progress: bool = True) -> None:
        self._progress = progress
        self._on_gpus = use_gpus(device)
        self.device = torch.device("cuda" if self._on_gpus else "cpu")

    def precision(self, config: Config) -> str:
        """Return the precision of extraction."""
        return choose_precision(config.precision, self.device)

    def extractor(self, extraction: Extraction) -> RayExtractor:
        """Prepare for extracting; workers start when they are needed."""
        return RayExtractor(extraction, self._on_gpus, self._progress)

    def rows(self, reader: Reader) -> Rows:
        """Return the global descriptors [N, P] of the index, for workers to read themselves."""
        rows = Rows.open(reader.global_file)
        return rows if reader.chosen is None else rows[reader.chosen]

    def search(
        self, queries: NDArray[np.float32], index: Any, top_k: int, spec: IndexSpec
    ) -> NDArray[np.int64]:
        """Retrieve by partitions; see :func:`patchnetvlad.engines.ray.search.retrieve`."""
        return retrieve(queries, index, top_k, **vars(spec), progress=self._progress)

    def matching(
        self,
        config: Config,
        readers: tuple[Reader, Reader],
        paths: tuple[Sequence[Path | str], Sequence[Path | str]],
        names: tuple[Sequence[str], Sequence[str]],
    ) -> contextlib.AbstractContextManager[Run]:
        """Match by workers; see :func:`patchnetvlad.engines.ray.rerank.matching`."""
        return matching(config, readers, paths, names, on_gpus=self._on_gpus)
