# SPDX-License-Identifier: MIT
"""What enters the first trained layer, computed once per image and kept in a feature store."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from patchnetvlad.base.device import choose_precision
from patchnetvlad.base.files import make_folder
from patchnetvlad.base.names import absolute, normal_name
from patchnetvlad.config import Config
from patchnetvlad.engines.local_extract import (
    Decode,
    Decoder,
    extraction_bar,
    stream_features,
)
from patchnetvlad.errors import ConfigError, ImageError
from patchnetvlad.features.manifest import INDEX_FILE, Manifest
from patchnetvlad.features.names import rows_to_do
from patchnetvlad.features.open import open_writer
from patchnetvlad.features.space import check_space
from patchnetvlad.features.store.reader import StoreReader
from patchnetvlad.features.store.writer import StoreWriter
from patchnetvlad.models.describer import Describer
from patchnetvlad.models.model import build_model
from patchnetvlad.training.views import ViewDecoder, seed_of

logger = logging.getLogger(__name__)


class Inputs(Protocol):
    """Gives what a network in training takes: images, or maps of them."""

    def decoder(
        self, paths: Sequence[Path | str], draws: Sequence[int] | None = None, pin: bool = False
    ) -> Decode:
        """Return a function that reads the images in these rows, or their errors.

        Parameters
        ----------
        paths : sequence of Path or str
        draws : sequence of int, optional
            Choose the view of each image; by default all are the plain images.
        pin : bool, default False
            Read into memory that a GPU copies from in the background.

        Returns
        -------
        callable
            Maps a row to a tensor of float32, or to an ImageError. Called from several threads.
        """


class Pixels:
    """Decodes images when they are needed.

    Parameters
    ----------
    config : Config
    augment : bool, default False
        Give views of images where ``draws`` choose them.
    """

    def __init__(self, config: Config, augment: bool = False) -> None:
        self._config, self._augment = config, augment

    def decoder(
        self, paths: Sequence[Path | str], draws: Sequence[int] | None = None, pin: bool = False
    ) -> Decode:
        """Return a decoder; see :class:`Inputs`."""
        if self._augment and draws is not None:
            return ViewDecoder(paths, self._config, draws)
        return Decoder(paths, self._config, pin)


class CachedMaps:
    """Reads maps from a feature store for each view.

    Parameters
    ----------
    stores : sequence of StoreReader
        Of the views, the first of which is the plain image.
    """

    def __init__(self, stores: Sequence[StoreReader]) -> None:
        self._stores = stores
        self._rows = [{name: i for i, name in enumerate(store.names)} for store in stores]

    def has_failed(self, path: Path | str) -> bool:
        """Return True if one of the views of an image could not be computed."""
        return any(_name(path) in store.failed for store in self._stores)

    def decoder(
        self, paths: Sequence[Path | str], draws: Sequence[int] | None = None, pin: bool = False
    ) -> Decode:
        """Return a function that reads maps [D, h, w] of float32; see :class:`Inputs`."""

        def read(i: int) -> Tensor | ImageError:
            view = 0 if draws is None else draws[i] % len(self._stores)
            store, name = self._stores[view], _name(paths[i])
            if name in store.failed:
                return ImageError(store.failed[name])
            found = store.feature_map(self._rows[view][name])
            return found.pin_memory() if pin else found

        return read


def split_encoder(encoder: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """Split an encoder into the layers before the first one that is trained, and the others.

    Parameters
    ----------
    encoder : nn.Module
        A sequence of layers, whose frozen parameters require no gradient.

    Returns
    -------
    frozen, trained : nn.Sequential
        Of the same layers, which they share with ``encoder``.

    Raises
    ------
    ConfigError
        The encoder does not begin with frozen layers.
    """
    layers = list(encoder.children())
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    first = trained.index(True) if True in trained else len(layers)
    if not isinstance(encoder, nn.Sequential) or first == 0:
        raise ConfigError(
            "cachemaps = True, but this encoder does not begin with frozen layers, as VGG16 and "
            "ResNets do, so that there is nothing to compute once; set cachemaps = False"
        )
    return encoder[:first], encoder[first:]


def cache_maps(
    frozen: nn.Sequential,
    paths: Sequence[Path | str],
    config: Config,
    folder: Path,
    *,
    views: int = 1,
    progress: bool = True,
) -> CachedMaps:
    """Compute what frozen layers make of images, at the speed of extraction, where it is missing.

    Each view has a feature store, which later runs with the same weights and image size reuse, also
    for other images; images that have changed since are computed again.

    Parameters
    ----------
    frozen : nn.Sequential
        Maps [N, 3, H, W] to [N, D, h, w].
    paths : sequence of Path or str
        Images.
    config : Config
        Of which ``image_size``, ``cache_batch_size``, ``threads`` and ``memory_mb`` are used.
    folder : Path
        Gets the stores.
    views : int, default 1
        Versions of each image; the first is the plain image.
    progress : bool, default True
        Show progress bars.

    Returns
    -------
    CachedMaps

    Raises
    ------
    ImageError
        No image could be read.
    FeatureError, OutputError
        They cannot be written, or there is too little room.
    """
    config = _for_maps(frozen, config)
    weights = _weights_digest(frozen)
    named = {_name(path): path for path in paths}
    for view, store in enumerate(_stores(frozen, config, folder, views)):
        made_by = f"{weights}{view or ''}"
        manifest = Manifest.of(config, list(named), made_by, precision=config.precision)
        _complete(frozen, named, config, make_folder(store), manifest, view, progress)
    return open_maps(frozen, config, folder, views)


def open_maps(frozen: nn.Sequential, config: Config, folder: Path, views: int = 1) -> CachedMaps:
    """Open what :func:`cache_maps` has computed, which has the parameters and errors."""
    return CachedMaps([StoreReader(store) for store in _stores(frozen, config, folder, views)])


def _stores(frozen: nn.Sequential, config: Config, folder: Path, views: int) -> list[Path]:
    height, width = config.image_size
    exact = "_exact" if _for_maps(frozen, config).precision == "exact" else ""
    below = folder / "maps" / f"{_weights_digest(frozen)[:16]}_{width}x{height}{exact}"
    return [below / f"view{view}" for view in range(views)]


def _for_maps(frozen: nn.Sequential, config: Config) -> Config:
    return replace(
        config,
        pooling="patchnetvlad",  # whose store keeps maps
        local_features="map",
        num_pcs=0,
        patch_sizes=(1,),
        strides=(1,),
        patch_weights=(1.0,),
        # Whose errors are a hundredth of those of rounding to float16, on a CPU.
        precision=choose_precision("fast", next(frozen.parameters()).device),
    )


def _complete(
    frozen: nn.Sequential,
    named: Mapping[str, Path | str],
    config: Config,
    store: Path,
    manifest: Manifest,
    view: int,
    progress: bool,
) -> None:
    """Write the maps of a view that are missing."""
    names, paths = list(named), list(named.values())
    if (store / INDEX_FILE).is_file():
        have = StoreWriter(store, names, manifest, paths)  # looks, and writes nothing
        if have.done.all() and {*names} <= {*StoreReader(store).names}:
            logger.info("the maps of %d images are in %s already", len(names), store)
            return
    with open_writer(store, names, manifest, paths) as writer:
        todo = rows_to_do(names, writer.done)
        model = build_model(frozen, 0, pooling="avg")
        describer = Describer(model, precision=config.precision, memory_mb=config.memory_mb)
        channels = _channels(frozen)
        if todo:
            need = [paths[row] for row in todo]
            check_space(store, config, need, 0, dimension=channels, map_channels=channels)
        writer.start()
        decode: Decode = Decoder(paths, config, describer.device.type == "cuda")
        if view:
            decode = ViewDecoder(paths, config, [seed_of(path, view) for path in paths])
        with extraction_bar(len(names), todo, progress) as bar, torch.no_grad():
            broken = stream_features(writer, [describer], decode, todo, config, bar.update)
        if broken and not writer.done.any():
            raise next(iter(broken.values()))
        writer.finish({normal_name(names[row]): str(error) for row, error in broken.items()})
    if broken:
        logger.warning(
            "%d of %d images cannot be read, and are left out: %s",
            len(broken), len(names), "; ".join(map(str, list(broken.values())[:5])),
        )  # fmt: skip


def _channels(frozen: nn.Sequential) -> int:
    """Return D, of the maps of a small image."""
    weights = next(frozen.parameters())
    with torch.no_grad():
        return int(frozen(weights.new_zeros(1, 3, 32, 32)).shape[1])


def _weights_digest(layers: nn.Module) -> str:
    """Return the SHA-256 of the weights and of the kinds of layers."""
    found = hashlib.sha256(str(layers).encode())
    for key, value in layers.state_dict().items():
        found.update(key.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _name(path: Path | str) -> str:
    return normal_name(absolute(path))
