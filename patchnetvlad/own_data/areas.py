# SPDX-License-Identifier: MIT
"""Training areas from your own images, with positions from any source."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import GroundTruthError
from patchnetvlad.own_data.listing import list_images
from patchnetvlad.own_data.positions.plane import to_plane
from patchnetvlad.own_data.positions.reader import PositionReader
from patchnetvlad.training.areas import area_of_images
from patchnetvlad.training.tuples import Area

logger = logging.getLogger(__name__)


def read_own_images(
    images: str | Path, positions: str | Path = "auto", dataset_root: str | Path = ""
) -> Area:
    """Make an area from images that are both queries and index.

    Parameters
    ----------
    images : str or Path
        A folder, or an image list.
    positions : str or Path, default "auto"
        As for ``patchnetvlad dataset create``, or a ``.npy`` file of numbers [N, c], in the order
        of a list.
    dataset_root : str or Path, default ""
        Folder that relative names lie under.

    Returns
    -------
    Area
        Without the images whose position is not known.

    Raises
    ------
    ImageListError, GroundTruthError
        A file cannot be read, or there are no positions.
    """
    if Path(positions).suffix == ".npy":
        listed = ImageList.read(images)
        try:
            values = np.asarray(np.load(positions, allow_pickle=False), np.float64)
        except (OSError, ValueError) as error:
            raise GroundTruthError(f"{positions} cannot be read: {error}") from None
        return area_of_images(str(images), listed.image_locations(dataset_root), values)
    found = list_images(images, dataset_root, "natural", leave_out="")
    reader = PositionReader(dataset_root, None, {}, 0.0, None, None)
    read, where = reader.read(positions, found)
    plane = to_plane([read])
    known = np.asarray(np.isfinite(plane.values[0]).all(axis=1))
    if not known.all():
        logger.info("%d images have no position in %s", np.count_nonzero(~known), where)
    root = Path(dataset_root)
    names = [root / name for name, ok in zip(found.names, known, strict=True) if ok]
    return area_of_images(str(images), names, plane.values[0][known], read.headings[known])
