# SPDX-License-Identifier: MIT
"""Writing features in the layout of the research code, and resuming an interrupted run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import (
    atomic_file,
    remove_leftovers,
    set_time_stamp,
    sync_folder,
    write_all,
)
from patchnetvlad.base.names import normal_name
from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.interface import Written
from patchnetvlad.features.manifest import (
    GLOBAL_FILE,
    MANIFEST_FILE,
    Manifest,
    erase,
    read_manifest,
    stored_bytes,
)
from patchnetvlad.features.names import (
    check_shared_folder,
    disk_errors,
    rows_by_name,
    unfinished_error,
)
from patchnetvlad.features.npy_files import (
    check_unique,
    load_array,
    map_array,
    patch_file,
    rows_crc32,
    save_array,
)
from patchnetvlad.features.store.index import Record
from patchnetvlad.features.store.records import is_head

Array = NDArray[np.float32]


class NpyWriter:
    """Writes ``.npy`` files, and resumes an interrupted run.

    Patch files come first; then the image's row of ``globalfeats.npy.part``. A finite row
    therefore marks a finished image. :meth:`finish` renames the file to its final name.

    Parameters
    ----------
    directory : Path
    names : sequence of str
        The image list.
    manifest : Manifest
    image_paths : sequence of Path or str, optional
        Where the images are: features older than their image are not reused. The age of a URL is
        not known.
    resume : bool, default True
        False replaces what is there.

    Attributes
    ----------
    done : ndarray [N] of bool
        Images whose features are on disk.
    durable : bool
        Whether what is committed survives a power failure, too, which takes longer; False at
        first.

    Raises
    ------
    FeatureError
        Two images would share a file.
    """

    allows_failures = False  # files have no place for a reason

    def __init__(
        self,
        directory: Path,
        names: Sequence[str],
        manifest: Manifest,
        image_paths: Sequence[Path | str] | None = None,
        resume: bool = True,
    ) -> None:
        if manifest.patch_sizes:
            check_unique(names, manifest.naming)
        self.directory = directory
        self.names = names
        self.manifest = manifest
        self.image_paths = image_paths
        self.location: Path | RemoteFolder = directory
        self.replaced_bytes = 0 if resume else stored_bytes(directory)
        self.done = np.zeros(len(names), dtype=bool)
        self._rows_of = rows_by_name(names)
        self._finished = directory / GLOBAL_FILE
        self._finished_manifest = directory / MANIFEST_FILE
        self._partial = directory / f"{GLOBAL_FILE}.part"
        self._partial_manifest = directory / f"{MANIFEST_FILE}.part"
        self._continued = manifest  # of an earlier run; equal except for its rounding
        self._rows: Array | None = None  # of an earlier run
        self._file: IO[bytes] | None = None  # the partial one
        self._start = 0  # of its rows
        self._resumed = False
        self.durable = False
        self._folders: set[Path] = set()  # below the directory, with files not yet committed
        if resume:
            self._look()

    def _look(self) -> None:
        """Find what an earlier run has left here."""
        files = (self._finished_manifest, self._partial_manifest)
        have = [manifest for manifest in map(read_manifest, files) if manifest is not None]
        if not have or any(manifest != self.manifest for manifest in have):
            return
        self._continued = have[0]
        for file in (self._finished, self._partial):
            self._rows = self._read_rows(file)
            if self._rows is not None:
                self._resumed = file == self._partial
                return

    def _read_rows(self, file: Path) -> Array | None:
        """Read global descriptors, and mark their images as done; None if they cannot be used."""
        try:
            rows = load_array(file)
        except FeatureError:
            return None
        if len(rows) != len(self.names):
            return None
        for i in np.flatnonzero(np.isfinite(rows).all(axis=1)).tolist():
            self.done[i] = self._is_current(i, file)
        return rows

    def _is_current(self, i: int, file: Path) -> bool:
        """Return True if the files of image ``i`` are complete and not older than the image."""
        files = [self._patch_file(i, size) for size in self.manifest.patch_sizes]
        try:
            for patches in files:
                map_array(patches)  # raises if it is truncated
            oldest = min(path.stat().st_mtime_ns for path in files or [file])
            image = self.image_paths[i] if self.image_paths is not None else ""
            return isinstance(image, str) or image.stat().st_mtime_ns <= oldest
        except (FeatureError, OSError):
            return False

    def _patch_file(self, i: int, size: int) -> Path:
        return patch_file(self.directory, "patchfeats", size, self.names[i], self.manifest.naming)

    def _open(self, dimension: int) -> IO[bytes]:
        """Create the partial file from existing rows, and delete finished features."""
        rows = self._rows
        if rows is None or rows.shape[1] != dimension:
            rows = np.empty((len(self.names), dimension), dtype=np.float32)
            self.done[:] = False
        manifest = self._continued
        if not self.done.any():
            erase(self.directory)
            manifest = self.manifest
        rows[~self.done] = np.nan
        if manifest.naming == "path":
            remove_leftovers(self.directory, below=True)
        save_array(self._partial, rows)
        with atomic_file(self._partial_manifest) as stream:
            stream.write(manifest.to_json().encode())
        # In this order: rows without a manifest would pass for those of the research code.
        self._finished.unlink(missing_ok=True)
        self._finished_manifest.unlink(missing_ok=True)
        self._rows, self._resumed = None, True
        self._start = self._partial.stat().st_size - rows.nbytes
        # No memory map: that is a bus error where the disk is full.
        return self._partial.open("r+b", buffering=0)

    def start(self) -> None:
        """Do nothing: features that are to be replaced are deleted at the first write."""

    def commit(self) -> None:
        """Do nothing unless ``durable``: files are complete as soon as they have their names."""
        if self.durable and self._file is not None:
            with disk_errors(self.directory):
                os.fsync(self._file.fileno())
            for folder in self._folders:
                sync_folder(self.directory / folder)
            sync_folder(self.directory)
            self._folders.clear()

    def close(self) -> None:
        """Close the partial file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(
        self, i: int, descriptor: Array, arrays: Sequence[NDArray[Any]], modified: int = 0
    ) -> None:
        """Write the features of image ``i``, for every row of the list that names it.

        Parameters
        ----------
        i : int
            Row in the image list.
        descriptor : ndarray [P]
            Global descriptor.
        arrays : sequence of ndarray [n_s, P]
            Patch descriptors, one array per patch size.
        modified : int, default 0
            Time stamp of the image, ns, of features that were computed before. The files get it,
            since their own time stamps say how old the features are.

        Raises
        ------
        FeatureError
            The disk is full, or the directory cannot be written.
        """
        row = np.ascontiguousarray(descriptor, dtype=np.float32)
        with disk_errors(self.directory):
            if self._file is None:
                self._file = self._open(len(row))
            files = write_patch_files(
                self.directory,
                self.manifest,
                self._listed(i),
                arrays,
                modified,
                sync=self.durable,
            )
        for file in files if self.durable else ():
            self._folders.update(file.relative_to(self.directory).parents)
        self._write_row(i, row)

    def part(self, rows: Sequence[int]) -> PatchFiles:
        """Return a writer of the patch files of the images in these rows."""
        listed = {i: self._listed(i) for i in rows}
        return PatchFiles(Path(os.path.abspath(self.directory)), self.manifest, listed)

    def _listed(self, i: int) -> list[str]:
        return [self.names[j] for j in self._rows_of[normal_name(self.names[i])]]

    def adopt(self, written: Written) -> None:
        """Write the global descriptors of images whose patch files exist already."""
        for i, descriptor in written.descriptors.items():
            self._write_row(i, descriptor)

    def adopt_shard(self, file: Path, records: Sequence[tuple[str, Record]]) -> bool:
        """Return False: the records of shards have to be written as files."""
        return False

    def holds(self, i: int, record: Record) -> bool:
        """Return True if the global descriptor of image ``i`` is that of a record.

        To be asked before the first image is written.
        """
        if self._rows is None or not self.done[self._rows_of[normal_name(self.names[i])]].all():
            return False
        return is_head(self._rows[i], record)

    def _write_row(self, i: int, descriptor: Array) -> None:
        listed = self._rows_of[normal_name(self.names[i])]
        row = np.ascontiguousarray(descriptor, dtype=np.float32)
        with disk_errors(self.directory):
            if self._file is None:
                self._file = self._open(len(row))
            for j in listed:
                self._file.seek(self._start + j * row.nbytes)
                write_all(self._file.fileno(), row)
        self.done[listed] = True

    def finish(self, failed: Mapping[str, str] | None = None, modified: int = 0) -> None:
        """Give the finished files their final names.

        Parameters
        ----------
        failed : mapping of str to str, optional
            Not used.
        modified : int, default 0
            Time stamp of the newest image, ns, for ``globalfeats.npy``.

        Raises
        ------
        FeatureError
            Images are missing.
        """
        self.close()
        if not self.done.all():
            raise unfinished_error(self.directory, int((~self.done).sum()))
        with disk_errors(self.directory):
            if self._resumed:
                os.replace(self._partial, self._finished)
            if self._partial_manifest.is_file():
                self._finish_manifest()
            self._partial.unlink(missing_ok=True)  # of a run killed as it began to replace these
            set_time_stamp(self._finished, modified)
            if self.durable:
                sync_folder(self.directory)
        self._resumed = False

    def _finish_manifest(self) -> None:
        """Give the manifest its final name, with the checksum of the global descriptors."""
        manifest = replace(
            read_manifest(self._partial_manifest) or self.manifest,
            global_crc32=rows_crc32(self.global_descriptors()),
        )
        with atomic_file(self._finished_manifest) as stream:
            stream.write(manifest.to_json().encode())
        self._partial_manifest.unlink()

    def global_descriptors(self) -> Array:
        """Map ``globalfeats.npy`` [N, P] into memory; what is changed there stays there."""
        rows: Array = np.load(self._finished, mmap_mode="c")
        return rows


