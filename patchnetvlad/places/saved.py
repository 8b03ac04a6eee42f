# SPDX-License-Identifier: MIT
"""Contents of the SQLite index of a place index."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.names import normal_name
from patchnetvlad.config import Config
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.manifest import INDEX_FILE, Manifest, check_no_share
from patchnetvlad.features.store.index import Record, StoreIndex
from patchnetvlad.places.rows import Position, Row

FAISS_FILE = "places.faiss"
LIST_FILE = "index.txt"
SCHEMA = """
CREATE TABLE IF NOT EXISTS places (
    place INTEGER PRIMARY KEY,  -- as in images
    key TEXT NOT NULL,          -- the name there, as it was given
    x REAL, y REAL, z REAL,     -- position; NULL where it is not known
    height INTEGER NOT NULL,    -- px of the image as the network saw it
    width INTEGER NOT NULL,
    image BLOB                  -- it, as JPEG
)
"""


def storage_kind(config: Config) -> str:
    """Return how a new store keeps patches; ``.npy`` files, which cannot grow, as float32."""
    plain = config.local_features == "npy" or not config.uses_patches
    return "float32" if plain else config.local_features


def place_rows(index: StoreIndex) -> list[tuple[Any, ...]] | None:
    """Return place, key, x, y, z, height and width of each image, in their order.

    None for features that ``feature_extract`` wrote.
    """
    if not index.has_places:
        return None
    return index.rows("SELECT place, key, x, y, z, height, width FROM places ORDER BY place")


def position_of(row: Sequence[Any]) -> Position:
    """Return the position in a row of the table; None if it has none."""
    return tuple(value for value in row[2:5] if value is not None) or None


_LONGEST = 10**6  # px of a side


@dataclass(frozen=True)
class SavedPlaces:
    """What the SQLite index of a folder says.

    Attributes
    ----------
    manifest : Manifest
    names : list of str
        Of the images, as the feature store has them.
    records : dict of str to Record
        By name.
    table : list of tuple or None
        As of :func:`place_rows`.
    """

    manifest: Manifest
    names: list[str]
    records: dict[str, Record]
    table: list[tuple[Any, ...]] | None

    def check_complete(self, folder: Path) -> None:
        """Raise FeatureError unless each image is listed once, and has features.

        Images of an index may have lost theirs to damage.
        """
        missing = [name for name in self.names if name not in self.records]
        if self.table is not None:
            missing = []
        if missing or len(set(self.names)) != len(self.names):
            problem = f"{len(missing)} images have no features yet" if missing else "images repeat"
            raise FeatureError(
                f"{folder}: {problem}; only complete features of images that are listed once can "
                "be searched"
            )
        if self.table is not None and [row[0] for row in self.table] != [*range(len(self.names))]:
            raise FeatureError(f"{folder / INDEX_FILE} is damaged: places and images differ")

    @property
    def is_index(self) -> bool:
        """Whether it is that of an index of places, and not of ``feature_extract``."""
        return self.table is not None or not self.names

    def rows(self, start: int = 0) -> list[Row]:
        """Return what the table says of the images from ``start`` on that have records."""
        return [
            Row(row[1], self.records[name], position_of(row), (row[5], row[6]), row[0])
            for name, row in zip(self.names[start:], (self.table or [])[start:], strict=True)
            if name in self.records and self._is_sound(name, row)
        ]

    def _is_sound(self, name: str, row: Sequence[Any]) -> bool:
        """Whether a row of the table has possible values."""
        key, *xyz, height, width = row[1:]
        fixed = tuple(self.manifest.image_size)
        return (
            isinstance(key, str)
            and normal_name(key) == name
            and all(v is None or (isinstance(v, float) and math.isfinite(v)) for v in xyz)
            and all(type(v) is int and 0 < v <= _LONGEST for v in (height, width))
            and fixed in ((0, 0), (height, width))
        )

    def damaged(self) -> list[str]:
        """Return the names of images that have no records, or impossible values in the table."""
        rows = dict(zip(self.names, self.table or [], strict=False))
        return [
            name
            for name in self.names
            if name not in self.records or (name in rows and not self._is_sound(name, rows[name]))
        ]


def read_saved(folder: Path) -> SavedPlaces:
    """Read the SQLite index of a folder; FeatureError if it has none, or a part of a job."""
    check_no_share(folder)
    if not (folder / INDEX_FILE).is_file():
        raise FeatureError(
            f"there is no index in {folder}: PlaceIndex.save writes one; features in .npy "
            "files are converted by patchnetvlad-store convert"
        )
    with contextlib.closing(StoreIndex(folder)) as index:
        return read_places(index)


def read_places(index: StoreIndex) -> SavedPlaces:
    """Read an open SQLite index, as it is at one moment."""
    with index.snapshot():
        return SavedPlaces(index.manifest, index.names(), index.records(), place_rows(index))


def checksums(rows: Iterable[Row]) -> NDArray[np.uint32]:
    """Return what tells the global descriptors of images from others: [n]."""
    return np.array([row.record.head_crc32 for row in rows], dtype=np.uint32)
