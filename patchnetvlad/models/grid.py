# SPDX-License-Identifier: MIT
"""Geometry of the network: stride, receptive field, patch grids and their key points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import ConfigError

ENCODER_DIM = 512
"""Channels D of the feature map."""

STRIDE = 16
"""Cell size of the feature map, in px of the resized image."""

RECEPTIVE_FIELD = 196
"""Side of the receptive field of one cell, px."""

PADDING = 90
"""Accumulated padding before the first receptive field, px."""


def feature_map_shape(image_size: Sequence[int]) -> tuple[int, int]:
    """Return (h, w) of the feature map of an image of (height, width) px.

    Examples
    --------
    >>> feature_map_shape((480, 640))
    (30, 40)
    """
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
        No patch fits.

    Examples
    --------
    >>> grid_shape((30, 40), patch_size=5, stride=1)
    (26, 36)
    """
    height, width = map_shape
    if patch_size > height or patch_size > width:
        raise ConfigError(
            f"patch size {patch_size} does not fit on the feature map of {height} x {width} cells "
            f"(an image of {STRIDE} px per cell); use larger images or smaller patch_sizes"
        )
    return (height - patch_size) // stride + 1, (width - patch_size) // stride + 1


def flat_sizes(
    image_size: Sequence[int], patch_sizes: Sequence[int], strides: Sequence[int]
) -> list[int]:
    """Return the patch sizes that leave one row or column of patches on an image of (H, W) px.

    Their key points lie on a line, so that no homography can be found between two images.

    Examples
    --------
    >>> flat_sizes((128, 640), patch_sizes=(2, 5, 8), strides=(1, 1, 1))
    [8]
    """
    cells = [side // STRIDE for side in image_size]
    pairs = zip(patch_sizes, strides, strict=True)
    return [size for size, stride in pairs if min(grid_shape(cells, size, stride)) == 1]


def count_patches(
    map_shape: Sequence[int], patch_sizes: Sequence[int], strides: Sequence[int]
) -> list[int]:
    """Count the patches of every size on a feature map of (h, w) cells; see :func:`grid_shape`.

    Examples
    --------
    >>> count_patches((30, 40), patch_sizes=(2, 5, 8), strides=(1, 1, 1))
    [1131, 936, 759]
    """
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
        (column, row) in the grid.
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

        Parameters
        ----------
        map_shape : (int, int)
            (h, w) in cells.
        patch_size, stride : int
            In cells.

        Returns
        -------
        PatchGrid

        Raises
        ------
        ConfigError
            No patch fits.

        Examples
        --------
        >>> grid = PatchGrid.of_map((30, 40), patch_size=5, stride=1)
        >>> len(grid)
        936
        >>> grid.keypoints[:2].tolist(), grid.indices[:2].tolist()
        ([[39, 39], [55, 39]], [[0, 0], [1, 0]])
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
    """Return the grid of every patch size on an image of (height, width) px.

    Parameters
    ----------
    image_size : (int, int)
        (height, width) in px.
    patch_sizes, strides : sequence of int
        In cells of the feature map, one pair per size.

    Returns
    -------
    list of PatchGrid
        One per patch size.

    Raises
    ------
    ConfigError
        No patch of some size fits.

    Examples
    --------
    >>> [len(grid) for grid in patch_grids((480, 640), patch_sizes=(2, 5, 8), strides=(1, 1, 1))]
    [1131, 936, 759]
    """
    map_shape = feature_map_shape(image_size)
    return [
        PatchGrid.of_map(map_shape, size, stride)
        for size, stride in zip(patch_sizes, strides, strict=True)
    ]
