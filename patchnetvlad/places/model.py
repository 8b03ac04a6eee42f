# SPDX-License-Identifier: MIT
"""A model that extracts features of images, for notebooks and robots."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, constants, hf_hub_download
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
from patchnetvlad.errors import (
    AssetError,
    CheckpointError,
    ConfigError,
    ImageError,
    PatchNetVLADError,
)
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.models.checkpoint import load_state, save_safetensors
from patchnetvlad.models.describer import Describer
from patchnetvlad.models.grid import PatchGrid, patch_grids
from patchnetvlad.places.description import Description, Encoded
from patchnetvlad.places.inputs import ImageLike, Images, check_images, is_one, take_image

logger = logging.getLogger(__name__)
# Name, pixels [H, W, 3], row, time stamp, width over height before.
_Ready = tuple[str, NDArray[np.uint8], int, int, float]


_OF_A_MACHINE = ("resume_path", "faiss_index_path", "predictions_path", "source")
_MODEL_CARD = """---
{{ card_data }}
---

# Patch-NetVLAD

Visual place recognition: a NetVLAD descriptor of the whole image to retrieve with, descriptors of
patches to re-rank with ({{ paper_url }}).

```python
from patchnetvlad import PlaceModel, match

model = PlaceModel.from_pretrained("{{ model_id | default("OWNER/NAME", true) }}")
print(match("a.jpg", "b.jpg", model=model))
```

What it was trained on, how it was evaluated, and what it should not be used for: {{
    description | default("not said yet.", true) }}
