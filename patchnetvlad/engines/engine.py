# SPDX-License-Identifier: MIT
"""The interface of engines, the same wherever the computation runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.features.interface import Reader, Writer
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.models.grid import PatchGrid
from patchnetvlad.search.retrieve import IndexSpec

Array = NDArray[np.float32]

PatchReader = Callable[[int], Sequence[Tensor] | Sequence[NDArray[np.float32]]]
GridReader = Callable[[int], Sequence[PatchGrid]]
Names = Sequence[str] | Mapping[int, str]
Candidates = NDArray[np.int64] | Mapping[int, NDArray[np.int64]]
Run = Callable[[Sequence[int], NDArray[np.int64]], Iterator[tuple[int, NDArray[np.float64]]]]


@dataclass(frozen=True, eq=False)
class Extraction:
    """An extraction: images and settings.

    Attributes
    ----------
    config : Config
    manifest : Manifest
        Of the features.
    images : ImageList
    paths : sequence of Path or str
        Files or URLs.
    rows : sequence of int or None
        Rows of these images in the whole list, where they are a part of one.
    """

    config: Config
    manifest: Manifest
    images: ImageList
    paths: Sequence[Path | str]
    rows: Sequence[int] | None = None


class Extractor(Protocol):
    """Extracts the features of images.

    Attributes
    ----------
    dimension : int
        P, of global and of patch descriptors.
    map_channels : int
        D, of feature maps.
    """

    dimension: int
    map_channels: int

    def run(self, writer: Writer, todo: Sequence[int], record_bytes: float) -> dict[str, str]:
        """Extract the features of the images in the rows ``todo``, and write them.

        Parameters
        ----------
        writer : Writer
            Ready for writing.
        todo : sequence of int
        record_bytes : float
            What the features of an image take; 0 if that is not known.

        Returns
        -------
        dict of str to str
            The images that have no features, by name, and why. They do not keep the others from
            being extracted.
        """


class Engine(Protocol):
    """Runs the computation, in this process or on a cluster.

    Attributes
    ----------
    device : torch.device
    attempts : int
        Number of attempts at an image.
    leaves_out : bool
        Whether features are finished without those of images that fail.
    """

    device: torch.device
    attempts: int
    leaves_out: bool

    def precision(self, config: Config) -> str:
        """Return the precision of extraction: exact, fast, half or int8."""

    def extractor(self, extraction: Extraction) -> Extractor:
        """Prepare for extraction."""

    def rows(self, reader: Reader) -> Any:
        """Return the global descriptors [N, P] of the index, in the form for :meth:`search`."""

    def search(self, queries: Array, index: Any, top_k: int, spec: IndexSpec) -> NDArray[np.int64]:
        """Retrieve; see :func:`patchnetvlad.search.retrieve.retrieve`."""

    def matching(
        self,
        config: Config,
        readers: tuple[Reader, Reader],
        paths: tuple[Sequence[Path | str], Sequence[Path | str]],
        names: tuple[Sequence[str], Sequence[str]],
    ) -> contextlib.AbstractContextManager[Run]:
        """Prepare for scoring the candidates of queries; see :func:`collect_scores`."""
