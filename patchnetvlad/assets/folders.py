# SPDX-License-Identifier: MIT
"""Folders that data files are looked up in, and written to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from patchnetvlad.base import files
from patchnetvlad.errors import AssetError

PACKAGE_DIR = Path(__file__).resolve().parents[1]


def data_dirs() -> list[Path]:
    """Return the directories in which assets are looked up, in order."""
    home = os.environ.get("PATCHNETVLAD_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    first = [Path(home).expanduser().absolute()] if home else []
    return [*first, PACKAGE_DIR, cache / "patchnetvlad"]


def data_home() -> Path:
    """Return the directory into which assets are downloaded."""
    first, *_, cache = data_dirs()
    return cache if first == PACKAGE_DIR and not os.access(PACKAGE_DIR, os.W_OK) else first


def find_asset(local: str) -> Path | None:
    """Return the asset at `local`, such as ``"demo_images/china.jpg"``, or None if missing."""
    return next((place for base in data_dirs() if (place := base / local).is_file()), None)


def expand_home(path: str | Path) -> Path:
    """Replace a leading ``~`` by the user's home folder."""
    return Path(os.path.expanduser(path))


def is_file(path: Path) -> bool:
    """Return True if a file exists; False also for invalid file names."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def path_inside(path: Path, folder: str) -> Path | None:
    """Return `path` relative to `folder` in a data directory, or None if it is not in one.

    ``NAME``, ``folder/NAME`` and ``DATA_DIRECTORY/folder/NAME`` all mean ``NAME``.
    """
    absolute = Path(os.path.abspath(path))
    for base in data_dirs():
        if absolute.is_relative_to(base / folder):
            return absolute.relative_to(base / folder)
    if path.is_absolute() or ".." in path.parts:
        return None
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def possible_paths(path: Path, folder: str) -> Iterator[Path]:
    """Yield possible locations of `path`: as given, then in each data directory."""
    yield path
    inside = path_inside(path, folder)
    for base in data_dirs():
        yield base / path
        if inside is not None:
            yield base / folder / inside


def megabytes(size: int | None) -> str:
    """Format a number of bytes in MB, or say that it is unknown."""
    return "size unknown" if size is None else f"{size / 1e6:,.0f} MB"


def disk_errors(what: str, where: Path) -> contextlib.AbstractContextManager[None]:
    """Turn an OSError of the disk (full, read-only, no permission) into an AssetError."""
    way_out = "free some space there, or set PATCHNETVLAD_HOME to a folder that can be written"
    return files.disk_errors(f"{what} cannot be written to {where}", way_out, AssetError)


@contextlib.contextmanager
def write_new(target: Path) -> Iterator[IO[bytes]]:
    """Open a new file, which is renamed to `target` when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    files.remove_leftovers(target.parent)
    with files.atomic_file(target) as file:
        yield file
