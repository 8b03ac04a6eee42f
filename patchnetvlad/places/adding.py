# SPDX-License-Identifier: MIT
"""Preparing features of images that are added to an index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.errors import FeatureError, ImageError
from patchnetvlad.features.store.codec import Arrays, encode_map, encode_patches
from patchnetvlad.places.checks import check_description
from patchnetvlad.places.description import Description
from patchnetvlad.places.folder import NewPlace
from patchnetvlad.places.model import PlaceModel
from patchnetvlad.places.rows import Position

_Features = tuple[int, NDArray[np.uint8], NDArray[np.float32], Arrays, int, float]
# Number in the batch, image [H, W, 3], global descriptor [P], arrays to store, time stamp, aspect.


@dataclass(frozen=True, eq=False)
class NewImages:
    """Images, or their descriptions, that are added together.

    Attributes
    ----------
    images : sequence of images or Descriptions
    keys : sequence of str
        One per image.
    positions : sequence of tuple of float, or None
        One per image.
    broken : list of str
        Gets what is wrong with images that cannot be read.
    """

    images: Sequence[Any]
    keys: Sequence[str]
    positions: Sequence[Position]
    broken: list[str] = field(default_factory=list)

    def features(self, model: PlaceModel, kind: str, progress: bool) -> Iterator[NewPlace]:
        """Extract the features of each image, or use those of its description.

        Parameters
        ----------
        model : PlaceModel
        kind : {"float16", "float32", "int8", "map"}
            How patches are stored.
        progress : bool

        Yields
        ------
        NewPlace
            In the order of the images; those that cannot be read are left out.

        Raises
        ------
        FeatureError
            A description is of another model, or cannot be stored so; or a descriptor is not
            finite.
        """
        ready = [isinstance(image, Description) for image in self.images]
        if any(ready) and not all(ready):
            raise FeatureError("add either images or descriptions, not both at once")
        if all(ready) and kind == "map":
            raise FeatureError(
                "descriptions cannot be added to an index that keeps feature maps "
                "(local_features = map); add the images"
            )
        each = (
            self._described(model, kind) if all(ready) else self._extracted(model, kind, progress)
        )
        for i, image, descriptor, arrays, modified, aspect in each:
            if not np.isfinite(descriptor).all():
                raise FeatureError(f"the global descriptor of {self.keys[i]} is not finite")
            yield NewPlace(
                self.keys[i], self.positions[i], image, descriptor, arrays, modified, aspect
            )

    def check_read(self) -> None:
        """Raise ImageError if images could not be read."""
        if self.broken:
            raise ImageError(
                f"{len(self.broken)} of {len(self.images)} images could not be read, all others "
                f"were added: {'; '.join(self.broken[:5])}{'; ...' if self.broken[5:] else ''}"
            )

    def _extracted(self, model: PlaceModel, kind: str, progress: bool) -> Iterator[_Features]:
        for x in model.encode(self.images, progress=progress, broken=self.broken):
            arrays = (
                encode_map(x.feature_map)
                if kind == "map"
                else encode_patches(model.patches(x.feature_map), kind)
            )
            yield x.row, x.image, x.descriptor, arrays, x.modified, x.aspect

    def _described(self, model: PlaceModel, kind: str) -> Iterator[_Features]:
        for i, x in enumerate(self.images):
            check_description(x, model, model.config.uses_patches)
            arrays = encode_patches(patch_tensors(x), kind)
            yield i, x.image, x.descriptor, arrays, 0, x.aspect


def patch_tensors(described: Description) -> list[Tensor]:
    """Return the patches [n_s, P] of a description as tensors, one per patch size."""
    return [torch.from_numpy(patches) for patches in described.patches]
