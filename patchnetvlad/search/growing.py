# SPDX-License-Identifier: MIT
"""A FAISS index that grows between searches."""

from __future__ import annotations

import hashlib
import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import atomic_file, disk_errors
from patchnetvlad.errors import ConfigError, FeatureError
from patchnetvlad.search.index import (
    EF_CONSTRUCTION,
    check_numbers,
    check_parameters,
    empty_index,
    reason_of,
    set_parameter,
    set_search_parameters,
)

logger = logging.getLogger(__name__)


class GrowingIndex:
    """A FAISS index to which descriptors are added between searches.

    Not thread-safe: do not search while descriptors are added.

    Parameters
    ----------
    dimension : int
        P.
    factory : str, default "Flat"
        Kind of index that needs no training, as for
        :func:`~patchnetvlad.search.retrieve.retrieve`.
    parameters : str, default ""
        Search effort, as for :func:`~patchnetvlad.search.retrieve.retrieve`.

    Raises
    ------
    ConfigError
        FAISS does not know the factory, or it needs training or lacks one of ``parameters``.
    """

    def __init__(self, dimension: int, factory: str = "Flat", parameters: str = "") -> None:
        self.dimension = dimension
        self.factory = "".join(factory.split())
        self._parameters = parameters
        check_numbers(self.factory)
        self._built = empty_index(self.factory, dimension)
        if not self._built.is_trained or "NSG" in self.factory:
            raise ConfigError(
                f"faiss_index = {factory} has to be trained, so it cannot grow; give Flat, SQfp16 "
                "or HNSW32"
            )
        check_parameters(self.factory, dimension, parameters)
        set_parameter(self._built, "efConstruction", EF_CONSTRUCTION)

    def __len__(self) -> int:
        return int(self._built.ntotal)

    def add(self, descriptors: NDArray[np.float32]) -> None:
        """Add descriptors [n, P]; FeatureError if one is not finite."""
        if not np.isfinite(descriptors).all():
            raise FeatureError("a global descriptor is not finite; describe the image again")
        self._built.add(np.ascontiguousarray(descriptors, dtype=np.float32))

    def search(
        self, descriptor: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the nearest rows; rows are numbered from 0 in the order in which they were added.

        Parameters
        ----------
        descriptor : ndarray [P] of float32
        k : int
            At most the number of rows.

        Returns
        -------
        distances : ndarray [m] of float32
            Euclidean, nearest first.
        rows : ndarray [m] of int64
            m is k, or less where an approximate search finds less.
        """
        if k < 1 or len(self) == 0:
            return np.empty(0, np.float32), np.empty(0, np.int64)
        set_search_parameters(self._built, k, len(self), self._parameters, self.factory)
        squared, rows = self._built.search(np.asarray(descriptor, np.float32)[None], k)
        found = rows[0] >= 0
        return np.sqrt(np.maximum(squared[0][found], 0)), rows[0][found].astype(np.int64)

    def save(self, path: Path, of: NDArray[np.uint32]) -> None:
        """Write the index, unless it is ``Flat``; OutputError if that fails.

        Parameters
        ----------
        path : Path
        of : ndarray [n] of uint32
            Checksums of the descriptors, with which the file is used again, and with no others.
        """
        import faiss

        if self.factory == "Flat":  # the descriptors themselves
            path.unlink(missing_ok=True)
            return
        problem = f"{path} cannot be written"
        with disk_errors(problem, "name another folder"), atomic_file(path) as file:
            untyped: Any = faiss
            content = untyped.serialize_index(self._built)
            file.write(content.data)
            file.write(_END.pack(len(self), _digest(content, of[: len(self)])))

    def load(self, path: Path, of: NDArray[np.uint32]) -> int:
        """Read an index written by :meth:`save`.

        Parameters
        ----------
        path : Path
        of : ndarray [N] of uint32
            Checksums of the current descriptors; a file of others is not used.

        Returns
        -------
        int
            Number of descriptors in the file; 0 if it cannot be used.
        """
        import faiss

        if self.factory == "Flat" or not path.is_file():
            return 0
        try:
            untyped: Any = faiss
            whole = np.fromfile(path, np.uint8)
            content, end = whole[: -_END.size], whole[-_END.size :]
            count, sha256 = _END.unpack(end.tobytes())
            if count > len(of) or _digest(content, of[:count]) != sha256:
                logger.info("%s is built again: it is damaged, or of other descriptors", path)
                return 0
            built = untyped.deserialize_index(content)
        except (OSError, RuntimeError, MemoryError, struct.error) as error:
            logger.info("%s is built again: it is damaged (%s)", path, reason_of(error))
            return 0
        same_kind = type(built) is type(self._built) and built.d == self.dimension
        if not same_kind or built.ntotal != count:
            logger.info("%s is built again: it is of another kind of index", path)
            return 0
        self._built = built
        return len(self)


_END = struct.Struct("<Q32s")  # of a file: number of descriptors, SHA-256


def _digest(content: NDArray[np.uint8], of: NDArray[np.uint32]) -> bytes:
    """Return the SHA-256 of an index and of the checksums of its descriptors."""
    found = hashlib.sha256(np.ascontiguousarray(content).data)
    found.update(np.ascontiguousarray(of, dtype="<u4").data)
    return found.digest()
