# SPDX-License-Identifier: MIT
"""The engine of this process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.base.device import (
    choose_device,
    choose_devices,
    choose_precision,
    describe_device,
)
from patchnetvlad.config import Config
from patchnetvlad.engines.engine import Array, Extraction, Run
from patchnetvlad.engines.local_extract import LocalExtractor
from patchnetvlad.engines.local_rerank import Matcher
from patchnetvlad.engines.readers import grid_reader, patch_readers
from patchnetvlad.features.interface import Reader
from patchnetvlad.models.describer import Describer
from patchnetvlad.search.retrieve import IndexSpec, retrieve_by

logger = logging.getLogger(__name__)


class LocalEngine:
    """The engine that computes in this process.

    Parameters
    ----------
    device : str
        Without a number, ``cuda`` stands for as many GPUs as the configuration says.
    progress : bool, default True
        Show progress bars.
    """

    attempts = 1
    leaves_out = False

    def __init__(self, device: str, progress: bool = True) -> None:
        self.device = choose_device(device)
        self._named, self._progress = device, progress

    def precision(self, config: Config) -> str:
        """Return the precision of extraction."""
        return choose_precision(config.precision, self._devices(config)[0])

    def extractor(self, extraction: Extraction) -> LocalExtractor:
        """Load the model on each device."""
        config = extraction.config
        describers = [Describer.load(config, device) for device in self._devices(config)]
        return LocalExtractor(extraction, describers, self._progress)

    def _devices(self, config: Config) -> list[torch.device]:
        return choose_devices(self._named, config.num_gpus)

    def rows(self, reader: Reader) -> Array:
        """Return the global descriptors [N, P] of the index."""
        return reader.global_descriptors

    def search(self, queries: Array, index: Any, top_k: int, spec: IndexSpec) -> NDArray[np.int64]:
        """Retrieve; see :func:`patchnetvlad.search.retrieve.retrieve`."""
        return retrieve_by(queries, index, top_k, spec, device=self.device)

    @contextlib.contextmanager
    def matching(
        self,
        config: Config,
        readers: tuple[Reader, Reader],
        paths: tuple[Sequence[Path | str], Sequence[Path | str]],
        names: tuple[Sequence[str], Sequence[str]],
    ) -> Iterator[Run]:
        """Match by threads; see :class:`patchnetvlad.engines.local_rerank.Matcher`."""
        logger.info("computing on %s", describe_device(self.device))
        ours, theirs = patch_readers(config, readers, self.device)
        grids = grid_reader(config, paths[0]), grid_reader(config, paths[1])
        with Matcher(config, self.device, (ours, theirs), grids, names) as matcher:
            yield matcher.run
