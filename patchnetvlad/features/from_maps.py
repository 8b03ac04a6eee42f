# SPDX-License-Identifier: MIT
"""Patch descriptors computed from stored feature maps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.base.device import choose_precision
from patchnetvlad.config import Config
from patchnetvlad.config_ini import PRECISIONS
from patchnetvlad.features.interface import Reader
from patchnetvlad.features.store.codec import Arrays, encode_patches
from patchnetvlad.models.describer import Describer
from patchnetvlad.models.grid import count_patches


class MapReader(Reader):
    """Computes the patches of a configuration from the feature maps that another reader reads.

    Parameters
    ----------
    maps : Reader
    config : Config
    load : callable
        Gives the model, when the first patches are asked for.
    device : torch.device or str, default "cpu"
        Where :meth:`arrays` computes.
    """

    kind = "float32"

    def __init__(
        self,
        maps: Reader,
        config: Config,
        load: Callable[[], Describer],
        device: torch.device | str = "cpu",
    ) -> None:
        self.directory, self.names, self.failed = maps.directory, maps.names, maps.failed
        self.manifest = maps.manifest
        if self.manifest is not None:
            used = choose_precision(config.precision, torch.device(device))
            self.manifest = replace(
                self.manifest,
                patch_sizes=list(config.patch_sizes),
                strides=list(config.strides),
                patch_vlad=config.patch_vlad,
                precision=max(used, self.manifest.precision, key=PRECISIONS.index),
                rounded="map",
            )
        self.stored_sizes = self.patch_sizes = config.patch_sizes
        self._maps, self._strides, self._load, self._device = maps, config.strides, load, device

    @functools.cached_property
    def _describer(self) -> Describer:
        return self._load()

    def patches(self, i: int, device: torch.device | str = "cpu") -> Sequence[Tensor]:
        """Compute the patches [n_s, P] of image ``i``, one per patch size."""
        return self._describer.patches(self._maps.feature_map(i, device))

    def arrays(self, i: int) -> Arrays:
        """Compute the patches of image ``i``."""
        return encode_patches(self.patches(i, self._device), self.kind)

    def descriptor(self, i: int) -> NDArray[np.float32]:
        """Read the global descriptor [P] of image ``i``."""
        return self._maps.descriptor(i)

    def shapes(self, i: int) -> list[Sequence[int]]:
        """Count the patches that fit on the map."""
        ((_, *shape),) = self._maps.shapes(i)
        dimension = len(self.descriptor(i))
        return [(n, dimension) for n in count_patches(shape, self.stored_sizes, self._strides)]

    def size(self, i: int) -> int:
        """Return the bytes of the patches as float32."""
        return sum(4 * rows * columns for rows, columns in self.shapes(i))

    def modified(self, i: int) -> int:
        """Return the time stamp of the image."""
        return self._maps.modified(i)