"""


class PlaceModel(
    ModelHubMixin,
    library_name="patchnetvlad",
    tags=["visual-place-recognition", "image-retrieval", "netvlad"],
    pipeline_tag="image-feature-extraction",
    paper_url="https://arxiv.org/abs/2103.01486",
    model_card_template=_MODEL_CARD,
):
    """Extracts features of images: global descriptors for retrieval, patches for re-ranking.

    Create one with :func:`load_model` or :meth:`from_pretrained`. Its methods may be called from
    several threads, which take turns. A copy, also one unpickled in another process, reads the
    weights from the same file. ``save_pretrained(folder)`` and ``push_to_hub("owner/name")`` are
    methods of ``huggingface_hub.ModelHubMixin``.

    Parameters
    ----------
    config : Config
    device : str or torch.device, default "auto"

    Attributes
    ----------
    config : Config
    device : torch.device
    precision : {"exact", "fast", "half", "int8"}
        See ``Config.precision``.
    checkpoint : str
        SHA-256 of the weights file.
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

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.config, str(self.device), self.checkpoint)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **options: Any
    ) -> PlaceModel:
        """Load a model from the Hugging Face Hub, or from a folder.

        Parameters
        ----------
        pretrained_model_name_or_path : str or Path
            ``owner/name``, or a folder written by ``save_pretrained``.
        **options
            ``device``, as for :func:`load_model`; ``revision``, ``token``, ``cache_dir``,
            ``force_download`` and ``local_files_only``, as for
            ``huggingface_hub.ModelHubMixin.from_pretrained``.

        Returns
        -------
        PlaceModel

        Raises
        ------
        AssetError
            There is no such model, or it cannot be downloaded.
        ConfigError, CheckpointError
            Its ``config.json`` or its weights are not from this package.
        """
        try:
            model: PlaceModel = super().from_pretrained(pretrained_model_name_or_path, **options)
        except (OSError, ValueError, AttributeError) as error:  # the last: JSON, but no mapping
            if isinstance(error, PatchNetVLADError):
                raise
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise AssetError(
                f"there is no model of this package in {pretrained_model_name_or_path}: "
                f"{reason[:200]}; give a folder that save_pretrained wrote, or the owner/name of a "
                "repository on the hub"
            ) from None
        return model

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: Mapping[str, Any] | Config | None = None,
        device: str | torch.device = "auto",
        **of_the_hub: Any,
    ) -> PlaceModel:
        if config is None:
            raise AssetError(f"{model_id} has no {constants.CONFIG_NAME}")
        if not isinstance(config, Config):
            config = Config.from_json(config, source=f"{model_id}/{constants.CONFIG_NAME}")
        file = os.path.join(model_id, constants.SAFETENSORS_SINGLE_FILE)
        if not os.path.isdir(model_id):
            name = constants.SAFETENSORS_SINGLE_FILE
            file = hf_hub_download(repo_id=model_id, filename=name, **of_the_hub)
        return cls(replace(config, resume_path=file), device)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights and ``config.json``; a ``.safetensors`` file is copied as it is."""
        file = _same_checkpoint(self.config, self.checkpoint)
        target = save_directory / constants.SAFETENSORS_SINGLE_FILE
        if file.suffix != target.suffix:
            save_safetensors(load_state(file), target, torch.float32)
        elif not (target.exists() and target.samefile(file)):
            shutil.copyfile(file, target)
        kept = {key: v for key, v in asdict(self.config).items() if key not in _OF_A_MACHINE}
        text = json.dumps(kept, indent=2) + "\n"
        (save_directory / constants.CONFIG_NAME).write_text(text, encoding="utf-8")

    def __repr__(self) -> str:
        return f"PlaceModel({self.config.source!r}, {self.device}, P={self.dimension})"

    @property
    def dimension(self) -> int:
        """Dimension P of global and patch descriptors."""
        return self.describer.dimension

    def manifest(self, names: Sequence[str], local_features: str) -> Manifest:
        """Return the manifest of features of this model, for a list of names."""
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
        """Extract the features of one image or several.

        Parameters
        ----------
        images : path, PIL image, array or tensor, or several of them
            One image is a path, a Pillow image, an RGB array [H, W, 3] (or grey [H, W]) of uint8,
            or a tensor [3, H, W] of uint8 or of floats from 0 to 1, not normalised. Several images
            are an iterable of these, an array [N, H, W, 3] or a tensor [N, 3, H, W]. Sizes may
            differ: images are resized as configured.
        progress : bool, default False
            Show a progress bar on stderr.

        Returns
        -------
        Description or list of Description
            One description for one image, a list for several.

        Raises
        ------
        ImageError
            An image cannot be read, or is too small.
        DeviceError
            The device has too little memory.

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
        """Extract the features of images one by one, if they do not fit into memory together.

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
        """Compute feature maps and global descriptors, the first half of :meth:`describe`.

        Parameters
        ----------
        images : several images
            As for :meth:`describe`.
        progress : bool, default False
        broken : list of str, optional
            Collects the errors of images that cannot be read, which are then left out. Without
            it, the first error is raised as an ImageError.

        Yields
        ------
        Encoded
            In the order of the images.
        """
        check_images(images, "described")
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
        """Combine an encoded image and its patches, which may be empty, into a description."""
        return Description(
            encoded.descriptor,
            tuple(p.cpu().numpy() for p in patches),
            self.grids(encoded.image.shape[:2]) if patches else (),
            encoded.image,
            self.config,
            encoded.name,
            self.checkpoint,
            encoded.aspect,
        )

    def grids(self, size: tuple[int, int]) -> tuple[PatchGrid, ...]:
        """Return the patch grids of an image of (H, W) px, one per patch size."""
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
        aspect = decoded.width / decoded.height
        height, width = self.config.image_size
        if height and width:
            decoded = decoded.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.array(decoded)
        check_side(name or str(i), pixels.shape[:2], self.config.min_image_side)
        return name, pixels, i, modified, aspect


def _in_child() -> None:
    """Let a forked process not wait for threads that it has not got."""
    PlaceModel.turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def load_model(
    config: Config | str | Path = "performance",
    weights: str | Path | None = None,
    device: str | torch.device = "auto",
) -> PlaceModel:
    """Load a model that extracts features of images.

    Parameters
    ----------
    config : Config or str or Path, default "performance"
        A configuration, an INI file, or the name of a built-in configuration: ``performance``,
        ``speed``, ``storage``, ``netvlad_extract``, or ``demo``, whose weights come with the
        package.
    weights : str or Path, optional
        A checkpoint to use instead of ``resumePath`` of the configuration. A released checkpoint
        that is not on this machine is downloaded.
    device : str or torch.device, default "auto"
        ``auto`` (CUDA, otherwise Apple's MPS, otherwise the CPU), ``cpu``, ``cuda``, ``cuda:N`` or
        ``mps``.

    Returns
    -------
    PlaceModel

    Raises
    ------
    ConfigError, DeviceError
    AssetError
        The checkpoint cannot be found.
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


def _same_checkpoint(config: Config, sha256: str) -> Path:
    """Find the file of the weights; CheckpointError if they are no longer the same."""
    file = resolve_checkpoint(config.resume_path, config.num_pcs)
    if file_sha256(file) != sha256:
        raise CheckpointError(f"{file} has changed since the model was loaded; load it again")
    return file


def _restored(config: Config, device: str, sha256: str) -> PlaceModel:
    """Load a model again, for a copy or in another process."""
    return PlaceModel(replace(config, resume_path=str(_same_checkpoint(config, sha256))), device)


@functools.lru_cache(maxsize=4096)
def _grids(size: tuple[int, int], config: Config) -> tuple[PatchGrid, ...]:
    return tuple(patch_grids(size, config.patch_sizes, config.strides, config.geometry))
