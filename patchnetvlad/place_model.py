# SPDX-License-Identifier: MIT
"""A model that describes images: the first half of what a notebook needs."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from patchnetvlad.assets import file_sha256, resolve_checkpoint
from patchnetvlad.config import Config
from patchnetvlad.datasets.transforms import check_side, input_transform, load_image, to_rgb
from patchnetvlad.device import choose_device, choose_precision, count_cpus, describe_device
from patchnetvlad.errors import ConfigError, ImageError
from patchnetvlad.features.describe import Describer
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.geometry import PatchGrid, patch_grids
from patchnetvlad.remote import is_remote

logger = logging.getLogger(__name__)

ImageLike = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor
Images = Iterable[ImageLike] | NDArray[np.uint8] | Tensor

_ONE = (str, os.PathLike, Image.Image)
_Ready = tuple[str, NDArray[np.uint8], int, int]  # name, pixels [H, W, 3], place, time stamp


@dataclass(frozen=True, eq=False)
class Description:
    """What a model says about one image.

    Attributes
    ----------
    descriptor : ndarray [P] of float32
        Global descriptor, L2-normalised; Euclidean distances compare images.
    patches : tuple of ndarray [n_s, P] of float32
        Patch descriptors, L2-normalised, one matrix a patch size; empty for models without.
    grids : tuple of PatchGrid
        Where these patches lie, one a patch size: ``grid.keypoints`` [n_s, 2] are their centres
        (x, y) in px of ``image``.
    image : ndarray [H, W, 3] of uint8
        The image as the network saw it, resized.
    config : Config
        What it was described with.
    name : str
        The image's path; empty for images that were not read from a file.
    checkpoint : str
        SHA-256 of the weights; empty if it is not known.
    """

    descriptor: NDArray[np.float32]
    patches: tuple[NDArray[np.float32], ...]
    grids: tuple[PatchGrid, ...]
    image: NDArray[np.uint8] = field(repr=False)
    config: Config = field(repr=False)
    name: str = ""
    checkpoint: str = ""

    @property
    def keypoints(self) -> tuple[NDArray[np.int64], ...]:
        """Centres (x, y) of the patches in px of ``image``: [n_s, 2], one matrix a patch size."""
        return tuple(grid.keypoints for grid in self.grids)

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{len(patches)} of size {grid.patch_size}"
            for patches, grid in zip(self.patches, self.grids, strict=True)
        )
        height, width = self.image.shape[:2]
        return (
            f"Description(name={self.name!r}, image={width} x {height} px, "
            f"P={len(self.descriptor)}, patches: {sizes or 'none'})"
        )


@dataclass(frozen=True, eq=False)
class Encoded:
    """An image half-way: its feature map, from which its patches are computed.

    Attributes
    ----------
    name : str
    image : ndarray [H, W, 3] of uint8
    feature_map : Tensor [D, h, w] of float32
        On the model's device.
    descriptor : ndarray [P] of float32
    place : int
        Which of the images it is, from 0.
    modified : int
        Time stamp of the file, ns; 0 for images that were not read from a file.
    """

    name: str
    image: NDArray[np.uint8]
    feature_map: Tensor
    descriptor: NDArray[np.float32]
    place: int
    modified: int


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
        >>> from patchnetvlad.assets import demo_images
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
                    pool.submit(self._prepare, i, _taken(image, f"image {i}"))
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
        """Compute the patch descriptors [n_s, P] of a feature map [D, h, w], one a patch size."""
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
        """Return the grids of the patches on an image of (H, W) px, one a patch size."""
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
            decoded = load_image(name)
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


def is_one(images: object) -> bool:
    """Tell one image from several."""
    if isinstance(images, (np.ndarray, Tensor)):
        return images.ndim < 4
    return isinstance(images, _ONE)


def _taken(image: object, what: str) -> str | Image.Image | ImageError:
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