class PatchFiles:
    """Writes the ``.npy`` files of patches for a :class:`NpyWriter` of another process.

    Parameters
    ----------
    directory : Path
    manifest : Manifest
    listed : mapping of int to sequence of str
        The names of each image in the list, by its row.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, listed: Mapping[int, Sequence[str]]
    ) -> None:
        self._directory, self._manifest, self._listed = directory, manifest, listed
        self._written = Written()

    def start(self) -> None:
        """Make sure that there is the directory."""
        check_shared_folder(self._directory)

    def write(
        self, i: int, descriptor: Array, arrays: Sequence[NDArray[Any]], modified: int = 0
    ) -> None:
        """Write the patches of image ``i``, and keep its row; see :meth:`NpyWriter.write`."""
        with disk_errors(self._directory):
            write_patch_files(self._directory, self._manifest, self._listed[i], arrays)
        self._written.descriptors[i] = descriptor

    def commit(self) -> None:
        """Do nothing: a file is complete as soon as it has its name."""

    def finish(self) -> Written:
        """Return the global descriptors of what was written."""
        return self._written

    def close(self) -> None:
        """Do nothing: there are no open files."""


def write_patch_files(
    directory: Path,
    manifest: Manifest,
    names: Iterable[str],
    arrays: Sequence[NDArray[Any]],
    modified: int = 0,
    *,
    sync: bool = False,
) -> list[Path]:
    """Write the patch descriptors [n_s, P] of an image, one array per patch size.

    Parameters
    ----------
    directory : Path
    manifest : Manifest
    names : iterable of str
        Under which the image stands in the list.
    arrays : sequence of ndarray [n_s, P]
    modified : int, default 0
        Time stamp of the image, as for :meth:`NpyWriter.write`.
    sync : bool, default False
        Write them so that they survive a power failure.

    Returns
    -------
    list of Path
        The files.
    """
    written = []
    for size, patch in zip(manifest.patch_sizes, arrays, strict=True):
        stored = np.ascontiguousarray(patch.T, dtype=np.float32)
        for file in {patch_file(directory, "patchfeats", size, n, manifest.naming) for n in names}:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_array(file, stored, sync=sync)
            set_time_stamp(file, modified)
            written.append(file)
    return written
