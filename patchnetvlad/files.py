# SPDX-License-Identifier: MIT
"""Files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from patchnetvlad.errors import OutputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file to be written, under another name until all is written.

    Parameters
    ----------
    path : Path
        Replaced as a whole; its folder must exist. Of a link, what it leads to is replaced.

    Yields
    ------
    binary file

    Raises
    ------
    OutputError
        The file cannot be written, or what has its name is no regular file.
    """
    try:
        target = path.resolve() if path.is_symlink() else path
        special = target.is_symlink() or (target.exists() and not target.is_file())
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError until Python 3.13
        raise OutputError(f"{path} cannot be written: {error}; name another file") from None
    if special:
        raise OutputError(f"{path} cannot be written: it is no regular file; name another file")
    temporary = target.with_name(f"{target.name}.part")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}; name another folder"
        ) from None
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def replace_text(path: Path, lines: Iterable[str]) -> None:
    """Write lines, with their line ends, to a file in UTF-8; see :func:`replacing`."""
    with replacing(path) as file:
        file.writelines(line.encode() for line in lines)
