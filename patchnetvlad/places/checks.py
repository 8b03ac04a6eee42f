# SPDX-License-Identifier: MIT
"""Checks of the arguments of a place index."""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from patchnetvlad.base.names import is_remote, normal_name
from patchnetvlad.datasets.image_list import check_names
from patchnetvlad.errors import ArgumentError, FeatureError, ImageError
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.places.description import Description
from patchnetvlad.places.inputs import check_images
from patchnetvlad.places.model import PlaceModel
from patchnetvlad.places.rows import Position, Rows
from patchnetvlad.places.saved import LIST_FILE


def check_types(model: object, path: object) -> None:
    """Raise ArgumentError unless a model and a path were given, in this order."""
    if isinstance(path, PlaceModel):
        raise ArgumentError(
            "the arguments are in the other order: PlaceIndex(model, path), and "
            "PlaceIndex.load(path, model)"
        )
    if not isinstance(model, PlaceModel):
        raise ArgumentError(
            f"{model!r} is not a model; give what load_model returns, such as load_model('demo')"
        )
    check_path(path)


def check_path(path: Any) -> None:
    """Raise an error unless this is a path on a disk, or None."""
    if not isinstance(path, (str, os.PathLike, type(None))):
        raise ArgumentError(f"path = {path!r} is not a path")
    if path is not None and is_remote(path):
        raise FeatureError(f"{path} is a URL: an index of places lies on a disk; copy it there")


def hold_images(images: Any) -> list[Any]:
    """Hold several images in memory, copied if an iterator may reuse one buffer for all."""
    check_images(images, "added")
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
        for name in ("encoder", "checkpoint", "pooling", "num_pcs", "image_size", "patch_vlad")
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


def check_query(
    top_k: object,
    candidates: object,
    threshold: object,
    min_confidence: object = None,
    budget_ms: object = None,
) -> None:
    """Raise ArgumentError for numbers that :meth:`PlaceIndex.query` cannot use."""
    for what, value in (("top_k", top_k), ("candidates", candidates)):
        if not isinstance(value, numbers.Integral) or value < 1:
            raise ArgumentError(f"{what} = {value!r} must be a whole number from 1")
    for what, value in (("threshold", threshold), ("min_confidence", min_confidence)):
        if value is not None and (not isinstance(value, numbers.Real) or math.isnan(value)):
            raise ArgumentError(f"{what} = {value!r} must be a number, or None")
    if budget_ms is not None and not (
        isinstance(budget_ms, numbers.Real) and float(budget_ms) >= 0
    ):
        raise ArgumentError(f"budget_ms = {budget_ms!r} must be a number from 0, or None")


def check_description(described: Description, model: PlaceModel, with_patches: bool) -> None:
    """Raise FeatureError unless a description can be compared with those of a model.

    Parameters
    ----------
    described : Description
    model : PlaceModel
        Of the index.
    with_patches : bool
        Whether its patches are needed, too.
    """
    ours, theirs = model.config, described.config
    for name in ("encoder", "patch_sizes", "strides", "image_size", "pooling", "patch_vlad"):
        if getattr(ours, name) != getattr(theirs, name):
            raise FeatureError(
                f"the description was made with {name} = {getattr(theirs, name)}, the index "
                f"has {getattr(ours, name)}; describe with the index's model"
            )
    if len(described.descriptor) != model.dimension:
        raise FeatureError(
            f"the description has {len(described.descriptor)} dimensions, the index "
            f"{model.dimension}; describe with the index's model"
        )
    if described.checkpoint not in ("", model.checkpoint):
        raise FeatureError(
            f"the description was made with the weights {described.checkpoint[:12]}, the index "
            f"with {model.checkpoint[:12]}; describe with the index's model"
        )
    if not with_patches:
        return
    grids = model.grids(described.image.shape[:2])
    shapes = [(len(grid), model.dimension) for grid in grids]
    if [patches.shape for patches in described.patches] != shapes:
        raise FeatureError(
            "the image was described without patches, as query(rerank=False) does"
            if not described.patches
            else "the patches of the description do not fit its image; describe it again"
        )


def new_keys(images: Sequence[Any], keys: Any, rows: Rows) -> list[str]:
    """Return the keys of images to be added.

    Parameters
    ----------
    images : sequence of images or Descriptions
    keys : str or iterable of str, optional
        As they were given.
    rows : Rows
        Images that are there already.

    Returns
    -------
    list of str
        One per image.

    Raises
    ------
    FeatureError
        A key is not a text, repeats, or is there already; or there are more or fewer than images.
    ImageListError
        A key cannot stand in a list.
    """
    names = _default_keys(images, rows) if keys is None else _given_keys(keys)
    if len(names) != len(images):
        raise FeatureError(f"there are {len(names)} keys for {len(images)} images")
    seen: set[str] = set()
    check_names([key for key in names if isinstance(key, str)], LIST_FILE)
    for key in names:
        if not isinstance(key, str):
            raise FeatureError(f"the key {key!r} is not a text; give a str")
        same, known = normal_name(key), rows.find(key) is not None
        if known or same in seen:
            there = "in the index already" if known else "given twice"
            raise FeatureError(f"the key {key!r} is {there}; each image needs its own (keys=)")
        seen.add(same)
    return names


def _default_keys(images: Sequence[Any], rows: Rows) -> list[str]:
    names = [x.name if isinstance(x, Description) else _path_of(x) for x in images]
    free = (
        name
        for number in itertools.count(len(rows))
        if rows.find(name := f"image-{number:06d}") is None
    )
    return [name or next(free) for name in names]


def _given_keys(keys: Any) -> list[Any]:
    if isinstance(keys, (str, os.PathLike)):
        return [os.fspath(keys)]
    if isinstance(keys, Iterable):
        return [os.fspath(key) if isinstance(key, os.PathLike) else key for key in keys]
    raise FeatureError(f"keys = {keys!r} are not texts")


def new_positions(positions: Any, count: int, dimension: int) -> list[Position]:
    """Return the positions of images to be added.

    Parameters
    ----------
    positions : array-like [count, 2 or 3], optional
        As they were given.
    count : int
        Images.
    dimension : int
        Coordinates of the positions that are there already; 0 while there are none.

    Returns
    -------
    list of tuple of float, or None
        One per image.

    Raises
    ------
    FeatureError
        They are not numbers, or not as many as needed.
    """
    if positions is None:
        return [None] * count
    wanted = (dimension,) if dimension else (2, 3)
    try:
        if not isinstance(positions, np.ndarray):
            rows = [*positions]
            given = (len(row) for row in rows if isinstance(row, Sized))
            unknown = (math.nan,) * next(given, wanted[0])
            positions = [unknown if row is None else row for row in rows]
        values = np.asarray(positions, dtype=np.float64)
    except (TypeError, ValueError):
        raise FeatureError("positions must be numbers, two or three per image") from None
    values = values[None] if values.ndim == 1 and count == 1 else values
    if values.ndim != 2 or len(values) != count or values.shape[1] not in wanted:
        raise FeatureError(
            f"positions have shape {list(values.shape)}; needed is [{count}, "
            f"{' or '.join(map(str, wanted))}]"
        )
    if np.isinf(values).any():
        raise FeatureError("positions must be finite, or NaN where they are not known")
    return [None if np.isnan(row).any() else tuple(row.tolist()) for row in values]


def _path_of(image: object) -> str:
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else ""
