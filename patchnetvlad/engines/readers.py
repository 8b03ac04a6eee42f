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
from patchnetvlad.engines.engine import GridReader, PatchReader
from patchnetvlad.features.from_maps import MapReader
from patchnetvlad.features.interface import Reader
from patchnetvlad.features.manifest import check_checkpoint
from patchnetvlad.models.describer import Describer
from patchnetvlad.models.grid import PatchGrid, patch_grids


def grid_reader(
    config: Config, paths: Sequence[Path | str] | Mapping[int, Path | str]
) -> GridReader:
    """Return the patch grids of each image: the same for all, unless sizes are native.

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
        grids = patch_grids(
            config.match_image_size, config.patch_sizes, config.strides, config.geometry
        )
        return lambda i: grids

    @functools.lru_cache(maxsize=4096)
    def read(i: int) -> Sequence[PatchGrid]:
        return patch_grids(
            native_size(paths[i]), config.patch_sizes, config.strides, config.geometry
        )

    return read


def patch_readers(
    config: Config,
    readers: Sequence[Reader],
    device: torch.device,
    load: Callable[[], Describer] | None = None,
) -> list[PatchReader]:
    """Return patch descriptors on a device, read or computed from feature maps.

    Parameters
    ----------
    config : Config
    readers : sequence of Reader
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
    maps = [reader for reader in readers if reader.kind == "map"]
    if maps:
        if load is None:
            check_checkpoint(maps[0].directory, maps[0].manifest, config)
        describer = load() if load is not None else Describer.load(config, device)
        readers = [MapReader(r, config, lambda: describer) if r in maps else r for r in readers]

    def reads(reader: Reader) -> PatchReader:
        return lambda i: [as_matched(p, precision) for p in reader.patches(i, device)]

    return [reads(reader) for reader in readers]


def as_matched(patches: Tensor, precision: str) -> Tensor:
    """Cast descriptors [n, P] to the precision used for matching.

    On a GPU, float16 halves memory and doubles speed; sums are in float32.
    """
    return patches if precision == "exact" or patches.device.type == "cpu" else patches.half()
