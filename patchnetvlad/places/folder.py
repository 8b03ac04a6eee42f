# SPDX-License-Identifier: MIT
"""The folder of a saved index of places."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patchnetvlad.base.names import is_remote
from patchnetvlad.config import Config
from patchnetvlad.errors import FeatureError, OutputError
from patchnetvlad.features.lock import LOCK_FILE, locked
from patchnetvlad.features.manifest import GLOBAL_FILE, INDEX_FILE, SHARD_FILES
from patchnetvlad.features.store.index import StoreIndex

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


def has_places(index: StoreIndex) -> bool:
    """Return whether a store has the table of an index of places."""
    return bool(index.rows("SELECT 1 FROM sqlite_master WHERE name = 'places'"))


def place_rows(index: StoreIndex) -> list[tuple[Any, ...]] | None:
    """Return place, key, x, y, z, height and width of each image, in their order.

    None for features that ``feature_extract`` wrote.
    """
    if not has_places(index):
        return None
    return index.rows("SELECT place, key, x, y, z, height, width FROM places ORDER BY place")


def position_of(row: Sequence[Any]) -> tuple[float, ...] | None:
    """Return the position in a row of the table; None if it has none."""
    return tuple(value for value in row[2:5] if value is not None) or None


def is_replaceable(folder: Path) -> bool:
    """Tell whether a folder is empty, or holds a saved index and nothing else."""
    if not folder.is_dir():
        return False
    ours = {INDEX_FILE, f"{INDEX_FILE}-journal", LOCK_FILE, GLOBAL_FILE, LIST_FILE, FAISS_FILE}
    files = {file.name for file in folder.iterdir() if file.is_file()}
    shards = {file.name for file in folder.glob(SHARD_FILES)}
    if {file.name for file in folder.iterdir()} - (files & (ours | shards)):
        return False
    if not files - {LOCK_FILE}:
        return True
    if not (folder / INDEX_FILE).is_file():
        return False
    with contextlib.closing(StoreIndex(folder)) as index:
        return has_places(index)


def exchange_folder(part: Path, target: Path) -> None:
    """Put a complete folder in the place of another, or of none."""
    if not target.exists():
        part.rename(target)
        return
    if not any(target.iterdir()):  # which may be where something is mounted
        files = sorted(part.iterdir(), key=lambda file: file.name == INDEX_FILE)
        for file in files:  # the index, which makes the others count, last
            shutil.move(file, target / file.name)
        return
    old = part.with_name(f"{part.name}.old")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(target))
        except FeatureError:
            raise OutputError(
                f"{target} is being added to; close that index, or name another folder"
            ) from None
        target.rename(old)
        try:
            part.rename(target)
        except BaseException:
            old.rename(target)
            raise
    shutil.rmtree(old, ignore_errors=True)


def delete_folder(folder: Path, process: int) -> None:
    """Delete a temporary folder, but not in a process that was forked from its own."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def check_on_disk(path: Any) -> None:
    """Raise FeatureError if a path is a URL."""
    if path is not None and is_remote(path):
        raise FeatureError(f"{path} is a URL: an index of places lies on a disk; copy it there")
