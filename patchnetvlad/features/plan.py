# SPDX-License-Identifier: MIT
"""Planning an extraction: what it will write, and which images are left."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from patchnetvlad.assets.checkpoints import resolve_checkpoint
from patchnetvlad.base.files import file_sha256
from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import ImageError
from patchnetvlad.features.interface import Writer
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.features.names import rows_by_name, rows_to_do
from patchnetvlad.features.npy_files import check_unique
from patchnetvlad.models.grid import flat_sizes

logger = logging.getLogger(__name__)


def plan(
    config: Config,
    images: ImageList,
    dataset_root: str | Path,
    feature_names: str,
    precision: str,
    part: ImageList | None = None,
) -> Manifest:
    """Check the inputs of an extraction, and return the manifest of its features.

    The parameters and errors are those of :func:`extract`; ``part`` are the images to be read, by
    default all.
    """
    (part or images).check_images(dataset_root)
    if config.uses_patches:
        if config.local_features == "npy":
            check_unique(images.names, feature_names)
        if config.image_size != (0, 0):
            warn_of_flat_sizes(config)
    checkpoint = resolve_checkpoint(config.resume_path, config.num_pcs)
    return Manifest.of(
        config,
        images.names,
        file_sha256(checkpoint),
        naming=feature_names,
        precision=precision,
        root=dataset_root,
    )


def warn_of_flat_sizes(config: Config) -> None:
    """Say which patch sizes cannot re-rank by homographies; ConfigError if one does not fit."""
    flat = flat_sizes(config.image_size, config.patch_sizes, config.strides, config.geometry)
    if flat and config.matcher == "RANSAC":
        height, width = config.image_size
        what = "re-ranking has no effect" if len(flat) == len(config.patch_sizes) else "it is void"
        logger.warning(
            "patch size %s leaves one row or column of patches on images of %d x %d px, between "
            "which there is no homography: %s; use larger images, smaller patch_sizes or strides, "
            "or matcher = spatialApproximator",
            ", ".join(map(str, flat)),
            width,
            height,
            what,
        )


def left_to_do(writer: Writer, images: ImageList) -> list[int]:
    """Return the first row of each image without features; log how many have some."""
    done = int(writer.done.sum())
    if done:
        logger.info(
            "%d of %d images have features in %s already", done, len(images), writer.location
        )
    return rows_to_do(images.names, writer.done)


def failed_error(
    images: ImageList, failed: Mapping[str, str], location: Path | RemoteFolder, attempts: int
) -> ImageError:
    """Return the error that images have no features, though all others have.

    Parameters
    ----------
    images : ImageList
    failed : mapping of str to str
        Why images failed, by name.
    location : Path or RemoteFolder
        Where the features of the others are.
    attempts : int
        Number of attempts at each.

    Returns
    -------
    ImageError
    """
    rows = rows_by_name(images.names)
    named = [f"{images.where(rows[name][0])}: {why}" for name, why in failed.items()]
    which = f"{'; '.join(named[:5])}{'; ...' if len(named) > 5 else ''}"
    if attempts == 1:
        return ImageError(
            f"{len(failed)} of {len(images)} images could not be decoded, all others are "
            f"extracted: {which}. Repair or replace the files and run the command again: it "
            "resumes from here"
        )
    return ImageError(
        f"{len(failed)} of {len(images)} images have no features, after {attempts} attempts: "
        f"{which}. All others are extracted in {location}. Repair the files and run the command "
        "again: it tries only these"
    )
