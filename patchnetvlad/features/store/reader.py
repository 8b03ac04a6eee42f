# SPDX-License-Identifier: MIT
"""Reading features from records, and those of an image list from a store."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.names import absolute, locate, normal_name
from patchnetvlad.base.text import one_line, parse_json
from patchnetvlad.config import Config
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.interface import Reader
from patchnetvlad.features.manifest import GLOBAL_FILE, INDEX_FILE, check_settings
from patchnetvlad.features.npy_files import load_global_descriptors
from patchnetvlad.features.store.codec import Arrays, split_record
from patchnetvlad.features.store.index import Record, StoreIndex
from patchnetvlad.features.store.records import (
    RecordError,
    feature_folder,
    is_head,
    local_copy,
    read_record,
)


class RecordReader(Reader):
    """Reads records of shards, on a disk or in object storage."""

    @abstractmethod
    def find(self, i: int) -> tuple[str, Record]:
        """Return the name of image ``i``, and where its record is; FeatureError if nowhere."""

    def read(self, i: int) -> tuple[NDArray[np.float32], Arrays]:
        """Read a record."""
        name, record = self.find(i)
        buffer = read_record(self.directory, record, name)
        descriptor, *arrays = split_record(buffer, record.arrays)
        return descriptor, arrays

    def arrays(self, i: int) -> Arrays:
        """Read a record."""
        return self.read(i)[1]

    def descriptor(self, i: int) -> NDArray[np.float32]:
        """Read the head of a record."""
        name, record = self.find(i)
        return np.frombuffer(read_record(self.directory, record, name, head=True), np.float32)

    def shapes(self, i: int) -> list[Sequence[int]]:
        """Return the shapes in the index."""
        name, record = self.find(i)
        try:
            return [[*map(int, shape)] for _, shape in parse_json(record.arrays)[1:]]
        except (ValueError, TypeError, LookupError) as error:
            raise FeatureError(
                f"{self.directory}: the record of {name} is damaged ({one_line(error)}); "
                "patchnetvlad-store verify --drop takes it out"
            ) from None

    def size(self, i: int) -> int:
        """Return the bytes of the record."""
        return self.find(i)[1].bytes

    def modified(self, i: int) -> int:
        """Return the time stamp in the index."""
        return self.find(i)[1].modified


class StoreReader(RecordReader):
    """Reads a feature store, from a disk or from object storage.

    Parameters
    ----------
    directory : str or Path
        Or a URL, such as ``s3://bucket/prefix``. From there, the index and the global descriptors
        are fetched at once, and records when they are read.
    names : sequence of str, optional
        Images of the list that the features were extracted from, in any order; by default that
        list, which need not be finished then.
    config : Config, optional
        The configuration for matching, whose patch sizes are given; by default all.
    dataset_root : str or Path, default ""
        Folder that relative names lie under.

    Raises
    ------
    FeatureError
        The store is unfinished or damaged, is a share of an extraction, or was made from another
        list or configuration.
    RemoteError
        Object storage cannot be reached.
    """

    def __init__(
        self,
        directory: str | Path,
        names: Sequence[str] | None = None,
        config: Config | None = None,
        dataset_root: str | Path = "",
    ) -> None:
        self.directory = feature_folder(directory)
        with contextlib.ExitStack() as stack:
            if isinstance(self.directory, Path):
                folder = self.directory
            else:
                files = [INDEX_FILE, GLOBAL_FILE]
                folder = stack.enter_context(local_copy(self.directory, files))
            index = stack.enter_context(contextlib.closing(StoreIndex(folder)))
            stack.enter_context(index.snapshot())
            self.manifest = index.manifest
            self.kind, self.failed = self.manifest.local_features, index.failed
            self.stored_sizes = self.patch_sizes = self.manifest.patch_sizes
            listed, records = index.names(), index.records()
            if names is not None:
                failed = {i for i, name in enumerate(listed) if name in self.failed}
                self.global_descriptors = load_global_descriptors(folder, listed, failed)
                self._check_heads(listed, records)
                self.chosen = self._choose(listed, names, dataset_root)
            if config is not None:
                check_settings(self.directory, self.manifest, config)
                self.patch_sizes = config.patch_sizes
        if self.chosen is not None:
            self.global_descriptors = self.global_descriptors[self.chosen]
            listed = [listed[i] for i in self.chosen]
            mine = set(listed)
            self.failed = {name: why for name, why in self.failed.items() if name in mine}
        self.names: Sequence[str] | Mapping[int, str] = listed
        self._records: Sequence[Record | None] | Mapping[int, Record | None] = [
            records.get(name) for name in listed
        ]

    def _check_heads(self, listed: Sequence[str], records: Mapping[str, Record]) -> None:
        """Raise FeatureError unless global descriptors [N, P] are those of the records."""
        pairs = zip(listed, self.global_descriptors, strict=True)
        other = [n for n, row in pairs if n in records and not is_head(row, records[n])]
        for name in other:
            with contextlib.suppress(RecordError):  # said when it is read
                read_record(self.directory, records[name], name, head=True)
                raise FeatureError(
                    f"{self.directory}: {GLOBAL_FILE} is not that of the records, as {name}; "
                    "delete it, and run feature_extract again, which writes it again"
                )

    def _choose(
        self, listed: Sequence[str], names: Sequence[str], root: str | Path
    ) -> NDArray[np.int64] | None:
        """Return the rows of the store's list that are meant; None for all, in order."""
        assert self.manifest is not None
        wanted = [normal_name(name) for name in names]
        if wanted == listed or self.manifest.lists(names, root):  # by other names, perhaps
            return None
        row_of = {name: i for i, name in reversed(list(enumerate(listed)))}
        if not set(wanted) <= row_of.keys() and (self.manifest.root or root):
            base = self.manifest.root
            row_of |= {absolute(locate(base, name)): row_of[name] for name in listed}
            wanted = [name if name in row_of else absolute(locate(root, name)) for name in wanted]
        missing = [name for name, key in zip(names, wanted, strict=True) if key not in row_of]
        if missing:
            raise FeatureError(
                f"{self.directory} has no features of {len(missing)} of {len(names)} images, as "
                f"{missing[0]}; run feature_extract with this list: it computes what is missing"
            )
        return np.array([row_of[name] for name in wanted], dtype=np.int64)

    def find(self, i: int) -> tuple[str, Record]:
        """Look up a record of the index."""
        record = self._records[i]
        if record is None:
            raise FeatureError(
                f"{self.directory} has no features of {self.names[i]}; run feature_extract again, "
                "it computes what is missing"
            )
        return self.names[i], record

    def size(self, i: int) -> int:
        """Return the bytes of the record; 0 if there is none."""
        record = self._records[i]
        return record.bytes if record is not None else 0

    def part(self, rows: Iterable[int]) -> StoreReader:
        """Return a reader of some records."""
        part = super().part(rows := list(rows))
        assert isinstance(part, StoreReader)
        part._records = {i: self._records[i] for i in rows}
        return part
