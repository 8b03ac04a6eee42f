# SPDX-License-Identifier: MIT
"""Reading records from a disk or object storage, and checking them."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import disk_errors
from patchnetvlad.base.names import is_remote, url_of
from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.errors import FeatureError, RemoteNotFoundError
from patchnetvlad.features.manifest import GLOBAL_FILE, INDEX_FILE, SHARE_FILE
from patchnetvlad.features.store.index import Record, StoreIndex, shard_file, shard_name
from patchnetvlad.features.store.share import ShareFolder

TRANSFERS = 3
"""Number of attempts to fetch a record whose checksum is wrong from object storage."""

_AGAIN = "run feature_extract again, it computes what is missing"


class RecordError(FeatureError):
    """A record that cannot be read or is damaged; ``problem`` says why in a few words."""

    def __init__(self, what: str, file: Path | str, problem: str, hint: str) -> None:
        super().__init__(f"the record of {what} in {file} {problem}; {hint}")
        self.problem = problem


def read_record(
    directory: Path | RemoteFolder, record: Record, what: str, *, head: bool = False
) -> bytearray:
    """Read the bytes of a record, or only those of its global descriptor; thread-safe.

    Parameters
    ----------
    directory : Path or RemoteFolder
    record : Record
    what : str
        The image's name, for messages.
    head : bool, default False
        Only the global descriptor.

    Returns
    -------
    bytearray

    Raises
    ------
    RecordError
        The bytes are missing, or not what was written.
    RemoteError
        Object storage cannot be reached.
    """
    size, crc = (record.head, record.head_crc32) if head else (record.bytes, record.crc32)
    if isinstance(directory, Path):
        buffer = _read_shard(directory, record, size, what)
        if _agrees(buffer, record, crc):
            return buffer
        hint = (
            f"patchnetvlad-store verify --drop {directory} takes damaged records out, and "
            "feature_extract then computes these again"
        )
        file: Path | str = shard_file(directory, record.shard)
        raise RecordError(what, file, "does not agree with its checksum", hint)
    for _ in range(TRANSFERS):  # it may have been damaged on the way
        buffer = _fetch_shard(directory, record, size, what)
        if _agrees(buffer, record, crc):
            return buffer
    raise RecordError(
        what,
        directory.url_of(shard_name(record.shard)),
        f"does not agree with its checksum, fetched {TRANSFERS} times",
        "copy the store to a disk, where patchnetvlad-store verify --drop takes damaged records "
        "out and feature_extract then computes these again",
    )


def _agrees(buffer: bytearray, record: Record, crc: int) -> bool:
    return zlib.crc32(buffer, zlib.crc32(record.arrays.encode())) == crc


def is_head(descriptor: NDArray[np.float32], record: Record) -> bool:
    """Whether a global descriptor [P] is the one that was written in a record."""
    head = np.ascontiguousarray(descriptor, dtype="<f4")
    return zlib.crc32(head.data, zlib.crc32(record.arrays.encode())) == record.head_crc32


def _read_shard(directory: Path, record: Record, size: int, what: str) -> bytearray:
    file = shard_file(directory, record.shard)
    try:
        with file.open("rb") as stream:
            # First, since a damaged index may give any size.
            if record.start + size > os.fstat(stream.fileno()).st_size:
                raise RecordError(what, file, "is cut off", _AGAIN)
            buffer = bytearray(size)
            stream.seek(record.start)
            stream.readinto(buffer)  # if it is cut off meanwhile, the checksum is wrong
    except OSError as error:
        raise RecordError(what, file, f"cannot be read ({error.strerror})", _AGAIN) from None
    return buffer


def _fetch_shard(folder: RemoteFolder, record: Record, size: int, what: str) -> bytearray:
    name = shard_name(record.shard)
    try:
        buffer = folder.read(name, record.start, size)
    except RemoteNotFoundError:
        raise RecordError(what, folder.url_of(name), "is gone, with the object", _AGAIN) from None
    if len(buffer) < size:
        raise RecordError(what, folder.url_of(name), "is cut off", _AGAIN)
    return bytearray(buffer)


@contextlib.contextmanager
def local_copy(folder: RemoteFolder, names: Sequence[str]) -> Iterator[Path]:
    """Fetch files of a feature store into a temporary folder, which is deleted at the end.

    Parameters
    ----------
    folder : RemoteFolder
    names : sequence of str

    Yields
    ------
    Path
        The temporary folder. A FeatureError in the block names ``folder`` instead of it.

    Raises
    ------
    FeatureError
        There is no finished store in the folder, or no room for the files here.
    RemoteError
        Object storage cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="patchnetvlad-") as temporary:
        problem = f"{folder.url} cannot be fetched into {temporary}"
        try:
            with disk_errors(problem, "let TMPDIR name a folder with more room", FeatureError):
                for name in names:
                    folder.fetch(name, Path(temporary, name))
        except RemoteNotFoundError:
            raise _no_store_error(folder) from None
        try:
            yield Path(temporary)
        except FeatureError as error:
            raise FeatureError(str(error).replace(temporary, folder.url)) from None


def _no_store_error(folder: RemoteFolder) -> FeatureError:
    there = folder.names()
    if not there:
        return FeatureError(
            f"there is nothing in {folder}; run feature_extract with this --output_features_dir "
            "first"
        )
    if INDEX_FILE not in there and GLOBAL_FILE in there:
        return FeatureError(
            f"{folder} holds .npy files, which are read from a disk only; convert them to a store "
            "(patchnetvlad-store convert --to float16) and copy that there"
        )
    return FeatureError(
        f"the feature store in {folder} is not finished; run feature_extract again, it resumes "
        "from there"
    )


@contextlib.contextmanager
def opened_index(
    directory: Path | RemoteFolder, writable: bool = False
) -> Iterator[StoreIndex | ShareFolder]:
    """Open the index of a store, or of a share; errors as for :class:`StoreIndex`."""
    with contextlib.ExitStack() as stack:
        if not isinstance(directory, Path):
            directory = stack.enter_context(local_copy(directory, [INDEX_FILE]))
        if (directory / SHARE_FILE).is_file():
            yield ShareFolder.read(directory)
        else:
            yield stack.enter_context(contextlib.closing(StoreIndex(directory, writable)))


def feature_folder(directory: str | Path) -> Path | RemoteFolder:
    """Return the folder of features that a path or a URL names."""
    return RemoteFolder(url_of(directory)) if is_remote(directory) else Path(directory)
