# SPDX-License-Identifier: MIT
"""Disk errors, space, atomic file writes, folders for results, and digests."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from patchnetvlad.base.names import is_remote, url_of
from patchnetvlad.base.text import format_bytes
from patchnetvlad.errors import OutputError, PatchNetVLADError

if TYPE_CHECKING:
    from numpy.typing import NDArray


# --- disk errors ----------------------------------------------------------------------------------


@contextlib.contextmanager
def disk_errors(
    problem: str,
    way_out: str,
    kind: type[PatchNetVLADError] = OutputError,
    also: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Turn an OSError into an error that says what to do.

    Parameters
    ----------
    problem : str
        What cannot be done, and with which file; begins the message.
    way_out : str
        Ends it, after the system's reason.
    kind : type, default OutputError
        Of the error that is raised.
    also : tuple of types
        Further errors that a library raises where a file cannot be written.

    Yields
    ------
    None
    """
    try:
        yield
    except PatchNetVLADError:
        raise
    except Exception as error:
        if not isinstance(error, (OSError, *also)):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise kind(f"{problem}: {reason}; {way_out}") from None


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.is_dir())


def free_bytes(path: Path) -> int:
    """Return the free space, in bytes, at the location of a present or future file or folder."""
    return shutil.disk_usage(_existing(path)).free


def check_free(
    what: str,
    need: float,
    path: Path,
    way_out: str,
    kind: type[PatchNetVLADError] = OutputError,
    freed: int = 0,
) -> None:
    """Raise an error if too little space is free.

    Parameters
    ----------
    what : str
        What needs it, as ``"the features need"``; begins the message.
    need : float
        Bytes.
    path : Path
        Where it is needed.
    way_out : str
        Ends the message.
    kind : type, default OutputError
        Of the error.
    freed : int, default 0
        Bytes there that will be freed before.
    """
    free = free_bytes(path) + freed
    if need > free:
        raise kind(
            f"{what} {format_bytes(need)}, but {_existing(path)} has {format_bytes(free)} free; "
            f"{way_out}"
        )


# --- inputs ---------------------------------------------------------------------------------------


def check_inputs_stay(
    outputs: Iterable[str | Path], inputs: Iterable[str | Path | None], way_out: str = ""
) -> None:
    """Raise OutputError if a path to be written or deleted is also read.

    Links and other spellings of a path do not matter: what counts is the file itself.

    Parameters
    ----------
    outputs, inputs : iterable of str or Path
        Files or folders. None, URLs and what is not there are passed over.
    way_out : str, default "name another file or folder for what is written"
        Ends the message.
    """
    found = {of: path for path in outputs if (of := _identity(path)) is not None}
    for path in inputs if found else ():
        identity = None if path is None else _identity(path)
        if identity is not None and identity in found:
            same = found[identity]
            named = f"{path}, which is {same}," if str(path) != str(same) else f"{path}"
            raise OutputError(
                f"{named} is an input, and would be written over or deleted; "
                f"{way_out or 'name another file or folder for what is written'}"
            )


def _identity(path: str | Path) -> tuple[int, int] | None:
    """Return what distinguishes an existing file or folder from all others; None for others."""
    if is_remote(path):
        return None
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    real = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return (found.st_dev, found.st_ino) if real else None


# --- atomic writes --------------------------------------------------------------------------------

_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
_TEMPORARY = re.compile(r"\.[0-9a-f]{12}-([0-9a-f]{6})-(\d+)-[0-9a-f]{16}\.part(-journal)?")
_LEFT_AFTER = 24 * 3600.0  # s, of other machines, whose processes cannot be looked up
_in_use: set[str] = set()  # by this process


@contextlib.contextmanager
def _named(target: Path) -> Iterator[Path]:
    """Give a name beside `target` that nobody foretells, and which says whose it is."""
    head = f".{digest([target.name])[:12]}-{_MACHINE}-{os.getpid()}"
    temporary = target.with_name(f"{head}-{secrets.token_hex(8)}.part")
    _in_use.add(temporary.name)
    try:
        yield temporary
    finally:
        _in_use.discard(temporary.name)


