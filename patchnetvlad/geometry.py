# SPDX-License-Identifier: MIT
"""Where patches lie: their grid on the feature map, and their centres in the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import ConfigError
from patchnetvlad.models.backbone import PADDING, RECEPTIVE_FIELD, STRIDE


def feature_map_shape(image_size: Sequence[int]) -> tuple[int, int]:
    """Return (h, w) of the feature map of an image of (height, width) px."""
    height, width = image_size
    return height // STRIDE, width // STRIDE


def grid_shape(map_shape: Sequence[int], patch_size: int, stride: int) -> tuple[int, int]:
    """Count the patches that fit on a feature map.

    Parameters
    ----------
    map_shape : (int, int)
        (h, w) in cells.
    patch_size, stride : int
        In cells.

    Returns
    -------
    rows, columns : int

    Raises
    ------
    ConfigError
        Not one patch fits.
    """
    height, width = map_shape
    if patch_size > height or patch_size > width:
        raise ConfigError(
            f"patch size {patch_size} does not fit on the feature map of {height} x {width} cells "
            f"(an image of {STRIDE} px a cell); use larger images or smaller patch_sizes"
        )
    return (height - patch_size) // stride + 1, (width - patch_size) // stride + 1


def count_patches(
    map_shape: Sequence[int], patch_sizes: Sequence[int], strides: Sequence[int]
) -> list[int]:
    """Count the patches of every size on a feature map of (h, w) cells; see :func:`grid_shape`."""
    pairs = zip(patch_sizes, strides, strict=True)
    return [math.prod(grid_shape(map_shape, size, stride)) for size, stride in pairs]


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """The patches of one size on one image, row-major.

    Attributes
    ----------
    patch_size, stride : int
        In cells of the feature map.
    keypoints : ndarray [n, 2] of int64
        Centres (x, y) in px of the resized image.
    indices : ndarray [n, 2] of int64
        Place (column, row) in the grid.
    """

    patch_size: int
    stride: int
    keypoints: NDArray[np.int64]
    indices: NDArray[np.int64]

    @classmethod
    def of_map(cls, map_shape: Sequence[int], patch_size: int, stride: int) -> PatchGrid:
        """Lay the grid over a feature map of (h, w) cells.

        The centre of a patch is the middle of the union of its cells' receptive fields,
        truncated to whole px.

        Raises
        ------
        ConfigError
            Not one patch fits.
        """
        rows, columns = grid_shape(map_shape, patch_size, stride)
        row, column = np.divmod(np.arange(rows * columns), columns)
        indices = np.stack([column, row], axis=1).astype(np.int64)  # [n, 2]
        # Cell c sees px from 16 c - 90 to 16 c - 90 + 195 along each axis.
        middle = (RECEPTIVE_FIELD - 1) / 2 - PADDING
        offset = middle + STRIDE * (patch_size - 1) / 2
        keypoints = (STRIDE * stride * indices + offset).astype(np.int64)
        return cls(patch_size, stride, keypoints, indices)

    def __len__(self) -> int:
        return len(self.indices)


def patch_grids(
    image_size: Sequence[int], patch_sizes: Sequence[int], strides: Sequence[int]
) -> list[PatchGrid]:
    """Return the grid of every patch size on an image of (height, width) px."""
    map_shape = feature_map_shape(image_size)
    return [
        PatchGrid.of_map(map_shape, size, stride)
        for size, stride in zip(patch_sizes, strides, strict=True)
    ]
