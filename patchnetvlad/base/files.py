# SPDX-License-Identifier: MIT
"""Atomic file writes, folders for results, and digests."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from patchnetvlad.base.names import is_remote
from patchnetvlad.errors import OutputError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@contextlib.contextmanager
def new_file(target: Path, part: str | None = None) -> Iterator[Path]:
    """Give the name of a temporary file, which replaces `target` if no error occurs.

    Parameters
    ----------
    target : Path
    part : str, optional
        Name of the temporary file, in the same folder. A fixed name lets the next run overwrite
        what a killed one left; the default is unique, so that several processes can write one
        target.

    Yields
    ------
    Path
        The temporary file, which is deleted if anything fails; the error is passed on.
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
    """Open a file for writing, under a temporary name until all is written.

    Parameters
    ----------
    path : Path
        Replaced as a whole; its folder must exist. If it is a link, its target is replaced.

    Yields
    ------
    binary file

    Raises
    ------
    OutputError
        The file cannot be written, or it exists and is not a regular file.
    """
    try:
        target = path.resolve() if path.is_symlink() else path
        special = target.is_symlink() or (target.exists() and not target.is_file())
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError until Python 3.13
        raise OutputError(f"{path} cannot be written: {error}; name another file") from None
    if special:
        raise OutputError(f"{path} cannot be written: it is not a regular file; name another file")
    try:
        with new_file(target) as temporary, temporary.open("xb") as file:
            yield file
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}; name another folder"
        ) from None


def replace_text(path: Path, lines: Iterable[str]) -> None:
    """Write lines, which end in newlines, to a file in UTF-8; see :func:`replacing`."""
    with replacing(path) as file:
        file.writelines(line.encode() for line in lines)


def make_folder(path: str | Path) -> Path:
    """Make a folder for results and its parents; OutputError if it cannot be made."""
    if is_remote(path):
        raise OutputError(f"{path} is a URL; name a folder on a disk")
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the folder {folder} cannot be made: {error.strerror}; name another one"
        ) from None
    return folder


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return stream_sha256(file)


def stream_sha256(file: IO[bytes]) -> str:
    """Return the SHA-256, in hexadecimal, of the rest of an open file."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(file: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing; it replaces the one of that name when it is complete."""
    part = f".{digest([file.name])[:32]}.part"  # the same in every run, which overwrites it
    with new_file(file, part) as temporary, temporary.open("wb") as stream:
        yield stream


def time_stamp(path: Path | str) -> int:
    """Return the time stamp of a file, ns; 0 where it is not known, as of a URL."""
    if isinstance(path, str):
        return 0
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def set_time_stamp(file: Path, modified: int) -> None:
    """Set a file's modification time to that of an image, ns; 0 leaves it as it is."""
    if modified:
        # Full seconds, which every file system keeps; not before the image's, or it looks stale.
        stamp = -(-modified // 10**9) * 10**9
        os.utime(file, ns=(stamp, stamp))


def sync_folder(directory: Path) -> None:
    """Make sure that the names in a folder survive a power failure."""
    with contextlib.suppress(OSError):  # some systems cannot
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_all(descriptor: int, array: NDArray[Any]) -> None:
    """Write all bytes of a contiguous array at a file's position; a single write may be partial."""
    view = array.reshape(-1).view("uint8").data
    while view:
        view = view[os.write(descriptor, view) :]


def digest(words: Iterable[str]) -> str:
    """Return the SHA-256, in hexadecimal digits, of lines of text."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()
