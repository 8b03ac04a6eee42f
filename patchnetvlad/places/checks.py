# SPDX-License-Identifier: MIT
"""Checks of what an index of places is given."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from patchnetvlad.errors import ArgumentError, FeatureError, ImageError
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.places.folder import check_on_disk
from patchnetvlad.places.model import PlaceModel


def check_types(model: object, path: object) -> None:
    """Raise ArgumentError unless a model and a path were given, in this order."""
    if isinstance(path, PlaceModel):
        raise ArgumentError(
            "the arguments are in the other order: PlaceIndex(model, path), and "
            "PlaceIndex.load(path, model)"
        )
    if not isinstance(model, PlaceModel):
        raise ArgumentError(
            f"{model!r} is no model; give what load_model returns, such as load_model('demo')"
        )
    if not isinstance(path, (str, os.PathLike, type(None))):
        raise ArgumentError(f"path = {path!r} is no path")
    check_on_disk(path)


def hold_images(images: Any) -> list[Any]:
    """Hold several images; copies, where an iterator may use one buffer for all."""
    if isinstance(images, str) or not isinstance(images, Iterable):
        raise ImageError(
            f"{type(images).__name__} cannot be added; give images, as for model.describe, or what "
            "it returned"
        )
    if isinstance(images, (Sequence, np.ndarray, Tensor)):
        return list(images)
    return [x.copy() if isinstance(x, (np.ndarray, Image.Image)) else _cloned(x) for x in images]


def _cloned(image: Any) -> Any:
    return image.clone() if isinstance(image, Tensor) else image


@contextlib.contextmanager
def hint_at_root(root: str | Path) -> Iterator[None]:
    """Add a hint at ``dataset_root`` to errors of images that are not found."""
    try:
        yield
    except ImageError as error:
        hint = "" if root else "; does it lie below a folder? Give that to load as dataset_root"
        raise ImageError(f"{error}{hint}") from None


def check_model(folder: Path, have: Manifest, model: PlaceModel) -> None:
    """Raise FeatureError unless features can be compared with those of a model."""
    ours = model.manifest([], have.local_features)
    different = [
        f"{name} is {_short(getattr(have, name))}, not {_short(getattr(ours, name))}"
        for name in ("checkpoint", "pooling", "num_pcs", "image_size", "patch_vlad")
        if getattr(have, name) != getattr(ours, name)
    ]
    made = list(zip(have.patch_sizes, have.strides, strict=True))
    for size, stride in zip(ours.patch_sizes, ours.strides, strict=True):
        if (size, stride) not in made:
            different.append(f"there are no patches of size {size} and stride {stride}")
    if different:
        raise FeatureError(
            f"{folder} was made with another model or configuration than "
            f"{model.config.source}: {'; '.join(different)}"
        )


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) else value


def path_of(image: object) -> str:
    """Return the path of an image that was given by it, else an empty text."""
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else ""
