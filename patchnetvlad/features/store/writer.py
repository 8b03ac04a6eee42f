# SPDX-License-Identifier: MIT
"""Appending records to a store, with commits that survive crashes, and resuming."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import atomic_file, drop_link, sync_folder, time_stamp
from patchnetvlad.base.names import normal_name
from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.errors import FeatureError, OtherFeaturesError
from patchnetvlad.features.interface import Written
from patchnetvlad.features.manifest import (
    GLOBAL_FILE,
    INDEX_FILE,
    SHARD_FILES,
    Manifest,
    erase,
    stored_bytes,
)
from patchnetvlad.features.names import disk_errors, rows_by_name, unfinished_error, write_error
from patchnetvlad.features.npy_files import load_global_descriptors
from patchnetvlad.features.store.index import Record, Statements, StoreIndex, shard_file
from patchnetvlad.features.store.records import read_record
from patchnetvlad.features.store.shard_writer import WRITE_FLAGS, ShardWriter, append_record
from patchnetvlad.features.store.share import ShareFolder

SHARD_BYTES = 2**30
"""Size at which a new shard is started."""

COMMIT_BYTES = 64 * 2**20
"""A program that writes many records commits after about this many bytes."""


class StoreWriter:
    """Appends records to a feature store, and resumes an interrupted run.

    Parameters
    ----------
    directory : Path
    names : sequence of str
        The image list.
    manifest : Manifest
        An existing store may be of another list, but of the same settings.
    image_paths : sequence of Path or str, optional
        Where the images are: features older than their image are not reused. The age of a URL is
        not known.
    resume : bool, default True
        False replaces what is there.

    Attributes
    ----------
    done : ndarray [N] of bool
        Images whose features are on disk.
    records : dict of str to Record
        Where features are, by name; also of images that are not in the list.

    Raises
    ------
    FeatureError
        The store is damaged, or an index of places with another list.
    """

    index_file = INDEX_FILE
    durable = allows_failures = True

    def __init__(
        self,
        directory: Path,
        names: Sequence[str],
        manifest: Manifest,
        image_paths: Sequence[Path | str] | None = None,
        resume: bool = True,
    ) -> None:
        self.directory = directory
        self.names = [normal_name(name) for name in names]
        self.manifest = manifest
        self.location: Path | RemoteFolder = directory
        self.replaced_bytes = 0 if resume else stored_bytes(directory)
        self.done = np.zeros(len(names), dtype=bool)
        self._rows_of = rows_by_name(names)
        # Read before any image is: one that changes meanwhile is extracted again in the next run.
        self._modified = [time_stamp(path) for path in image_paths or ()] or [0] * len(names)
        self.records: dict[str, Record] = {}
        self._stale: list[str] = []
        self._pending: list[tuple[str, Record]] = []
        self._also: list[tuple[str, Sequence[Any]]] = []
        self._other_list = False  # in the index
        self._index: StoreIndex | ShareFolder | None = None
        self._file: int | None = None
        self._first_shard, self._shard_step = 0, 1
        self._shard = self._end = 0
        self._last_part: int | None = None
        if resume and (directory / self.index_file).is_file():
            self._look()

    def _look(self) -> None:
        """Find the records that can be reused."""
        with contextlib.closing(self._open_index()) as index:
            records = index.records()
            if isinstance(index, StoreIndex):
                self._other_list = index.names() != self.names
                if self._other_list and index.has_places:
                    raise OtherFeaturesError(
                        f"{self.directory} holds an index of places, which is not of this list; "
                        "name another --output_features_dir, or give --no-resume to replace it"
                    )
        sizes = self._shard_sizes()
        for name, record in records.items():
            size = sizes.get(shard_file(self.directory, record.shard).name, 0)
            rows = self._rows_of.get(name, [])
            whole = record.start + record.bytes <= size
            if whole and (not rows or self._modified[rows[0]] in (0, record.modified)):
                self.records[name] = record
                self.done[rows] = True
            else:
                self._stale.append(name)

    def _shard_sizes(self) -> dict[str, int]:
        """Return the bytes of each shard by the name of its file."""
        return {file.name: file.stat().st_size for file in self.directory.glob(SHARD_FILES)}

    def start(self) -> None:
        """Open the store; delete what is to be replaced and what was never committed."""
        with disk_errors(self.directory):
            (self.directory / GLOBAL_FILE).unlink(missing_ok=True)
            if not self.records:
                erase(self.directory)
                self._index = self._create_index()
            else:
                self._index = self._open_index(writable=True)
                self._index.remove(self._stale)
                self._index.failed = {}
                if self._other_list and isinstance(self._index, StoreIndex):
                    self._index.set_list(self.names, self.manifest)
                    self._other_list = False
            self._delete_unused_shards()
            self._shard = max(self._shards_in_use(), default=self._first_shard)
            lasts = (r for r in self.records.values() if r.shard == self._shard)
            self._end = max((r.start + r.bytes for r in lasts), default=0)

    @property
    def last_shard(self) -> int:
        """The largest number of an existing shard, of any writer; -1 if there is none."""
        numbers = [Path(name).stem.rpartition("-")[2] for name in self._shard_sizes()]
        return max((int(number) for number in numbers if number.isdigit()), default=-1)

    def _delete_unused_shards(self) -> None:
        """Delete shards without valid records."""
        used = {shard_file(self.directory, shard) for shard in self._shards_in_use()}
        for file in set(self.directory.glob(SHARD_FILES)) - used:
            file.unlink(missing_ok=True)  # a worker that fails deletes its own

    def _shards_in_use(self) -> set[int]:
        return {record.shard for record in self.records.values()}

    def _create_index(self) -> StoreIndex | ShareFolder:
        return StoreIndex.create(self.directory, self.names, self.manifest)

    def _open_index(self, writable: bool = False) -> StoreIndex | ShareFolder:
        return StoreIndex(self.directory, writable)

    def _open_shard(self, shard: int, end: int) -> int:
        self._close_shard()
        if end == 0:
            drop_link(shard_file(self.directory, shard))
        self._file = os.open(shard_file(self.directory, shard), WRITE_FLAGS, 0o666)
        os.ftruncate(self._file, end)
        self._shard, self._end = shard, end
        sync_folder(self.directory)
        return self._file

    def _close_shard(self) -> None:
        if self._file is not None:
            descriptor, self._file = self._file, None
            os.close(descriptor)

    def write(
        self, i: int, descriptor: NDArray[np.float32], arrays: Sequence[Any], modified: int = 0
    ) -> None:
        """Append the record of image ``i``, which counts once it is committed.

        Parameters
        ----------
        i : int
            Row in the image list.
        descriptor : ndarray [P] of float32
            Global descriptor.
        arrays : sequence of ndarray
            From :func:`encode_patches` or :func:`encode_map`.
        modified : int, default 0
            Time stamp of the image, ns, where ``image_paths`` do not give it.

        Raises
        ------
        FeatureError
            The disk is full, or cannot be written; what was written before is kept.
        """
        if self._index is None:
            self.start()
        if self._end >= SHARD_BYTES:
            self.commit()
            with disk_errors(self.directory):
                self._open_shard(self._shard + self._shard_step, 0)
        file = self._file
        if file is None:
            with disk_errors(self.directory):
                file = self._open_shard(self._shard, self._end)
        where = self._shard, self._end, self._modified[i] or modified
        try:
            record = append_record(file, where, descriptor, arrays)
        except OSError as error:
            # Keep whole records; the space of the partial one lets the index grow.
            with contextlib.suppress(OSError, FeatureError):
                os.ftruncate(file, self._end)
                self.commit()
            raise write_error(self.directory, error.strerror or error) from None
        self._pending.append((self.names[i], record))
        self._end += record.bytes

    def part(self, rows: Sequence[int]) -> ShardWriter:
        """Return the writer of a new shard, for another process."""
        self._last_part = (self.last_shard if self._last_part is None else self._last_part) + 1
        names = {i: self.names[i] for i in rows}
        return self._part(self._last_part, names, {i: self._modified[i] for i in rows})

    def _part(
        self, shard: int, names: Mapping[int, str], modified: Mapping[int, int]
    ) -> ShardWriter:
        return ShardWriter(Path(os.path.abspath(self.directory)), shard, names, modified)

    def adopt(self, written: Written) -> None:
        """Enter in the index what another process has written to a shard."""
        assert self._index is not None
        self._index.add(written.records)
        self._count(written.records)

    def adopt_shard(self, file: Path, records: Sequence[tuple[str, Record]]) -> bool:
        """Move a shard with these records here; see :class:`Writer`."""
        target = self.directory / file.name
        if target.exists() or file.stat().st_dev != self.directory.stat().st_dev:
            return False
        self.commit()
        assert self._index is not None
        # First: records without their shard do not count, but a shard without them is deleted.
        self._index.add(records)
        with disk_errors(self.directory):
            os.replace(file, target)
        for folder in (self.directory, file.parent):
            sync_folder(folder)
        self._count(records)
        self._close_shard()
        self._shard, self._end = max(self._shards_in_use()) + 1, 0  # of what is written next
        return True

    def holds(self, i: int, record: Record) -> bool:
        """Return True if there is this record of image ``i``, or a newer one."""
        have = self.records.get(self.names[i])
        if have is None:
            return False
        same = (have.arrays, have.crc32) == (record.arrays, record.crc32)
        return same or have.modified > record.modified

    def _count(self, records: Sequence[tuple[str, Record]]) -> None:
        for name, record in records:
            self.records[name] = record
            self.done[self._rows_of[name]] = True

    def append(
        self,
        name: str,
        descriptor: NDArray[np.float32],
        arrays: Sequence[Any],
        also: Statements = (),
        modified: int = 0,
    ) -> None:
        """Add an image to the list, and write its record; see :meth:`write`.

        Parameters
        ----------
        name : str
            Of an image that is not yet in the list.
        descriptor, arrays, modified
            As for :meth:`write`.
        also : sequence of (str, sequence)
            SQL statements with their values, in the same transaction as the record.
        """
        if self._index is None:
            self.start()
        name, row = normal_name(name), len(self.names)
        self.names.append(name)
        self._modified.append(0)
        try:
            self.write(row, descriptor, arrays, modified)
        except BaseException:
            del self.names[row], self._modified[row]
            raise
        self.done = np.append(self.done, False)
        self._rows_of[name] = [row]
        self._also += [("INSERT INTO images VALUES (?, ?)", (row, name)), *also]

    def commit(self) -> None:
        """Flush everything written to the disk, then enter it in the index."""
        if not self._pending:
            return
        assert self._index is not None
        assert self._file is not None
        # Not retried: after a failure the system believes that the lost pages were written.
        pending, self._pending = self._pending, []
        also, self._also = self._also, []
        with disk_errors(self.directory):
            os.fsync(self._file)
        self._index.add(pending, also)
        self._count(pending)

    def finish(self, failed: Mapping[str, str] | None = None, modified: int = 0) -> None:
        """Write ``globalfeats.npy`` from the records.

        Parameters
        ----------
        failed : mapping of str to str, optional
            Images that will have no features: reason by name. The index keeps it, and the rows of
            these images are not finite.
        modified : int, default 0
            Not used: records have the time stamps of their images.

        Raises
        ------
        FeatureError
            Other images are missing, or a record is damaged.
        """
        if self._index is None and self._other_list:
            self.start()
        self.commit()
        failed = {name: why for name, why in (failed or {}).items() if name not in self.records}
        missing = sum(len(p) for name, p in self._rows_of.items() if name not in failed)
        missing -= int(self.done.sum())
        if missing or not self.records:
            raise unfinished_error(self.directory, missing)
        if self._index is not None:
            self._delete_unused_shards()  # of processes that were killed
            self._index.failed = failed
        with contextlib.suppress(FeatureError):
            rows = {i for name in failed for i in self._rows_of.get(name, ())}
            load_global_descriptors(self.directory, self.names, rows)
            return
        head = next(iter(self.records.values())).head
        with disk_errors(self.directory), atomic_file(self.directory / GLOBAL_FILE) as file:
            shape = (len(self.names), head // 4)
            about = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, about)
            with ThreadPoolExecutor(_HEAD_READERS) as pool:
                # Few at a time: these are gigabytes.
                for start in range(0, len(self.names), _HEADS):
                    part = self.names[start : start + _HEADS]
                    file.writelines(pool.map(partial(self._head, head), part))
            file.flush()
            os.fsync(file.fileno())

    def global_descriptors(self) -> NDArray[np.float32]:
        """Map ``globalfeats.npy`` [N, P] into memory; what is changed there stays there."""
        rows: NDArray[np.float32] = np.load(self.directory / GLOBAL_FILE, mmap_mode="c")
        return rows

    def _head(self, size: int, name: str) -> bytes | bytearray:
        """Return the bytes of a global descriptor; NaN for an image that has none."""
        record = self.records.get(name)
        if record is None:
            return np.full(size // 4, np.nan, "<f4").tobytes()
        return read_record(self.directory, record, name, head=True)

    def close(self) -> None:
        """Close the files."""
        self._close_shard()
        if self._index is not None:
            self._index.close()
            self._index = None


_HEADS, _HEAD_READERS = 1024, 16
