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
        Replaced as a whole; its folder must exist.

    Yields
    ------
    binary file

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.part")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}; name another folder"
        ) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_text(path: Path, lines: Iterable[str]) -> None:
    """Write lines, with their line ends, to a file in UTF-8; see :func:`replacing`."""
    with replacing(path) as file:
        file.writelines(line.encode() for line in lines)
