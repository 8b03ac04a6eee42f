# SPDX-License-Identifier: MIT
"""Views of images: crops and colours by chance, by which training sees an image anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from patchnetvlad.base.names import url_of
from patchnetvlad.config import Config
from patchnetvlad.datasets.images import check_side, input_transform, load_image
from patchnetvlad.errors import ImageError

LEAST_AREA = 0.6
"""Share of an image that a view shows at least."""

MOST_STRETCHED = 1.2
"""Ratio of the aspects of a view and of its image, at most."""

COLOURS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
"""By what share of theirs these differ between a view and its image, at most."""

MOST_HUE = 0.05
"""How far hues differ, at most, as a share of the circle."""


def view_of(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Crop an image, stretch it a little, and change its colours, by torchvision.

    It is not mirrored: a place is not.

    Parameters
    ----------
    image : PIL.Image.Image
        RGB.
    random : numpy.random.Generator

    Returns
    -------
    PIL.Image.Image
        Of the same size.
    """
    from torchvision.transforms.v2 import functional

    size = [image.height, image.width]
    area, stretch = random.uniform(LEAST_AREA, 1), random.uniform(-1, 1)
    stretched = MOST_STRETCHED ** (stretch / 2)
    height = max(1, min(size[0], round(size[0] * area**0.5 * stretched)))
    width = max(1, min(size[1], round(size[1] * area**0.5 / stretched)))
    top = int(random.integers(size[0] - height + 1))
    left = int(random.integers(size[1] - width + 1))
    view = functional.resized_crop(image, top, left, height, width, size, antialias=True)
    for name in random.permutation(list(COLOURS)):
        change = getattr(functional, f"adjust_{name}")
        view = change(view, float(random.uniform(1 - COLOURS[name], 1 + COLOURS[name])))
    changed: Image.Image = functional.adjust_hue(view, float(random.uniform(-MOST_HUE, MOST_HUE)))
    return changed


class ViewDecoder:
    """Decodes images to normalised tensors [3, H, W] of views of them.

    Parameters
    ----------
    paths : sequence or mapping of int to Path or str
        Files or URLs.
    config : Config
        Of which ``image_size`` is used.
    seeds : sequence or mapping of int to int
        Of the view of each image.
    """

    def __init__(
        self,
        paths: Sequence[Path | str] | Mapping[int, Path | str],
        config: Config,
        seeds: Sequence[int] | Mapping[int, int],
    ) -> None:
        self.paths, self.seeds = paths, seeds
        self.size, self.min_side = config.image_size, config.min_image_side
        self.transform = input_transform(self.size)

    def __call__(self, i: int) -> Tensor | ImageError:
        """Decode image ``i`` to a view [3, H, W]; return, not raise, the error of a broken one."""
        try:
            image = load_image(self.paths[i], self.size)
            random = np.random.default_rng(self.seeds[i])
            tensor: Tensor = self.transform(view_of(image, random))
            check_side(self.paths[i], (tensor.shape[1], tensor.shape[2]), self.min_side)
            return tensor
        except ImageError as error:
            return error


def seed_of(path: Path | str, view: int) -> int:
    """Return the seed of a numbered view of an image, by the name of its file."""
    import zlib

    name = url_of(path).rpartition("/")[2] if isinstance(path, str) else path.name
    return zlib.crc32(f"{view} {name}".encode())
