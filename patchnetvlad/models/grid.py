# SPDX-License-Identifier: MIT
"""Geometry of the network: stride, receptive field, patch grids and their key points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.encoders import DEFAULT, ENCODERS, Geometry
from patchnetvlad.errors import ConfigError

VGG16 = ENCODERS[DEFAULT]

ENCODER_DIM = VGG16.channels
"""Channels D of the feature map of VGG16."""

STRIDE = VGG16.cell
"""Cell size of the feature map of VGG16, in px of the resized image."""

RECEPTIVE_FIELD = VGG16.receptive_field
"""Side of the receptive field of one cell of VGG16, px."""

PADDING = VGG16.padding
"""Accumulated padding before the first receptive field of VGG16, px."""


def feature_map_shape(image_size: Sequence[int], geometry: Geometry = VGG16) -> tuple[int, int]:
    """Return (h, w) of the feature map of an image of (height, width) px.

    Examples
    --------
    >>> feature_map_shape((480, 640))
    (30, 40)
    """
    return geometry.map_shape(image_size)


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
            f"(of {STRIDE} px each; 14 with DINOv2); use larger images or smaller patch_sizes"
        )
    return (height - patch_size) // stride + 1, (width - patch_size) // stride + 1


def flat_sizes(
    image_size: Sequence[int],
    patch_sizes: Sequence[int],
    strides: Sequence[int],
    geometry: Geometry = VGG16,
) -> list[int]:
    """Return the patch sizes that leave one row or column of patches on an image of (H, W) px.

    Their key points lie on a line, so that no homography can be found between two images; the
    parameters are those of :func:`patch_grids`.

    Examples
    --------
    >>> flat_sizes((128, 640), patch_sizes=(2, 5, 8), strides=(1, 1, 1))
    [8]
    """
    cells = geometry.map_shape(image_size)
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
    geometry : Geometry
        Of the encoder.
    """

    patch_size: int
    stride: int
    keypoints: NDArray[np.int64]
    indices: NDArray[np.int64]
    geometry: Geometry = VGG16

    @classmethod
    def of_map(
        cls,
        map_shape: Sequence[int],
        patch_size: int,
        stride: int,
        geometry: Geometry = VGG16,
    ) -> PatchGrid:
        """Lay the grid over a feature map of (h, w) cells.

        The centre of a patch is the middle of the union of its cells' receptive fields,
        truncated to whole px.

        Parameters
        ----------
        map_shape : (int, int)
            (h, w) in cells.
        patch_size, stride : int
            In cells.
        geometry : Geometry
            Of the encoder; VGG16 by default.

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
        keypoints = _centres(indices, patch_size, stride, geometry).astype(np.int64)
        return cls(patch_size, stride, keypoints, indices, geometry)

    @property
    def centres(self) -> NDArray[np.floating]:
        """Centres [n, 2] in px, of which ``keypoints`` are the whole px."""
        return _centres(self.indices, self.patch_size, self.stride, self.geometry)

    @property
    def step(self) -> int:
        """Distance between neighbouring patches, px."""
        return self.stride * self.geometry.cell

    def __len__(self) -> int:
        return len(self.indices)


def _centres(
    indices: NDArray[np.int64], patch_size: int, stride: int, geometry: Geometry
) -> NDArray[np.floating]:
    # A cell of VGG16 sees px from 16 c - 90 to 16 c - 90 + 195 along each axis.
    offset = geometry.centre + geometry.cell * (patch_size - 1) / 2
    return geometry.cell * stride * indices + offset


def patch_grids(
    image_size: Sequence[int],
    patch_sizes: Sequence[int],
    strides: Sequence[int],
    geometry: Geometry = VGG16,
) -> list[PatchGrid]:
    """Return the grid of every patch size on an image of (height, width) px.

    Parameters
    ----------
    image_size : (int, int)
        (height, width) in px.
    patch_sizes, strides : sequence of int
        In cells of the feature map, one pair per size.
    geometry : Geometry
        Of the encoder; VGG16 by default.

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
    map_shape = geometry.map_shape(image_size)
    return [
        PatchGrid.of_map(map_shape, size, stride, geometry)
        for size, stride in zip(patch_sizes, strides, strict=True)
    ]
