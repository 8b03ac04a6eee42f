# SPDX-License-Identifier: MIT
"""Writing one shard of a store, and appending single records to shards."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import sync_folder, write_all
from patchnetvlad.features.interface import Written
from patchnetvlad.features.names import check_shared_folder, disk_errors
from patchnetvlad.features.store.index import Record, shard_file

WRITE_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)


class ShardWriter:
    """Writes one shard of a store, which a :class:`StoreWriter` of another process then adopts.

    Parameters
    ----------
    directory : Path
    shard : int
        Number of a shard that does not exist.
    names : mapping of int to str
        Of images, by their rows in the list.
    modified : mapping of int to int
        Time stamps of the images, ns; 0 where not known.

    """

    def __init__(
        self,
        directory: Path,
        shard: int,
        names: Mapping[int, str],
        modified: Mapping[int, int],
    ) -> None:
        self.directory = directory
        self.written = Written()
        self.shard, self._names, self._modified = shard, names, modified
        self._end = 0
        self._file: int | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return shard_file(self.directory, self.shard)

    def start(self) -> None:
        """Create the file; FeatureError if it exists, or cannot be created."""
        check_shared_folder(self.directory)
        with disk_errors(self.directory):
            self._file = os.open(self.path, WRITE_FLAGS | os.O_EXCL, 0o666)

    def write(
        self, i: int, descriptor: NDArray[np.float32], arrays: Sequence[Any], modified: int = 0
    ) -> None:
        """Append the record of image ``i``: [P] and its arrays; see :meth:`StoreWriter.write`."""
        assert self._file is not None
        where = self.shard, self._end, self._modified[i] or modified
        with disk_errors(self.directory):
            record = append_record(self._file, where, descriptor, arrays)
        self.written.records.append((self._names[i], record))
        self._end += record.bytes

    def commit(self) -> None:
        """Do nothing: the shard counts only as a whole."""

    def finish(self) -> Written:
        """Flush the shard to the disk; delete it if it has no records."""
        assert self._file is not None
        with disk_errors(self.directory):
            os.fsync(self._file)
        sync_folder(self.directory)
        self._close_file(keep=bool(self.written.records))
        return self.written

    def close(self) -> None:
        """Close the file, and delete a shard that is not finished."""
        self._close_file(keep=False)

    def _close_file(self, keep: bool) -> None:
        if self._file is not None:
            descriptor, self._file = self._file, None
            os.close(descriptor)
            if not keep:
                self.path.unlink(missing_ok=True)


def append_record(
    file: int, where: tuple[int, int, int], descriptor: NDArray[np.float32], arrays: Sequence[Any]
) -> Record:
    """Write a record to an open shard.

    Parameters
    ----------
    file : int
        Descriptor of the open shard.
    where : tuple of int
        Number of the shard, first byte, time stamp of the image.
    descriptor : ndarray [P] of float32
        Global descriptor.
    arrays : sequence of ndarray
        Patches, as they are stored.

    Returns
    -------
    Record
    """
    shard, start, modified = where
    parts = [np.ascontiguousarray(descriptor, dtype=np.float32)]
    parts += [np.ascontiguousarray(array) for array in arrays]
    layout = json.dumps([[part.dtype.str, list(part.shape)] for part in parts])
    checksums = [zlib.crc32(layout.encode())]
    os.lseek(file, start, os.SEEK_SET)
    for part in parts:
        checksums.append(zlib.crc32(part.data, checksums[-1]))
        write_all(file, part)
    size, head = sum(part.nbytes for part in parts), parts[0].nbytes
    return Record(shard, start, size, head, layout, checksums[1], checksums[-1], modified)
