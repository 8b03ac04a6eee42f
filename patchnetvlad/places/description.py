# SPDX-License-Identifier: MIT
"""The features of one image."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from patchnetvlad.config import Config
from patchnetvlad.models.grid import PatchGrid


@dataclass(frozen=True, eq=False)
class Description:
    """Features of one image.

    Attributes
    ----------
    descriptor : ndarray [P] of float32
        Global descriptor, L2-normalised; compare images by Euclidean distance.
    patches : tuple of ndarray [n_s, P] of float32
        Patch descriptors, L2-normalised, one matrix per patch size; empty for models without
        patches.
    grids : tuple of PatchGrid
        Positions of the patches, one grid per patch size: ``grid.keypoints`` [n_s, 2] are their
        centres (x, y) in px of ``image``.
    image : ndarray [H, W, 3] of uint8
        The image as the network saw it, resized.
    config : Config
        Configuration with which features were extracted.
    name : str
        Path of the image; empty for images not read from a file.
    checkpoint : str
        SHA-256 of the weights; empty if unknown.
    aspect : float
        Aspect ratio (width / height) before resizing; 0: that of ``image``.
    """

    descriptor: NDArray[np.float32]
    patches: tuple[NDArray[np.float32], ...]
    grids: tuple[PatchGrid, ...]
    image: NDArray[np.uint8] = field(repr=False)
    config: Config = field(repr=False)
    name: str = ""
    checkpoint: str = ""
    aspect: float = 0.0

    @property
    def picture(self) -> NDArray[np.uint8]:
        """``image`` in its original aspect ratio, for viewing."""
        return reshaped(self.image, self.aspect)

    @property
    def keypoints(self) -> tuple[NDArray[np.int64], ...]:
        """Centres (x, y) of the patches in px of ``image``: [n_s, 2], one matrix per patch size."""
        return tuple(grid.keypoints for grid in self.grids)

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{len(patches)} of size {grid.patch_size}"
            for patches, grid in zip(self.patches, self.grids, strict=True)
        )
        height, width = self.image.shape[:2]
        return (
            f"Description(name={self.name!r}, image={width} x {height} px, "
            f"P={len(self.descriptor)}, patches: {sizes or 'none'})"
        )


@dataclass(frozen=True, eq=False)
class Encoded:
    """An image after encoding: its feature map, from which patches are computed.

    Attributes
    ----------
    name : str
    image : ndarray [H, W, 3] of uint8
    feature_map : Tensor [D, h, w] of float32
        On the model's device.
    descriptor : ndarray [P] of float32
    row : int
        Which of the images it is, from 0.
    modified : int
        Time stamp of the file, ns; 0 for images that were not read from a file.
    aspect : float
        Width over height of the image before it was resized.
    """

    name: str
    image: NDArray[np.uint8]
    feature_map: Tensor
    descriptor: NDArray[np.float32]
    row: int
    modified: int
    aspect: float


def reshaped(image: NDArray[np.uint8], aspect: float) -> NDArray[np.uint8]:
    """Return an image [H, W, 3] in the shape ``aspect`` (width over height), enlarged, not cut.

    An aspect of 0 is that of the image, which is returned as it is.
    """
    height, width = image.shape[:2]
    wide = max(width, round(aspect * height))
    tall = max(height, round(width / aspect)) if aspect else height
    if (wide, tall) == (width, height) or not image.size:
        return image
    return np.asarray(Image.fromarray(image).resize((wide, tall), Image.Resampling.BILINEAR))
