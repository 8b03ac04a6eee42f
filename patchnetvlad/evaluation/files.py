# SPDX-License-Identifier: MIT
"""Text files that are there as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from patchnetvlad.errors import OutputError


def replace_text(path: Path, lines: Iterable[str]) -> None:
    """Write lines to a file in UTF-8, under another name until all are written.

    Parameters
    ----------
    path : Path
        Replaced as a whole; its folder must exist.
    lines : iterable of str
        With their line ends.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.part")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}; name another folder"
        ) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
