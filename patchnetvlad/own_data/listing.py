# SPDX-License-Identifier: MIT
"""Listing the images of a folder or an image list."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from patchnetvlad.datasets.formats import left_out
from patchnetvlad.datasets.image_list import ImageList, list_folder, visible_files
from patchnetvlad.errors import ConfigError, ImageListError


@dataclass(frozen=True)
class Listed:
    """Images of one folder or list.

    Attributes
    ----------
    names : list of str
        Each name once.
    folders : list of Path
        The folder, to look for more names in; empty for an image list.
    repeated : list of str
        Names that the list holds more than once.
    """

    names: list[str]
    folders: list[Path]
    repeated: list[str]


def resolve(source: str | Path, root: str | Path) -> Path:
    """Return the folder or file meant by a path, which may be relative to the root."""
    below = Path(root) / source
    try:
        return below if root and below.exists() else Path(source)
    except (OSError, ValueError):
        return Path(source)


def list_images(
    source: str | Path, root: str | Path, order: str, *, leave_out: str | Path
) -> Listed:
    """List the images of a folder and the folders below it, or read an image list.

    Parameters
    ----------
    source : str or Path
        Folder or image list, which may be relative to ``root``.
    root : str or Path
        Names in folders are relative to it; empty: they begin with the folder as given.
    order : {"natural", "plain"}
        Order of the images in folders.
    leave_out : str or Path
        A file that is not listed: the map of an earlier run.

    Returns
    -------
    Listed

    Raises
    ------
    ConfigError
        The folder is not below the root.
    ImageListError
        There are no images, or the list cannot be read.
    """
    file = resolve(source, root)
    if file.is_dir():
        return Listed(_names_in_folder(file, root, order, leave_out), [file], [])
    listed = ImageList.read(file)
    if not any(map(os.path.exists, listed.image_locations(root))):
        raise ImageListError(
            f"none of the {len(listed)} images of {file} exists, of which the first is "
            f"{listed.where(0)}; names are looked for under {str(root) or 'the current folder'!r}"
        )
    counts = Counter(listed.names)
    return Listed(list(counts), [], [name for name, count in counts.items() if count > 1])


def unsupported_files(folders: Iterable[Path]) -> list[str]:
    """Return a sentence on each kind of file in the folders that is not a readable image."""
    return left_out(file for folder in folders for file in visible_files(folder, "**/*"))


def _names_in_folder(
    folder: Path, root: str | Path, order: str, leave_out: str | Path
) -> list[str]:
    """List the images in a folder and below it, except hidden ones and one file."""
    map_file = os.path.abspath(leave_out)
    try:
        files = [folder / name for name in list_folder(folder)]
    except ImageListError as error:
        hint = "; ".join(unsupported_files([folder]))
        raise ImageListError(f"{error}{f'; {hint}' if hint else ''}") from None
    names = []
    for file in files:
        if os.path.abspath(file) == map_file:
            continue
        if root:
            try:
                file = Path(os.path.abspath(file)).relative_to(os.path.abspath(root))
            except ValueError:
                raise ConfigError(f"the folder {folder} is not below the root {root}") from None
        names.append(file.as_posix())
    if not names:
        raise ImageListError(f"there is no image in {folder} but {leave_out}")
    return names if order == "natural" else sorted(names)
