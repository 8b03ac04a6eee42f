# SPDX-License-Identifier: MIT
"""Sources of a conversion: features read image by image, whatever their layout."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.base.device import choose_device, choose_precision, describe_device
from patchnetvlad.config import Config
from patchnetvlad.config_ini import PRECISIONS
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.manifest import GLOBAL_FILE, MANIFEST_FILE, Manifest, check_checkpoint
from patchnetvlad.features.npy_files import NpyReader, map_array, patch_file, read_manifest
from patchnetvlad.features.store.codec import Arrays, decode_patches, encode_patches, split_record
from patchnetvlad.features.store.index import StoreIndex
from patchnetvlad.features.store.records import read_record
from patchnetvlad.features.store.shard_writer import time_stamp
from patchnetvlad.models.describer import Describer
from patchnetvlad.models.grid import count_patches

logger = logging.getLogger(__name__)

Features = tuple[NDArray[np.float32], Arrays]


class Source(ABC):
    """Features of a list of images.

    Attributes
    ----------
    path : Path
    manifest : Manifest
        Describes the patches as they are read, also those computed from a store of maps.
    names : sequence of str
    kind : str
        Kind of the arrays that are read, as for
        :func:`~patchnetvlad.features.store.codec.encode_patches`.
    dimension : int
        P.
    """

    path: Path
    manifest: Manifest
    names: Sequence[str]
    kind: str
    dimension: int

    @abstractmethod
    def counts(self, i: int) -> list[int]:
        """Return n_s of each patch size of image ``i``, without reading them."""

    @abstractmethod
    def read(self, i: int) -> Features:
        """Read the global descriptor [P] and the patches of image ``i``."""

    @abstractmethod
    def modified(self, i: int) -> int:
        """Return the time stamp of the image that was extracted, ns; 0 if it is not known."""

    def close(self) -> None:  # noqa: B027
        """Close the files."""

    def read_as(self, i: int, kind: str) -> Features:
        """Read the features of image ``i`` in another kind; FeatureError if they do not fit."""
        descriptor, arrays = self.read(i)
        expected = self.manifest.patch_counts()
        by_size = arrays[1:] if self.kind == "int8" else arrays  # scales come first
        for size, patches in zip(self.manifest.patch_sizes, by_size, strict=True):
            if len(patches) != expected.get(size, len(patches)):
                height, width = self.manifest.image_size
                raise FeatureError(
                    f"{self.path}: {self.names[i]} has {len(patches)} patches of size {size}; "
                    f"images of {height} x {width} px (height x width) have {expected[size]}. Are "
                    "image size, patch_sizes and strides those that it was extracted with?"
                )
            if patches.shape[1] != len(descriptor):
                raise FeatureError(
                    f"{self.path}: patches of {self.names[i]} are of dimension "
                    f"{patches.shape[1]}, its global descriptor of {len(descriptor)}"
                )
        if self.kind != kind:
            arrays = encode_patches(decode_patches(arrays, self.kind), kind)
        return descriptor, arrays


class StoreSource(Source):
    """Reads a store; FeatureError unless it has all images."""

    def __init__(self, path: Path) -> None:
        with contextlib.closing(StoreIndex(path)) as index:
            self._stored, records, failed = index.names(), index.records(), index.failed
        missing = [name for name in dict.fromkeys(self._stored) if name not in records]
        if missing and set(missing) <= set(failed):
            raise FeatureError(
                f"{path} has no features of {len(missing)} images that failed, as {missing[0]} "
                f"({failed[missing[0]]}); repair them and run feature_extract again, or extract a "
                "list without them"
            )
        if missing:
            raise FeatureError(
                f"{path} has no features yet of {len(missing)} of {len(self._stored)} images, as "
                f"{missing[0]}; run feature_extract again, it computes what is missing"
            )
        self._records = [records[name] for name in self._stored]
        self.path, self.manifest, self.names = path, index.manifest, self._stored
        self.kind = self.manifest.local_features
        self.dimension = self._records[0].head // 4

    def shapes(self, i: int) -> list[list[int]]:
        """Return the shapes of the arrays of image ``i``, without its global descriptor."""
        return [shape for _, shape in json.loads(self._records[i].arrays)[1:]]

    def counts(self, i: int) -> list[int]:
        """Count patches by the shapes in the index."""
        return [shape[0] for shape in self.shapes(i) if len(shape) == 2]  # 1: scales of int8

    def read(self, i: int) -> Features:
        """Read a record."""
        record = self._records[i]
        buffer = read_record(self.path, record, self._stored[i])
        descriptor, *arrays = split_record(buffer, record.arrays)
        return descriptor, arrays

    def modified(self, i: int) -> int:
        """Return the time stamp in the index."""
        return self._records[i].modified


class MapSource(StoreSource):
    """Computes patches from a store of feature maps; loads the model at the first."""

    def __init__(self, path: Path, config: Config | None, device: str) -> None:
        super().__init__(path)
        if config is None:
            raise FeatureError(
                f"{path} holds feature maps, of which patches are computed: give --config_path, "
                "the configuration that they were extracted with"
            )
        if not config.uses_patches:
            raise FeatureError(
                f"{config.source} has pooling = {config.pooling}, without patches; name a "
                "configuration with pooling = patchnetvlad to convert feature maps"
            )
        check_checkpoint(path, self.manifest, config)
        self._config, self._device = config, choose_device(device)
        precision = choose_precision(config.precision, self._device)
        self.kind = "float32"
        self.manifest = replace(
            self.manifest,
            patch_sizes=list(config.patch_sizes),
            strides=list(config.strides),
            patch_vlad=config.patch_vlad,
            precision=max(precision, self.manifest.precision, key=PRECISIONS.index),
            rounded="map",
        )

    @functools.cached_property
    def _describer(self) -> Describer:
        precision = choose_precision(self._config.precision, self._device)
        logger.info("computing on %s, %s", describe_device(self._device), precision)
        return Describer.load(self._config, self._device)

    def counts(self, i: int) -> list[int]:
        """Count the patches that fit on the map."""
        ((_, *shape),) = self.shapes(i)
        return count_patches(shape, self.manifest.patch_sizes, self.manifest.strides)

    def read(self, i: int) -> Features:
        """Read a record, and compute its patches."""
        descriptor, (feature_map,) = super().read(i)
        on_device = torch.from_numpy(feature_map).to(self._device).float()
        return descriptor, encode_patches(self._describer.patches(on_device), "float32")


class NpySource(Source):
    """Reads ``.npy`` files of this package or of the research code.

    Parameters
    ----------
    path : Path
    images : ImageList or None
        FeatureError without.
    config : Config or None
        What they were made with; FeatureError without, if the files do not say it.
    root : str or Path or None
        Folder that the images lie under, whose time stamps are looked up then.
    """

    kind = "npy"

    def __init__(
        self,
        path: Path,
        images: ImageList | None,
        config: Config | None,
        root: str | Path | None,
    ) -> None:
        if images is None:
            raise FeatureError(
                f"{path} holds .npy files, which do not say the names of all images: give "
                "--dataset_file_path, the list that they were extracted from"
            )
        manifest = read_manifest(path / MANIFEST_FILE)
        if manifest is None:
            if config is None:
                raise FeatureError(
                    f"{path} holds features of the research code, which do not say what they were "
                    "made with: give --config_path, the configuration that they were extracted with"
                )
            made_with = replace(config, local_features="npy", patch_vlad="integral")
            # The checkpoint is unknown; an empty hash is skipped when matching.
            manifest = Manifest.of(made_with, images.names, checkpoint="", root=root or "")
        self.path, self.manifest, self.names = path, manifest, images.names
        self._reader = NpyReader(path, images.names, manifest.to_config(path), root or "")
        self._paths = None if root is None else images.image_locations(root)
        self.dimension = self._reader.global_descriptors.shape[1]
        if manifest.num_pcs not in (0, self.dimension):
            raise FeatureError(
                f"{path / GLOBAL_FILE} has descriptors of dimension {self.dimension}; num_pcs is "
                f"{manifest.num_pcs} in {config.source if config else path / MANIFEST_FILE}"
            )

    def _files(self, i: int) -> list[Path]:
        return [
            patch_file(self.path, "patchfeats", size, self.names[i], self._reader.naming)
            for size in self.manifest.patch_sizes
        ]

    def counts(self, i: int) -> list[int]:
        """Count patches by the heads of their files."""
        try:
            return [map_array(file).shape[1] for file in self._files(i)]
        except FeatureError:  # reported when it is read
            return []

    def read(self, i: int) -> Features:
        """Read the files."""
        patches: list[Any] = self._reader.patches(i) if self.manifest.patch_sizes else []
        return self._reader.global_descriptors[i], [patch.numpy() for patch in patches]

    def modified(self, i: int) -> int:
        """Return the time stamp of the image, unless it has changed since."""
        if self._paths is None:
            return 0
        stamp = time_stamp(self._paths[i])
        files = self._files(i) or [self.path / GLOBAL_FILE]
        return stamp if stamp <= min(map(time_stamp, files)) else 0
