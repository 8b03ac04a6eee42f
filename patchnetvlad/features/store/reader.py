# SPDX-License-Identifier: MIT
"""Reading the features of an image list from a store."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from patchnetvlad.base.device import upload
from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.config import Config
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.manifest import GLOBAL_FILE, INDEX_FILE, Manifest, check_fits
from patchnetvlad.features.npy_files import load_global_descriptors
from patchnetvlad.features.store.codec import Arrays, decode_patches, split_record
from patchnetvlad.features.store.index import Record, StoreIndex
from patchnetvlad.features.store.records import feature_folder, local_copy, read_record


def read_arrays(directory: Path | RemoteFolder, record: Record, what: str) -> Arrays:
    """Read the arrays of a record, without its global descriptor.

    Parameters and errors are those of :func:`~patchnetvlad.features.store.records.read_record`.
    """
    return split_record(read_record(directory, record, what), record.arrays)[1:]


def choose_patches(
    arrays: Arrays,
    kind: str,
    stored: Sequence[int],
    wanted: Sequence[int],
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Decode patch descriptors, and choose some of their sizes.

    Parameters
    ----------
    arrays : list of ndarray
        Of a record.
    kind : {"float32", "float16", "int8", "npy"}
        How they are stored.
    stored : sequence of int
        Patch sizes that the record has.
    wanted : sequence of int
        Some of these.
    device : torch.device or str, default "cpu"

    Returns
    -------
    list of Tensor [n_s, P] of float32
        One per size wanted.
    """
    by_size = dict(zip(stored, decode_patches(arrays, kind, device), strict=True))
    return [by_size[size] for size in wanted]


def decode_map(arrays: Arrays, device: torch.device | str = "cpu") -> Tensor:
    """Return the feature map [D, h, w] of a record's arrays as float32 on a device."""
    (feature_map,) = arrays
    return upload(feature_map, torch.device(device)).float()


class StoreReader:
    """Reads a feature store, from a disk or from object storage.

    Parameters
    ----------
    directory : str or Path
        Or a URL, such as ``s3://bucket/prefix``. From there, the index and the global descriptors
        are fetched at once, and records when they are read.
    names : sequence of str
        The image list that the features were extracted from.
    config : Config
        The configuration for matching.
    dataset_root : str or Path, default ""
        Folder that relative names lie under.

    Attributes
    ----------
    directory : Path or RemoteFolder
    manifest : Manifest
    global_descriptors : ndarray [N, P] of float32
        Not finite for images of ``failed``.
    failed : dict of str to str
        Images that could not be extracted on a cluster: reason by name.

    Raises
    ------
    FeatureError
        The store is unfinished or damaged, or was made from another list or configuration.
    RemoteError
        Object storage cannot be reached.
    """

    def __init__(
        self,
        directory: str | Path,
        names: Sequence[str],
        config: Config,
        dataset_root: str | Path = "",
    ) -> None:
        self.directory = feature_folder(directory)
        self.config = config
        with contextlib.ExitStack() as stack:
            if isinstance(self.directory, Path):
                folder = self.directory
            else:
                files = [INDEX_FILE, GLOBAL_FILE]
                folder = stack.enter_context(local_copy(self.directory, files))
            index = stack.enter_context(contextlib.closing(StoreIndex(folder)))
            stack.enter_context(index.snapshot())
            self.manifest: Manifest = index.manifest
            self.failed = index.failed
            # By row, because the same images may be listed by other names.
            listed = index.names()
            self._names: Sequence[str] | Mapping[int, str] = listed
            failed = {i for i, name in enumerate(listed) if name in self.failed}
            self.global_descriptors = load_global_descriptors(folder, names, failed)
            check_fits(folder, self.manifest, names, config, dataset_root)
            self._records = index.records()

    def stamp(self) -> str:
        """Return a token that changes whenever the features are rewritten."""
        if isinstance(self.directory, Path):
            return str((self.directory / GLOBAL_FILE).stat().st_mtime_ns)
        return self.directory.stamp(GLOBAL_FILE)

    def arrays(self, i: int) -> Arrays:
        """Read the arrays of the record of image ``i``, without its global descriptor.

        Raises
        ------
        FeatureError
            The record is missing or damaged.
        """
        name = self._names[i]
        record = self._records.get(name)
        if record is None:
            raise FeatureError(
                f"{self.directory} has no features of {name}; run feature_extract again, it "
                "computes what is missing"
            )
        return read_arrays(self.directory, record, name)

    def patches(self, i: int, device: torch.device | str = "cpu") -> list[Tensor]:
        """Read the patch descriptors of image ``i``.

        Parameters
        ----------
        i : int
            Row in the image list.
        device : torch.device or str, default "cpu"

        Returns
        -------
        list of Tensor [n_s, P] of float32
            One per patch size of the configuration.

        Raises
        ------
        FeatureError
            The record is missing or damaged, or holds a feature map.
        """
        kind, sizes = self.manifest.local_features, self.manifest.patch_sizes
        if kind == "map":
            raise FeatureError(f"{self.directory} holds feature maps, not patch descriptors")
        return choose_patches(self.arrays(i), kind, sizes, self.config.patch_sizes, device)

    def feature_map(self, i: int, device: torch.device | str = "cpu") -> Tensor:
        """Read the feature map [D, h, w] of image ``i`` from a store of maps, as float32."""
        return decode_map(self.arrays(i), device)

    def part(self, places: Iterable[int]) -> StoreReader:
        """Return a small reader of the records of some rows, for another process."""
        part = copy.copy(self)
        if isinstance(self.directory, Path):
            part.directory = Path(os.path.abspath(self.directory))
        part._names = {i: self._names[i] for i in places}
        listed = part._names.values()
        part._records = {name: self._records[name] for name in listed if name in self._records}
        part.global_descriptors = self.global_descriptors[:0]
        return part

    def size(self, i: int) -> int:
        """Return the size of the record of image ``i`` in bytes; 0 if there is none."""
        record = self._records.get(self._names[i])
        return record.bytes if record is not None else 0
