# SPDX-License-Identifier: MIT
"""Accepted image inputs: files, arrays, tensors, Pillow images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from patchnetvlad.datasets.images import to_rgb
from patchnetvlad.errors import ImageError

ImageLike = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor
Images = Iterable[ImageLike] | NDArray[np.uint8] | Tensor

_ONE = (str, os.PathLike, Image.Image)


def is_one(images: object) -> bool:
    """Tell one image from several."""
    if isinstance(images, (np.ndarray, Tensor)):
        return images.ndim < 4
    return isinstance(images, _ONE)


def check_images(images: object, done: str) -> None:
    """Raise ImageError for what is not several images; ``done`` says what was to be done."""
    no_images = (str, bytes, bytearray, memoryview, Mapping)
    if hasattr(images, "read"):
        raise ImageError(
            f"an open file ({type(images).__name__}) cannot be {done}; give its path, or what "
            "PIL.Image.open makes of it"
        )
    if isinstance(images, no_images) or not isinstance(images, Iterable):
        raise ImageError(
            f"{type(images).__name__} cannot be {done}; give a path, an image of Pillow, an "
            "array [H, W, 3] of uint8, a tensor [3, H, W], or several of them"
        )


def take_image(image: object, what: str) -> str | Image.Image | ImageError:
    """Return a path, or a copy of an image, or what is wrong with it."""
    if isinstance(image, (str, os.PathLike)):
        return os.fsdecode(image)
    try:
        return _decoded(image, what)
    except ImageError as error:
        return error


def _decoded(image: object, what: str) -> Image.Image:
    """Make an RGB image of Pillow of anything that stands for an image; ImageError if it can't."""
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ImageError(f"{what} is empty: its size is {image.width} x {image.height} px")
        try:
            return to_rgb(image).copy()
        except Exception as error:  # Pillow's decoders raise whatever they trip over.
            raise ImageError(f"{what} is broken: {error or type(error).__name__}") from None
    if isinstance(image, Tensor):
        image = _array(image, what)
    if not isinstance(image, np.ndarray):
        raise ImageError(
            f"{what} is of type {type(image).__name__}; give a path, an image of Pillow, an array "
            "[H, W, 3] of uint8 or a tensor [3, H, W]"
        )
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.dtype != np.uint8 or not (
        image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
    ):
        raise ImageError(
            f"{what} is an array of shape {list(image.shape)} and type {image.dtype}; needed is "
            "[H, W, 3] of uint8, RGB"
        )
    if 0 in image.shape:
        raise ImageError(f"{what} is empty: its shape is {list(image.shape)}")
    return Image.fromarray(np.ascontiguousarray(image)).convert("RGB")


def _array(image: Tensor, what: str) -> NDArray[Any]:
    """Turn a tensor [C, H, W] into an array [H, W, C] of uint8."""
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[0] not in (1, 3, 4)):
        raise ImageError(
            f"{what} is a tensor of shape {list(image.shape)}; needed is [3, H, W], RGB"
        )
    if image.is_meta:
        raise ImageError(f"{what} is a tensor without values")
    values = image.detach().cpu()
    if values.is_floating_point():
        low, high = (float(v) for v in torch.aminmax(values)) if values.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):
            raise ImageError(
                f"{what} is a tensor of floats from {low:.3g} to {high:.3g}; needed are floats "
                "from 0 to 1 that have not been normalised, or uint8"
            )
        values = values.mul(255).round().to(torch.uint8)
    array: NDArray[Any] = values.numpy()
    return array if array.ndim == 2 else array.transpose(1, 2, 0)
