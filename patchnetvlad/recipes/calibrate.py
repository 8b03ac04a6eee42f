# SPDX-License-Identifier: MIT
"""Calibration: the ranges of the values in a network, for ``precision = int8``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from patchnetvlad.assets.checkpoints import resolve_checkpoint
from patchnetvlad.base.arguments import checked
from patchnetvlad.base.device import arithmetic, choose_device
from patchnetvlad.base.files import check_inputs_stay, replace_text
from patchnetvlad.config import Config
from patchnetvlad.datasets.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    input_transform,
    load_image,
)
from patchnetvlad.errors import ArgumentError, ImageError
from patchnetvlad.models.checkpoint import load_network
from patchnetvlad.models.int8 import measure_ranges, ranges_file
from patchnetvlad.training.fit import find_images

logger = logging.getLogger(__name__)

MOST_IMAGES = 100


@dataclass(frozen=True)
class Calibrated:
    """What :func:`calibrate` wrote.

    Attributes
    ----------
    file : Path
        Beside the checkpoint.
    images : int
        On which the ranges were measured.
    """

    file: Path
    images: int


@checked
def calibrate(
    config: Config | str | Path,
    images: str | Path,
    *,
    dataset_root: str | Path = "",
    most_images: int = MOST_IMAGES,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> Calibrated:
    """Measure the ranges of the values in a network, and write them beside its checkpoint.

    ``precision = int8`` rounds values to 256 steps between their least and largest on images.

    Parameters
    ----------
    config : Config or str or Path
        A configuration, an INI file, or the name of a built-in configuration.
    images : str or Path
        A folder or an image list, of images such as will be extracted.
    dataset_root : str or Path, default ""
        Folder that relative names of a list lie under.
    most_images : int, default 100
        Of more images, so many are taken, evenly over their order.
    device : str or torch.device, default "auto"
    progress : bool, default True
        Show a progress bar.

    Returns
    -------
    Calibrated

    Raises
    ------
    ArgumentError
        The network has another encoder than VGG16, or ``most_images`` is below 1.
    ImageError
        None of the images can be read.
    PatchNetVLADError
        The configuration, the checkpoint or the list cannot be read, or the file not be written.
    """
    settings = config if isinstance(config, Config) else Config.load(config)
    if most_images < 1:
        raise ArgumentError(f"most_images = {most_images} must be 1 or more")
    checkpoint = resolve_checkpoint(settings.resume_path, settings.num_pcs)
    file = ranges_file(checkpoint)
    check_inputs_stay([file], [settings.source, checkpoint, images])
    paths = find_images(images, dataset_root)
    rows = np.unique(np.linspace(0, len(paths) - 1, min(most_images, len(paths))).astype(int))
    target = choose_device(device)
    encoder = load_network(settings, target).get_submodule("encoder")
    decoded = _decoded([paths[row] for row in rows], settings, progress)
    scaled = list(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
    bounds = min(-mean / std for mean, std in scaled), max((1 - mean) / std for mean, std in scaled)
    with arithmetic(target, "exact"):
        ranges = measure_ranges(encoder, decoded, bounds)
    if not ranges.images:
        raise ImageError(f"{images}: none of {len(rows)} images can be read; give others")
    replace_text(file, [ranges.to_json()])
    return Calibrated(file, ranges.images)


def _decoded(paths: Sequence[Path | str], config: Config, progress: bool) -> Iterator[Tensor]:
    """Yield images [3, H, W], normalised; those that cannot be read are passed over."""
    size, least = config.image_size, config.geometry.cell
    transform = input_transform(size)
    for path in tqdm(paths, desc="calibrate", unit="image", disable=not progress):
        try:
            image = transform(load_image(path, size))
            if min(image.shape[1:]) < least:
                raise ImageError(f"the image {path} is smaller than {least} px")
        except ImageError as error:
            logger.warning("%s; it is passed over", error)
            continue
        yield image
