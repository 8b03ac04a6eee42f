# SPDX-License-Identifier: MIT
"""Cities of Mapillary Street-level Sequences, for training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import GroundTruthError
from patchnetvlad.own_data.official import (
    MSLS_VAL_CITIES,
    read_flag,
    read_msls_side,
    read_msls_table,
)
from patchnetvlad.training.tuples import Area

logger = logging.getLogger(__name__)

TRAIN_CITIES = (
    "trondheim", "london", "boston", "melbourne", "amsterdam", "helsinki", "tokyo", "toronto",
    "saopaulo", "moscow", "zurich", "paris", "bangkok", "budapest", "austin", "berlin", "ottawa",
    "phoenix", "goa", "amman", "nairobi", "manila",
)  # fmt: skip
CITIES = {"train": TRAIN_CITIES, "val": MSLS_VAL_CITIES}
_SIDEWAYS = "Sideways"


def read_areas(
    root: str | Path,
    mode: str = "train",
    cities: Sequence[str] = (),
    *,
    subtask: str = "all",
    panoramas: bool = False,
) -> list[Area]:
    """Read cities of Mapillary Street-level Sequences.

    Parameters
    ----------
    root : str or Path
        Folder that holds ``train_val``.
    mode : {"train", "val"}, default "train"
        Of which the cities that are in the folder are read, where none are named.
    cities : sequence of str, default ()
    subtask : str, default "all"
        Column of ``subtask_index.csv``; its images take part.
    panoramas : bool, default False
        Whether panoramas take part.

    Returns
    -------
    list of Area
        Images are below ``root``.

    Raises
    ------
    GroundTruthError
        A city, or every city, is missing; a file is missing or damaged.
    """
    folder = Path(root) / "train_val"
    if not folder.is_dir():
        raise GroundTruthError(
            f"there is no folder {folder}; name the folder that holds train_val, that of Mapillary "
            "Street-level Sequences"
        )
    chosen = list(cities)
    if not chosen:
        chosen = [city for city in CITIES[mode] if (folder / city).is_dir()]
        missing = [city for city in CITIES[mode] if city not in chosen]
        if not chosen:
            raise GroundTruthError(f"{folder} has none of {', '.join(missing)}")
        if missing:
            logger.info("%s: without %s, which are not there", folder, ", ".join(missing))
    return [_read_city(folder / city, subtask, panoramas) for city in chosen]


def _read_city(folder: Path, subtask: str, panoramas: bool) -> Area:
    if not folder.is_dir():
        raise GroundTruthError(f"there is no folder {folder}; name cities that are there")
    found: dict[str, tuple[list[str], NDArray[np.float64]]] = {}
    for side in ("query", "database"):
        keys, utm, counts, pano = read_msls_side(folder / side, subtask)
        kept = np.flatnonzero(counts if panoramas else counts & ~pano)
        if len(kept) == 0:
            raise GroundTruthError(f"{folder / side} has no image that counts in {subtask}")
        found[side] = [keys[row] for row in kept], utm[kept]
    file = folder / "query" / "postprocessed.csv"
    rare = read_msls_table(file, ("night", "view_direction"))
    keys = found["query"][0]
    night = [
        read_flag(rare[key][1], f"{file}, line {rare[key][0]}: night of {key}") for key in keys
    ]
    sideways = [rare[key][2] == _SIDEWAYS for key in keys]
    names = {
        side: tuple(folder / side / "images" / f"{key}.jpg" for key in found[side][0])
        for side in found
    }
    return Area(
        folder.name,
        names["query"],
        names["database"],
        found["query"][1],
        found["database"][1],
        np.array(night, dtype=bool),
        np.array(sideways, dtype=bool),
    )
