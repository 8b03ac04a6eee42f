# SPDX-License-Identifier: MIT
"""A model that describes images: the first half of what a notebook needs."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from patchnetvlad.assets.checkpoints import resolve_checkpoint
from patchnetvlad.base.device import choose_device, choose_precision, count_cpus, describe_device
from patchnetvlad.base.files import file_sha256
from patchnetvlad.base.names import is_remote
from patchnetvlad.config import Config
from patchnetvlad.datasets.images import check_side, input_transform, load_image
from patchnetvlad.errors import ConfigError, ImageError
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.models.describer import Describer
from patchnetvlad.models.grid import PatchGrid, patch_grids
from patchnetvlad.places.description import Description, Encoded
from patchnetvlad.places.inputs import ImageLike, Images, is_one, take_image

logger = logging.getLogger(__name__)
_Ready = tuple[str, NDArray[np.uint8], int, int]  # name, pixels [H, W, 3], row, time stamp


class PlaceModel:
    """Describes images: global descriptors to retrieve with, patches to re-rank with.

    Made by :func:`load_model`. Its methods may be called from several threads; they take turns.

    Parameters
    ----------
    config : Config
    device : str or torch.device, default "auto"

    Attributes
    ----------
    config : Config
    device : torch.device
    precision : {"exact", "fast", "half"}
        See ``Config.precision``.
    checkpoint : str
        SHA-256 of the file of the weights.
    """

    # Of the process: PyTorch's number of threads, which work on patches sets, is, too.
    turn = threading.RLock()
    """Held by whoever computes."""

    def __init__(self, config: Config, device: str | torch.device = "auto") -> None:
        self.config = config
        self.device = choose_device(device)
        self.precision = choose_precision(config.precision, self.device)
        path = resolve_checkpoint(config.resume_path, config.num_pcs)
        self.describer = Describer.load(config, self.device)
        self.checkpoint = file_sha256(path)
        logger.info("computing on %s", describe_device(self.device))

    def __repr__(self) -> str:
        return f"PlaceModel({self.config.source!r}, {self.device}, P={self.dimension})"

    @property
    def dimension(self) -> int:
        """P: length of the descriptors, of images and of patches."""
        return self.describer.dimension

    def manifest(self, names: Sequence[str], local_features: str) -> Manifest:
        """Say what features of this model are made from, for a list of names."""
        config = replace(self.config, local_features=local_features)
        return Manifest.of(config, names, self.checkpoint, precision=self.precision)

    @overload  # a str is an iterable of str
    def describe(  # type: ignore[overload-overlap]
        self, images: str | os.PathLike[str] | Image.Image, *, progress: bool = ...
    ) -> Description: ...

    @overload
    def describe(self, images: NDArray[np.uint8] | Tensor, *, progress: bool = ...) -> Any: ...

    @overload
    def describe(
        self, images: Iterable[ImageLike], *, progress: bool = ...
    ) -> list[Description]: ...

    def describe(self, images: ImageLike | Images, *, progress: bool = False) -> Any:
        """Describe an image, or several.

        Parameters
        ----------
        images : path, PIL image, array or tensor, or several of them
            One image is a path; an image of Pillow; an array [H, W, 3] (or grey, [H, W]) of
            uint8, RGB; or a tensor [3, H, W], of uint8 or of floats from 0 to 1, which has not
            been normalised. Several are any iterable of these, an array [N, H, W, 3] or a tensor
            [N, 3, H, W]. Sizes may differ: images are resized as the configuration says.
        progress : bool, default False
            Show a progress bar on stderr.

        Returns
        -------
        Description or list of Description
            One for one image, a list for several.

        Raises
        ------
        ImageError
            An image cannot be read, or is too small.
        DeviceError
            The device's memory does not suffice.

        Examples
        --------
        >>> from patchnetvlad import load_model
        >>> from patchnetvlad.assets.data_files import demo_images
        >>> model = load_model("demo", device="cpu")
        >>> described = model.describe(demo_images()["tokyo_db"])
        >>> described.descriptor.shape, [len(patches) for patches in described.patches]
        ((128,), [1131, 936, 759])
        """
        several: Any = [images] if is_one(images) else images
        described = list(self.describe_each(several, progress=progress))
        return described[0] if is_one(images) else described

    def describe_each(self, images: Images, *, progress: bool = False) -> Iterator[Description]:
        """Describe images one after the other, for more than fit into memory.

        Parameters and errors are those of :meth:`describe`.

        Yields
        ------
        Description
            In the order of the images.
        """
        for encoded in self.encode(images, progress=progress):
            yield self.described(encoded, self.patches(encoded.feature_map))

    def encode(
        self, images: Images, *, progress: bool = False, broken: list[str] | None = None
    ) -> Iterator[Encoded]:
        """Compute feature maps and global descriptors, the first half of describing.

        Parameters
        ----------
        images : several images
            As for :meth:`describe`.
        progress : bool, default False
        broken : list of str, optional
            Gets what is wrong with images that cannot be read; these are left out. Without it,
            the first is raised as an ImageError.

        Yields
        ------
        Encoded
            In the order of the images.
        """
        if isinstance(images, (str, bytes)) or not isinstance(images, Iterable):
            raise ImageError(
                f"{type(images).__name__} cannot be described; give a path, an image of Pillow, an "
                "array [H, W, 3] of uint8, a tensor [3, H, W], or several of them"
            )
        total = len(images) if isinstance(images, Sized) else None
        upcoming = enumerate(images)
        batch = self.config.cache_batch_size if self.device.type != "cpu" else count_cpus()
        with (
            ThreadPoolExecutor(min(8, count_cpus()), "decode") as pool,
            tqdm(
                total=total, desc="Describing", unit="image", disable=not progress, leave=False
            ) as bar,
        ):

            def submit() -> list[Future[_Ready]]:
                # Files are decoded in the pool; what the caller may use again is copied here.
                return [
                    pool.submit(self._prepare, i, take_image(image, f"image {i}"))
                    for i, image in islice(upcoming, batch)
                ]

            waiting = submit()
            while waiting:
                ready: list[_Ready] = []
                for future in waiting:
                    try:
                        ready.append(future.result())
                    except ImageError as error:
                        if broken is None:
                            raise
                        broken.append(str(error))
                bar.update(len(waiting))
                # Decoded while these are encoded.
                waiting = submit()
                yield from self._encode_batch(ready)

    def patches(self, feature_map: Tensor) -> list[Tensor]:
        """Compute the patch descriptors [n_s, P] of a feature map [D, h, w], one per patch size."""
        with self.turn:
            return self.describer.patches(feature_map)

    def described(self, encoded: Encoded, patches: Sequence[Tensor]) -> Description:
        """Make a description of an image's two halves; the second, its patches, may be empty."""
        return Description(
            encoded.descriptor,
            tuple(p.cpu().numpy() for p in patches),
            self.grids(encoded.image.shape[:2]) if patches else (),
            encoded.image,
            self.config,
            encoded.name,
            self.checkpoint,
        )

    def grids(self, size: tuple[int, int]) -> tuple[PatchGrid, ...]:
        """Return the grids of the patches on an image of (H, W) px, one per patch size."""
        return _grids(size, self.config) if self.config.uses_patches else ()

    def _encode_batch(self, ready: Sequence[_Ready]) -> Iterator[Encoded]:
        transform = input_transform((0, 0))  # they are resized already
        start = 0
        while start < len(ready):
            shape = ready[start][1].shape
            end = start + 1
            while end < len(ready) and ready[end][1].shape == shape:
                end += 1
            part = ready[start:end]
            start = end
            with self.turn:
                maps = self.describer.encode(torch.stack([transform(x) for _, x, *_ in part]))
                descriptors = self.describer.global_descriptors(maps).cpu().numpy()
            for (name, image, *rest), *described in zip(part, maps, descriptors, strict=True):
                yield Encoded(name, image, *described, *rest)

    def _prepare(self, i: int, image: str | Image.Image | ImageError) -> _Ready:
        name, modified = "", 0
        if isinstance(image, ImageError):
            raise image
        decoded = image
        if isinstance(decoded, str):
            name = decoded
            decoded = load_image(name, self.config.image_size)
            modified = 0 if is_remote(name) else Path(name).stat().st_mtime_ns
        height, width = self.config.image_size
        if height and width:
            decoded = decoded.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.array(decoded)
        check_side(name or str(i), pixels.shape[:2], self.config.min_image_side)
        return name, pixels, i, modified


