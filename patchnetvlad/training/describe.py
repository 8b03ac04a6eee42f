# SPDX-License-Identifier: MIT
"""Features of many images as one array: the stream of extraction, without files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from patchnetvlad.config import Config
from patchnetvlad.engines.local_extract import stream_features
from patchnetvlad.errors import ImageError
from patchnetvlad.models.describer import Describer
from patchnetvlad.training.maps import Inputs, Pixels


@dataclass(frozen=True, eq=False)
class Described:
    """The vectors of many images.

    Attributes
    ----------
    vectors : ndarray [N, d] of float32
        Zero where an image could not be read.
    broken : dict of int to ImageError
        Rows of the images that could not be read.
    """

    vectors: NDArray[Any]
    broken: dict[int, ImageError]

    @property
    def readable(self) -> NDArray[np.int64]:
        """Rows of the images that were read, ascending."""
        return np.setdiff1d(np.arange(len(self.vectors)), list(self.broken))

    def packed(self) -> NDArray[Any]:
        """Move the vectors of the images that were read to the front, and return them."""
        kept = self.readable
        if self.broken:
            for to, row in enumerate(kept):
                self.vectors[to] = self.vectors[row]
        return self.vectors[: len(kept)]


class _Rows:
    """Writes the vector of each image to its row of an array, made at the first."""

    def __init__(self, count: int, file: Path | None, dtype: type) -> None:
        self.count, self.file, self.dtype = count, file, dtype
        self.array: NDArray[Any] | None = None

    def write(
        self, i: int, descriptor: NDArray[np.float32], arrays: Sequence[Any], modified: int = 0
    ) -> None:
        if self.array is None:
            shape = (self.count, len(descriptor))
            self.array = (
                np.zeros(shape, self.dtype)
                if self.file is None
                else np.lib.format.open_memmap(self.file, "w+", self.dtype, shape)
            )
        self.array[i] = descriptor

    def commit(self) -> None:
        pass  # the array is the caller's, who reads it when all is done


def describe_images(
    model: nn.Module,
    paths: Sequence[Path | str],
    config: Config,
    *,
    inputs: Inputs | None = None,
    file: Path | None = None,
    dtype: type = np.float32,
    title: str = "",
) -> Described:
    """Compute one vector per image, at the speed of extraction.

    Parameters
    ----------
    model : nn.Module
        With the children ``encoder``, ``pool`` and, optionally, ``WPCA``, which make
        [N, 3, H, W] to [N, d]. Evaluated without gradients.
    paths : sequence of Path or str
        Files or URLs.
    config : Config
        Of which ``image_size``, ``cache_batch_size``, ``threads``, ``memory_mb`` and
        ``precision`` are used (``auto`` and ``int8`` are ``exact``).
    inputs : Inputs, optional
        What the model takes; by default the images.
    file : Path, optional
        A ``.npy`` file that holds the vectors instead of memory.
    dtype : type, default np.float32
        Of the array.
    title : str, default ""
        Of the progress bar; none without.

    Returns
    -------
    Described

    Raises
    ------
    ImageError
        No image could be read.
    """
    config = replace(config, pooling="netvlad")  # no patches
    precision = "exact" if config.precision in ("auto", "int8") else config.precision
    describer = Describer(model, precision=precision, memory_mb=config.memory_mb)
    decode = (inputs or Pixels(config)).decoder(paths, pin=describer.device.type == "cuda")
    rows = _Rows(len(paths), file, dtype)
    with (
        tqdm(total=len(paths), desc=title, unit="image", disable=not title) as bar,
        torch.no_grad(),
    ):
        broken = stream_features(rows, [describer], decode, range(len(paths)), config, bar.update)
    if rows.array is None:
        raise next(iter(broken.values()), ImageError("there is no image to describe"))
    return Described(rows.array, broken)
