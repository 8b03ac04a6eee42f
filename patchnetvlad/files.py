# SPDX-License-Identifier: MIT
"""Atomic file writes."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from patchnetvlad.errors import OutputError


@contextlib.contextmanager
def new_file(target: Path, part: str | None = None) -> Iterator[Path]:
    """Give the name of a file to write, which replaces `target` when all went well.

    Parameters
    ----------
    target : Path
    part : str, optional
        Name of the file until then, in the same folder. A fixed one lets the next run overwrite
        what a killed one left; by default it is like no other, so that several processes can write
        one target.

    Yields
    ------
    Path
        It is deleted if anything fails, whose error is passed on.
    """
    # The name of the target may be as long as a name can be.
    temporary = target.with_name(part or f".{target.name[:80]}.{uuid.uuid4().hex}.part")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
    try:
        with new_file(target) as temporary, temporary.open("xb") as file:
            yield file
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}; name another folder"
        ) from None


def replace_text(path: Path, lines: Iterable[str]) -> None:
    """Write lines, with their line ends, to a file in UTF-8; see :func:`replacing`."""
    with replacing(path) as file:
        file.writelines(line.encode() for line in lines)