@contextlib.contextmanager
def _reserved(target: Path) -> Iterator[Path]:
    """Give a name; what gets it replaces `target` if no error occurs."""
    with _named(target) as temporary:
        try:
            yield temporary
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Create a folder inside another; it is deleted at the end.

    What killed processes leave of it, :func:`remove_leftovers` deletes.
    """
    with _named(folder / "folder") as temporary:
        temporary.mkdir()
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def is_temporary(name: str) -> bool:
    """Return True if a name is that of a temporary file or folder."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_leftovers(folder: Path, *, below: bool = False) -> None:
    """Delete temporary files and folders whose processes were killed.

    Parameters
    ----------
    folder : Path
    below : bool, default False
        In the folders below it, too.
    """
    for path, folders, names in os.walk(folder):
        for name in (*names, *folders):
            match = _TEMPORARY.fullmatch(name)
            if match and _is_left(Path(path, name), match[1], int(match[2])):
                if name in folders and not Path(path, name).is_symlink():
                    shutil.rmtree(Path(path, name), ignore_errors=True)
                    continue
                with contextlib.suppress(OSError):
                    Path(path, name).unlink()
        if not below:
            folders.clear()


def _is_left(file: Path, machine: str, process: int) -> bool:
    if machine != _MACHINE or os.name != "posix":
        with contextlib.suppress(OSError):
            return time.time() - file.lstat().st_mtime > _LEFT_AFTER
        return False
    if process == os.getpid():
        return file.name.removesuffix("-journal") not in _in_use
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # of another user
        return False
    return False


def create_file(path: Path) -> None:
    """Create an empty file; anything with its name, such as a link, is removed and not followed."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))


def drop_link(path: Path) -> None:
    """Remove a link from the path of a file that is to be opened."""
    if path.is_symlink():
        path.unlink()


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Create a temporary file, which replaces `target` if no error occurs.

    Several processes may write one target. What killed ones have left in the folder is deleted.

    Parameters
    ----------
    target : Path

    Yields
    ------
    Path
        The empty file, in the same folder. It is deleted if anything fails; the error is passed on.
    """
    remove_leftovers(target.parent)
    with _reserved(target) as temporary:
        create_file(temporary)
        yield temporary


@contextlib.contextmanager
def atomic_file(file: Path) -> Iterator[BinaryIO]:
    """Open a file for writing; it replaces the existing file when it is complete.

    Leftovers of killed processes are for the caller: see :func:`remove_leftovers`.
    """
    with _reserved(file) as temporary, temporary.open("xb") as stream:
        yield stream


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing, under a temporary name until it is complete.

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
    with disk_errors(f"{path} cannot be written", "name another folder"):
        remove_leftovers(target.parent)
        with atomic_file(target) as file:
            yield file


def replace_text(path: Path, lines: Iterable[str]) -> None:
    """Write lines, which end in newlines, to a file in UTF-8; see :func:`replacing`."""
    with replacing(path) as file:
        file.writelines(line.encode() for line in lines)


def make_folder(path: str | Path) -> Path:
    """Create a folder for results and its parents; OutputError if that fails."""
    if is_remote(path):
        raise OutputError(f"{url_of(path)} is a URL; name a folder on a disk")
    folder = Path(path)
    with disk_errors(f"the folder {folder} cannot be made", "name another one"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- contents -------------------------------------------------------------------------------------


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


def time_stamp(path: Path | str) -> int:
    """Return the time stamp of a file, in ns; 0 if unknown, as for a URL."""
    if isinstance(path, str):
        return 0
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def set_time_stamp(file: Path, modified: int) -> None:
    """Set a file's modification time to that of an image, in ns; 0 leaves it unchanged."""
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


def sync_file(file: Path) -> None:
    """Make sure that the content of a file survives a power failure."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def write_all(descriptor: int, array: NDArray[Any]) -> None:
    """Write all bytes of a contiguous array at a file's position; a single write may be partial."""
    view = array.reshape(-1).view("uint8").data
    while view:
        view = view[os.write(descriptor, view) :]


def digest(words: Iterable[str]) -> str:
    """Return the SHA-256, in hexadecimal digits, of lines of text."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()
