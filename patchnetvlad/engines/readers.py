# SPDX-License-Identifier: MIT
"""Functions that read, or compute, the patches of stored features, and their grids."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from patchnetvlad.base.device import choose_precision
from patchnetvlad.config import Config
from patchnetvlad.datasets.images import native_size
from patchnetvlad.engines.engine import GridReader, PatchReader, Reader
from patchnetvlad.features.manifest import check_checkpoint
from patchnetvlad.features.npy_files import NpyReader
from patchnetvlad.features.store.reader import StoreReader
from patchnetvlad.models.describer import Describer
from patchnetvlad.models.grid import PatchGrid, patch_grids


def grid_reader(
    config: Config, paths: Sequence[Path | str] | Mapping[int, Path | str]
) -> GridReader:
    """Give the patch grids of each image: the same for all, unless sizes are native.

    Parameters
    ----------
    config : Config
    paths : sequence or mapping of int to Path or str
        The images; read only where sizes are native.

    Returns
    -------
    callable
    """
    if config.match_image_size != (0, 0):
        grids = patch_grids(config.match_image_size, config.patch_sizes, config.strides)
        return lambda i: grids

    @functools.lru_cache(maxsize=4096)
    def read(i: int) -> Sequence[PatchGrid]:
        return patch_grids(native_size(paths[i]), config.patch_sizes, config.strides)

    return read


def holds_maps(reader: Reader) -> bool:
    """Return True if patches have to be computed from feature maps."""
    return reader.manifest is not None and reader.manifest.local_features == "map"


def patch_readers(
    config: Config,
    readers: Sequence[Reader],
    device: torch.device,
    load: Callable[[], Describer] | None = None,
) -> list[PatchReader]:
    """Give patch descriptors on a device, read or computed from feature maps.

    Parameters
    ----------
    config : Config
    readers : sequence of StoreReader or NpyReader
    device : torch.device
    load : callable, optional
        Gives the model, which is loaded only for feature maps; by default that of ``config``,
        after a look at whether the maps are its.

    Returns
    -------
    list of callable
        One a reader.

    Raises
    ------
    FeatureError
        Feature maps are of another checkpoint.
    """
    precision = choose_precision(config.precision, device)
    describer = None

    def reads(reader: Reader) -> PatchReader:
        return lambda i: [as_matched(p, precision) for p in reader.patches(i, device)]

    def computes(reader: StoreReader, describer: Describer) -> PatchReader:
        def patches(i: int) -> list[Tensor]:
            described = describer.patches(reader.feature_map(i, device))
            return [as_matched(p, precision) for p in described]

        return patches

    found: list[PatchReader] = []
    for reader in readers:
        if isinstance(reader, NpyReader) or not holds_maps(reader):
            found.append(reads(reader))
            continue
        if describer is None:
            if load is None:
                check_checkpoint(reader.directory, reader.manifest, config)
            describer = load() if load is not None else Describer.load(config, device)
        found.append(computes(reader, describer))
    return found


def as_matched(patches: Tensor, precision: str) -> Tensor:
    """Cast descriptors [n, P] to the precision used for matching.

    On a GPU, float16 halves memory and doubles speed; sums are in float32.
    """
    return patches if precision == "exact" or patches.device.type == "cpu" else patches.half()