def load_model(
    config: Config | str | Path = "performance",
    weights: str | Path | None = None,
    device: str | torch.device = "auto",
) -> PlaceModel:
    """Load a model that describes images.

    Parameters
    ----------
    config : Config or str or Path, default "performance"
        A configuration, an INI file, or the name of a shipped configuration: ``performance``,
        ``speed``, ``storage``, ``netvlad_extract``, or ``demo``, whose weights come with the
        package.
    weights : str or Path, optional
        A checkpoint, in place of the configuration's ``resumePath``. A released one that is not
        on this machine is downloaded.
    device : str or torch.device, default "auto"
        ``auto`` (CUDA, else Apple's MPS, else the CPU), ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Returns
    -------
    PlaceModel

    Raises
    ------
    ConfigError, DeviceError
    AssetError
        The checkpoint is nowhere to be found.
    CheckpointError
        It does not fit the configuration.

    Examples
    --------
    >>> from patchnetvlad import load_model
    >>> load_model("demo", device="cpu").dimension
    128
    """
    for what, given in (("config", config), ("weights", weights)):
        if not isinstance(given, (Config, str, os.PathLike, type(None))):
            raise ConfigError(f"{what} = {given!r} is neither a name nor a path")
    if config is None:
        raise ConfigError("config = None; give the name of a configuration, such as demo")
    if not isinstance(config, Config):
        config = Config.load(config)
    if weights is not None:
        config = replace(config, resume_path=os.fspath(weights))
    return PlaceModel(config, device)


@functools.lru_cache(maxsize=4096)
def _grids(size: tuple[int, int], config: Config) -> tuple[PatchGrid, ...]:
    return tuple(patch_grids(size, config.patch_sizes, config.strides))
