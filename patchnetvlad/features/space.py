# SPDX-License-Identifier: MIT
"""Estimating the disk space that features need, and checking that it is free."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from patchnetvlad.base.files import check_free, free_bytes
from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.base.text import format_bytes
from patchnetvlad.config import Config
from patchnetvlad.datasets.images import native_size
from patchnetvlad.errors import FeatureError, ImageError
from patchnetvlad.features.store.codec import record_bytes
from patchnetvlad.models.grid import count_patches, feature_map_shape

logger = logging.getLogger(__name__)

_SAMPLE = 200  # images whose sizes are looked up for an estimate


def check_space(
    output: Path | RemoteFolder,
    config: Config,
    paths: Sequence[Path | str],
    freed: int,
    *,
    dimension: int,
    map_channels: int,
) -> float:
    """Log how much disk space features will take; FeatureError if too little is free.

    Parameters
    ----------
    output : Path or RemoteFolder
        Object storage is assumed to have room.
    config : Config
    paths : sequence of Path or str
        The images.
    freed : int
        Bytes that replacing existing features will free.
    dimension : int
        P.
    map_channels : int
        D.

    Returns
    -------
    float
        Bytes per image; 0 if unknown.
    """
    sizes = [config.image_size]
    if config.image_size == (0, 0):
        sizes = []
        for path in paths[:: max(1, len(paths) // _SAMPLE)]:
            try:
                sizes.append(native_size(path))
            except ImageError:
                continue  # reported when it is extracted
    shapes = [
        feature_map_shape(size, config.geometry)
        for size in sizes
        if min(size) >= config.min_image_side
    ]
    if not shapes:
        return 0.0

    def total(kind: str) -> float:
        each = [
            record_bytes(
                kind,
                dimension,
                count_patches(shape, config.patch_sizes, config.strides)
                if config.uses_patches
                else [],
                map_channels * shape[0] * shape[1],
            )
            for shape in shapes
        ]
        return sum(each) / len(each) * len(paths)

    kind = config.local_features if config.uses_patches else "npy"
    need = total(kind)
    local = output if isinstance(output, Path) else None
    logger.info(
        "features of %d images will take %s (%s per image, %s)%s in %s",
        len(paths),
        format_bytes(need),
        format_bytes(need / len(paths)),
        kind if config.uses_patches else "float32",
        f"; {format_bytes(free_bytes(local) + freed)} are free" if local else "",
        output,
    )
    if local is not None:
        smaller = [
            f"{other} ({format_bytes(total(other))})"
            for other in ("float16", "int8", "map")
            if config.uses_patches and total(other) < need
        ]
        hint = f"local_features = {' or '.join(smaller)}, or " if smaller else ""
        way_out = f"use {hint}another --output_features_dir"
        check_free("the features need", need, local, way_out, FeatureError, freed)
    return need / len(paths)
