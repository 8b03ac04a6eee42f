# SPDX-License-Identifier: MIT
"""The interfaces of writers and of readers of features."""

from __future__ import annotations

import copy
import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.manifest import GLOBAL_FILE, Manifest
from patchnetvlad.features.store.codec import Arrays, decode_map, decode_patches
from patchnetvlad.features.store.index import Record


class Sink(Protocol):
    """Takes the features of images, from one thread at a time."""

    def write(
        self, i: int, descriptor: NDArray[np.float32], arrays: Sequence[Any], modified: int = 0
    ) -> None:
        """Write the features of image ``i``.

        Parameters
        ----------
        i : int
            Row in the image list.
        descriptor : ndarray [P] of float32
            Global descriptor.
        arrays : sequence of ndarray
            Patch descriptors or feature map, as encoded for the layout on disk.
        modified : int, default 0
            Time stamp of the image, ns; 0 if it is not known.
        """

    def commit(self) -> None:
        """Make everything written so far survive a crash."""


@dataclass(frozen=True, eq=False)
class Written:
    """What a :class:`Part` has written.

    Attributes
    ----------
    records : list of (str, Record)
        Of a store, by the names of the images.
    descriptors : dict of int to ndarray [P] of float32
        Global descriptors by row, where the :class:`Writer` has no quick way to read them.
    """

    records: list[tuple[str, Record]] = field(default_factory=list)
    descriptors: dict[int, NDArray[np.float32]] = field(default_factory=dict)


class Part(Sink, Protocol):
    """Writes the features of some images in another process, which it may be sent to."""

    def start(self) -> None:
        """Open the files; FeatureError if they cannot be created on this machine."""

    def finish(self) -> Written:
        """Flush everything to the disk, and return what :meth:`Writer.adopt` then enters."""

    def close(self) -> None:
        """Close the files, and delete those that are not finished."""


class ListWriter(Sink, Protocol):
    """Writes the features of an image list, and knows which images are done."""

    done: NDArray[np.bool_]
    """Images [N] whose features are on disk."""

    def start(self) -> None:
        """Prepare for writing; delete features that are to be replaced."""

    def finish(self, failed: Mapping[str, str] | None = None) -> None:
        """Complete the features; FeatureError if images other than ``failed`` are missing."""

    def close(self) -> None:
        """Close the files."""


class Writer(ListWriter, Protocol):
    """A writer whose features can be resumed, shared out and merged."""

    durable: bool
    """Whether what is committed survives a power failure, too, if that takes longer."""

    location: Path | RemoteFolder
    """Where the features are."""

    allows_failures: bool
    """Whether the features can be finished without those of some images."""

    replaced_bytes: int
    """What replacing the features that are there will free."""

    def part(self, rows: Sequence[int]) -> Part:
        """Return a writer of the images in these rows of the list, for another process."""

    def adopt(self, written: Written) -> None:
        """Enter what a :class:`Part` has written."""

    def adopt_shard(self, file: Path, records: Sequence[tuple[str, Record]]) -> bool:
        """Move a shard with these records, by the names of their images, to where the others are.

        False if they have to be written instead.
        """

    def holds(self, i: int, record: Record) -> bool:
        """Return True if the features of image ``i`` are those of a record, or newer."""

    def finish(self, failed: Mapping[str, str] | None = None, modified: int = 0) -> None:
        """Write ``globalfeats.npy``; FeatureError if images other than ``failed`` are missing.

        ``modified`` is the time stamp of the newest image, ns, of features that were computed
        before.
        """

    def global_descriptors(self) -> NDArray[np.float32]:
        """Return the global descriptors [N, P] of a finished list."""


