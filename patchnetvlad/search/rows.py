# SPDX-License-Identifier: MIT
"""Rows of a file of global descriptors, read on demand."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.names import absolute, is_remote
from patchnetvlad.base.remote import PART_BYTES, RemoteFolder, read_url
from patchnetvlad.errors import FeatureError, RemoteError

READ_BYTES = 64 * 2**20
_HEADER_BYTES = 2**16


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a ``.npy`` file, read on demand.

    Give it to :func:`retrieve` as the index, and each worker reads its own part. Selecting rows,
    by a slice or an array of numbers, gives other Rows and reads nothing.

    Attributes
    ----------
    path : str
        A file that workers see under the same name, or a URL of fsspec, such as ``s3://...``.
    shape : (int, int)
        Of what is selected.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/globalfeats.npy", np.eye(4, dtype=np.float32))
    ...     rows = Rows.open(f"{folder}/globalfeats.npy")
    ...     rows.shape, rows[np.array([3, 0])].read().tolist()
    ((4, 4), [[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    """

    path: str
    shape: tuple[int, int]
    dtype: str
    offset: int
    revision: tuple[int, int] | str
    numbers: range | NDArray[np.int64]

    @classmethod
    def open(cls, path: str | Path) -> Rows:
        """Return all rows of a file.

        Parameters
        ----------
        path : str or Path

        Returns
        -------
        Rows

        Raises
        ------
        FeatureError
            The file cannot be read, or is not a C-ordered array [N, P] of numbers.
        RemoteError
            It is not in object storage, or cannot be had from there.
        """
        name = absolute(path)
        try:
            file = io.BytesIO(_bytes(name, 0, _HEADER_BYTES))
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(file)
            revision = _revision(name)
        except RemoteError:
            raise
        except (OSError, KeyError, ValueError) as error:
            raise FeatureError(f"{name} cannot be read: {error}") from None
        if len(shape) != 2 or fortran or dtype.kind != "f":
            raise FeatureError(
                f"{name} has shape {shape} and type {dtype}; needed is [images, dimensions] of "
                "floats, in the order of C"
            )
        return cls(name, shape, dtype.str, file.tell(), revision, range(shape[0]))

    @property
    def ndim(self) -> int:
        """Always 2."""
        return 2

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, item: slice | NDArray[np.int64]) -> Rows:
        whole = self.numbers
        numbers = whole[item] if isinstance(item, slice) else np.asarray(whole)[item]
        return replace(self, shape=(len(numbers), self.shape[1]), numbers=numbers)

    def read(self) -> NDArray[np.float32]:
        """Read the rows.

        Returns
        -------
        ndarray [n, P] of float32

        Raises
        ------
        OSError
            The file is not there, or not the one that was opened.
        RemoteError
            Object storage cannot be reached.
        """
        if _revision(self.path) != self.revision:
            raise OSError(f"{self.path} is another file here")
        dtype, dims = np.dtype(self.dtype), self.shape[1]
        row_bytes = dtype.itemsize * dims

        def read(first: int, count: int) -> NDArray[Any]:
            data = _bytes(self.path, self.offset + first * row_bytes, count * row_bytes)
            if len(data) != count * row_bytes:
                raise OSError(f"{self.path} ends too early")
            return np.frombuffer(data, dtype).reshape(count, dims)

        numbers = self.numbers
        if isinstance(numbers, range) and numbers.step == 1:
            return np.ascontiguousarray(read(numbers.start, len(self)), np.float32)
        numbers = np.asarray(numbers)
        found = np.empty(self.shape, np.float32)
        order = np.argsort(numbers, kind="stable")
        ordered, i = numbers[order], 0
        at_once = max(1, READ_BYTES // row_bytes)
        while i < len(ordered):
            end = int(np.searchsorted(ordered, ordered[i] + at_once))
            span = read(int(ordered[i]), int(ordered[end - 1] - ordered[i]) + 1)
            found[order[i:end]] = span[ordered[i:end] - ordered[i]]
            i = end
        return found


def _bytes(path: str, start: int, size: int) -> bytes | bytearray:
    """Read from a file, or in parts from object storage; less where it ends."""
    if not is_remote(path):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)
    data = bytearray(size)
    for at in range(0, size, PART_BYTES):
        part = read_url(path, start + at, min(PART_BYTES, size - at))
        data[at : at + PART_BYTES] = part
        if len(data) < size:  # the part was cut off
            break
    return data


def _revision(path: str) -> tuple[int, int] | str:
    """Return what tells a file from another one of its name on another machine's disk."""
    if is_remote(path):
        folder, _, name = path.rpartition("/")
        return RemoteFolder(folder).revision(name)
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns
