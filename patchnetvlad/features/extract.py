# SPDX-License-Identifier: MIT
"""Extraction: from images to global and patch descriptors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from patchnetvlad.assets import file_sha256, resolve_checkpoint
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.datasets.transforms import check_side, input_transform, load_image
from patchnetvlad.device import choose_device, describe_device
from patchnetvlad.errors import ImageError, make_folder
from patchnetvlad.features.store import FeatureWriter, Manifest, check_unique
from patchnetvlad.geometry import patch_grids
from patchnetvlad.models.checkpoint import load_model
from patchnetvlad.models.model import get_pca_encoding
from patchnetvlad.models.netvlad import NetVLAD
from patchnetvlad.models.patchnetvlad import PatchNetVLAD

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Descriptors:
    """What the network says about one image.

    Attributes
    ----------
    descriptor : Tensor [P]
        Global descriptor, L2-normalised.
    patches : list of Tensor [n_s, P]
        Patch descriptors, L2-normalised, one matrix a patch size, patches row-major.
    """

    descriptor: Tensor
    patches: list[Tensor]


@torch.inference_mode()
def describe(model: nn.Module, images: Tensor) -> list[Descriptors]:
    """Describe a batch of images.

    Parameters
    ----------
    model : nn.Module
        With the children ``encoder``, ``pool`` and, optionally, ``WPCA``.
    images : Tensor [N, 3, H, W] of float32
        Normalised, on the model's device.

    Returns
    -------
    list of Descriptors, length N
        On the model's device. P is K * D where the model has no PCA layer.
    """

    def whiten(vlad: Tensor) -> Tensor:
        return get_pca_encoding(model, vlad) if hasattr(model, "WPCA") else vlad

    encoder: Any = model.encoder
    pool: Any = model.pool
    features = encoder(images)
    if not isinstance(pool, NetVLAD):
        return [Descriptors(descriptor, []) for descriptor in whiten(pool(features))]
    x, assignment = pool.assign(features)
    descriptors = whiten(pool.vlad(x.flatten(2), assignment.flatten(2)))  # [N, P]
    patches: list[list[Tensor]] = [[] for _ in range(len(x))]
    if isinstance(pool, PatchNetVLAD):
        for i in range(len(x)):
            chunks = pool.patches(x[i], assignment[i])
            for size, stride in zip(pool.patch_sizes, pool.strides, strict=True):
                whitened = [whiten(chunk) for chunk in chunks(size, stride)]
                patches[i].append(torch.cat(whitened))  # [n_s, P]
    return [Descriptors(d, p) for d, p in zip(descriptors, patches, strict=True)]


class ImageDataset(Dataset[Any]):
    """Images as normalised tensors, for a ``DataLoader``.

    An image that cannot be decoded comes as its :class:`ImageError`, so that one broken file
    does not end the run.

    Parameters
    ----------
    images : ImageList
    root : str or Path
        Folder that relative names lie under.
    config : Config
        Its ``image_size`` is what images are resized to; (0, 0) keeps the native size, which
        must then be large enough for its patches.
    indices : sequence of int
        The entries of the list to load.
    """

    def __init__(
        self,
        images: ImageList,
        root: str | Path,
        config: Config,
        indices: Sequence[int],
    ) -> None:
        self.paths = images.image_paths(root)
        self.indices = list(indices)
        self.transform = input_transform(config.image_size)
        self.min_side = config.min_image_side

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, n: int) -> tuple[int, Tensor | ImageError]:
        """Return (place in the list, tensor [3, H, W] or the error)."""
        i = self.indices[n]
        try:
            image = self.transform(load_image(self.paths[i]))
            check_side(self.paths[i], (image.shape[1], image.shape[2]), self.min_side)
            return i, image
        except ImageError as error:
            return i, error


def extract_features(
    config: Config | str | Path,
    image_list: str | Path,
    dataset_root: str | Path = "",
    output_dir: str | Path = "output_features",
    *,
    device: str = "auto",
    feature_names: str = "stem",
    progress: bool = True,
) -> NDArray[np.float32]:
    """Extract the features of an image list into a directory.

    A run that was interrupted goes on where it stopped; features that are there already are
    not computed again.

    Parameters
    ----------
    config : Config or str or Path
        A configuration, an INI file, or the name of a shipped configuration.
    image_list : str or Path
        Text file, one image a line.
    dataset_root : str or Path, default ""
        Folder that relative names in the list lie under.
    output_dir : str or Path, default "output_features"
        Gets ``globalfeats.npy`` [N, P] and, for patchnetvlad pooling, for every image and
        patch size s ``patchfeats_psize{s}_{stem}.npy`` [P, n_s], all float32.
    device : str, default "auto"
    feature_names : {"stem", "path"}, default "stem"
        Name patch files by an image's stem (the layout of the research code), or by its whole
        name in the list, for lists in which stems repeat.
    progress : bool, default True
        Show a progress bar on stderr.

    Returns
    -------
    ndarray [N, P] of float32
        The global descriptors.

    Raises
    ------
    PatchNetVLADError
        Bad input. Everything but images that are broken or too small is noticed before the first
        is read; with such files, the others are still extracted before ImageError names these.
    """
    if not isinstance(config, Config):
        config = Config.load(config)
    target = choose_device(device)
    images = ImageList.read(image_list)
    images.check_images(dataset_root)
    if config.uses_patches:
        check_unique(images.names, feature_names)
        if config.image_size != (0, 0):
            patch_grids(config.image_size, config.patch_sizes, config.strides)  # do they fit?
    output = make_folder(output_dir)
    checkpoint = resolve_checkpoint(config.resume_path, config.num_pcs)
    manifest = Manifest.of(
        config, images.names, file_sha256(checkpoint), feature_names, root=dataset_root
    )
    writer = FeatureWriter(output, images.names, manifest, images.image_paths(dataset_root))
    if writer.replaced:
        logger.info("replacing other features in %s (%s)", output, "; ".join(writer.replaced))
    todo = np.flatnonzero(~writer.done)
    if len(todo) < len(images):
        done = len(images) - len(todo)
        logger.info("%d of %d images have features in %s already", done, len(images), output)
    if len(todo):
        logger.info("computing on %s", describe_device(target))
        model = load_model(config, target)
        dataset = ImageDataset(images, dataset_root, config, todo.tolist())
        _extract_into(writer, model, dataset, images, config, target, progress)
    writer.finish()
    return np.load(output / "globalfeats.npy")


def _extract_into(
    writer: FeatureWriter,
    model: nn.Module,
    dataset: ImageDataset,
    images: ImageList,
    config: Config,
    device: torch.device,
    progress: bool,
) -> None:
    loader = DataLoader(
        dataset,
        batch_size=config.cache_batch_size,
        num_workers=config.threads,
        collate_fn=list,
        pin_memory=device.type == "cuda",
    )
    broken: list[str] = []
    with tqdm(
        total=len(images),
        initial=len(images) - len(dataset),
        desc="Extracting",
        unit="image",
        disable=not progress,
    ) as bar:
        for batch in loader:
            for i, error in batch:
                if isinstance(error, ImageError):
                    broken.append(f"{images.where(i)}: {error}")
            readable = [(i, image) for i, image in batch if isinstance(image, Tensor)]
            for group in _same_sized(readable):
                stacked = torch.stack([image for _, image in group]).to(device, non_blocking=True)
                for (i, _), described in zip(group, describe(model, stacked), strict=True):
                    writer.write(
                        i,
                        described.descriptor.cpu().numpy(),
                        [patch.cpu().numpy() for patch in described.patches],
                    )
            bar.update(len(batch))
    if broken:
        raise ImageError(
            f"{len(broken)} of {len(images)} images could not be decoded, all others are "
            f"extracted: {'; '.join(broken[:5])}{'; ...' if len(broken) > 5 else ''}. "
            "Repair the files and run the command again: it goes on from here"
        )


def _same_sized(batch: list[tuple[int, Tensor]]) -> list[list[tuple[int, Tensor]]]:
    """Split a batch into groups of images of one size; a single group if images are resized."""
    groups: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for i, image in batch:
        groups.setdefault(image.shape, []).append((i, image))
    return list(groups.values())