class Reader(ABC):
    """Reads the features of an image list, whatever their layout, from any thread.

    Attributes
    ----------
    directory : Path or RemoteFolder
        Or the file that they are in.
    names : sequence of str, or mapping of int to str
        Of the images; of a :meth:`part`, by their rows.
    manifest : Manifest or None
        None for features of the research code.
    kind : {"float16", "float32", "int8", "map", "npy"}
        How :meth:`arrays` gives the patches.
    stored_sizes : sequence of int
        Patch sizes that it gives.
    patch_sizes : sequence of int
        Those that :meth:`patches` gives.
    failed : mapping of str to str
        Images that could not be extracted: reason by name.
    chosen : ndarray [N] of int64, or None
        Rows of ``global_file`` that the images are in; None for all of them, in order.
    """

    directory: Path | RemoteFolder
    names: Sequence[str] | Mapping[int, str]
    manifest: Manifest | None
    kind: str
    stored_sizes: Sequence[int]
    patch_sizes: Sequence[int]
    failed: Mapping[str, str] = MappingProxyType({})
    chosen: NDArray[np.int64] | None = None

    @abstractmethod
    def arrays(self, i: int) -> Arrays:
        """Read the patches of image ``i``, or its feature map, as they are stored.

        Raises
        ------
        FeatureError
            They are missing or damaged.
        """

    @abstractmethod
    def descriptor(self, i: int) -> NDArray[np.float32]:
        """Read the global descriptor [P] of image ``i``; errors as of :meth:`arrays`."""

    @abstractmethod
    def shapes(self, i: int) -> list[Sequence[int]]:
        """Return the shapes of the :meth:`arrays` of image ``i`` without reading these."""

    @abstractmethod
    def size(self, i: int) -> int:
        """Return the size of the features of image ``i``, bytes; 0 if there are none."""

    @abstractmethod
    def modified(self, i: int) -> int:
        """Return the time stamp of the extracted image, in ns; 0 if unknown."""

    def read(self, i: int) -> tuple[NDArray[np.float32], Arrays]:
        """Read the global descriptor [P] and the :meth:`arrays` of image ``i``."""
        return self.descriptor(i), self.arrays(i)

    def counts(self, i: int) -> list[int]:
        """Return n_s of each of the ``stored_sizes`` of image ``i``, without reading them."""
        return [shape[0] for shape in self.shapes(i) if len(shape) == 2]  # 1: scales of int8

    def patches(self, i: int, device: torch.device | str = "cpu") -> Sequence[Tensor]:
        """Read the patch descriptors of image ``i``.

        Parameters
        ----------
        i : int
            Row in the image list.
        device : torch.device or str, default "cpu"

        Returns
        -------
        sequence of Tensor [n_s, P] of float32
            One per size of ``patch_sizes``.

        Raises
        ------
        FeatureError
            They are missing or damaged, or feature maps are kept instead.
        """
        if self.kind == "map":
            raise FeatureError(f"{self.directory} holds feature maps, not patch descriptors")
        decoded = decode_patches(self.arrays(i), self.kind, device)
        by_size = dict(zip(self.stored_sizes, decoded, strict=True))
        return [by_size[size] for size in self.patch_sizes]

    def feature_map(self, i: int, device: torch.device | str = "cpu") -> Tensor:
        """Read the feature map [D, h, w] of image ``i``, where these are kept, as float32."""
        return decode_map(self.arrays(i), device)

    @functools.cached_property
    def global_descriptors(self) -> NDArray[np.float32]:
        """Global descriptors [N, P]; not finite for images of ``failed``."""
        return np.stack([self.descriptor(i) for i in range(len(self.names))])

    @property
    def global_file(self) -> Path | str:
        """Path or URL of the file of global descriptors."""
        if isinstance(self.directory, Path):
            return self.directory / GLOBAL_FILE
        return self.directory.url_of(GLOBAL_FILE)

    def revision(self) -> str:
        """Return a token that changes whenever the features are rewritten."""
        if isinstance(self.directory, Path):
            return str((self.directory / GLOBAL_FILE).stat().st_mtime_ns)
        return self.directory.revision(GLOBAL_FILE)

    def part(self, rows: Iterable[int]) -> Reader:
        """Return a small reader of the patches of some rows, for another process."""
        part = copy.copy(self)
        if isinstance(self.directory, Path):
            part.directory = Path(os.path.abspath(self.directory))
        part.names = {i: self.names[i] for i in rows}
        part.global_descriptors = self.global_descriptors[:0]
        return part

    def close(self) -> None:  # noqa: B027
        """Close the files."""
