# SPDX-License-Identifier: MIT
"""What an index of places keeps on disk: a feature store, with a table of places beside it."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from patchnetvlad.base.files import disk_errors, make_folder, replace_text
from patchnetvlad.base.names import normal_name
from patchnetvlad.config import Config
from patchnetvlad.errors import FeatureError, OutputError
from patchnetvlad.features.from_maps import MapReader
from patchnetvlad.features.interface import Reader
from patchnetvlad.features.lock import LOCK_FILE, locked
from patchnetvlad.features.manifest import (
    GLOBAL_FILE,
    INDEX_FILE,
    SHARD_FILES,
    Manifest,
    check_no_share,
)
from patchnetvlad.features.npy_files import load_global_descriptors
from patchnetvlad.features.store.codec import Arrays
from patchnetvlad.features.store.index import Record, StoreIndex
from patchnetvlad.features.store.reader import RecordReader
from patchnetvlad.features.store.records import RecordError
from patchnetvlad.features.store.writer import COMMIT_BYTES, StoreWriter
from patchnetvlad.places.model import PlaceModel
from patchnetvlad.places.rows import Position, Row, Rows

FAISS_FILE = "places.faiss"
LIST_FILE = "index.txt"
SCHEMA = """
CREATE TABLE IF NOT EXISTS places (
    place INTEGER PRIMARY KEY,  -- as in images
    key TEXT NOT NULL,          -- the name there, as it was given
    x REAL, y REAL, z REAL,     -- position; NULL where it is not known
    height INTEGER NOT NULL,    -- px of the image as the network saw it
    width INTEGER NOT NULL,
    image BLOB                  -- it, as JPEG
)
"""
_COMMIT_SECONDS = 5.0
_JPEG_QUALITY = 85


def storage_kind(config: Config) -> str:
    """Return how a new store keeps patches; ``.npy`` files, which cannot grow, as float32."""
    plain = config.local_features == "npy" or not config.uses_patches
    return "float32" if plain else config.local_features


def has_places(index: StoreIndex) -> bool:
    """Return whether a store has the table of an index of places."""
    return bool(index.rows("SELECT 1 FROM sqlite_master WHERE name = 'places'"))


def place_rows(index: StoreIndex) -> list[tuple[Any, ...]] | None:
    """Return place, key, x, y, z, height and width of each image, in their order.

    None for features that ``feature_extract`` wrote.
    """
    if not has_places(index):
        return None
    return index.rows("SELECT place, key, x, y, z, height, width FROM places ORDER BY place")


def position_of(row: Sequence[Any]) -> Position:
    """Return the position in a row of the table; None if it has none."""
    return tuple(value for value in row[2:5] if value is not None) or None


def is_replaceable(folder: Path) -> bool:
    """Tell whether a folder is empty, or holds a saved index and nothing else."""
    if not folder.is_dir():
        return False
    ours = {INDEX_FILE, f"{INDEX_FILE}-journal", LOCK_FILE, GLOBAL_FILE, LIST_FILE, FAISS_FILE}
    files = {file.name for file in folder.iterdir() if file.is_file()}
    shards = {file.name for file in folder.glob(SHARD_FILES)}
    if {file.name for file in folder.iterdir()} - (files & (ours | shards)):
        return False
    if not files - {LOCK_FILE}:
        return True
    if not (folder / INDEX_FILE).is_file():
        return False
    with contextlib.closing(StoreIndex(folder)) as index:
        return has_places(index)


def exchange_folder(part: Path, target: Path) -> None:
    """Put a complete folder in the place of another, or of none."""
    if not target.exists():
        part.rename(target)
        return
    if not any(target.iterdir()):  # which may be where something is mounted
        files = sorted(part.iterdir(), key=lambda file: file.name == INDEX_FILE)
        for file in files:  # the index, which makes the others count, last
            shutil.move(file, target / file.name)
        return
    old = part.with_name(f"{part.name}.old")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(target))
        except FeatureError:
            raise OutputError(
                f"{target} is being added to; close that index, or name another folder"
            ) from None
        target.rename(old)
        try:
            part.rename(target)
        except BaseException:
            old.rename(target)
            raise
    shutil.rmtree(old, ignore_errors=True)


def delete_folder(folder: Path, process: int) -> None:
    """Delete a temporary folder, but not in a process that was forked from its own."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class SavedPlaces:
    """What the SQLite index of a folder says.

    Attributes
    ----------
    manifest : Manifest
    names : list of str
        Of the images, as the feature store has them.
    records : dict of str to Record
        By name.
    table : list of tuple or None
        As of :func:`place_rows`.
    """

    manifest: Manifest
    names: list[str]
    records: dict[str, Record]
    table: list[tuple[Any, ...]] | None

    def check_complete(self, folder: Path) -> None:
        """Raise FeatureError unless each image is listed once, and has features."""
        missing = [name for name in self.names if name not in self.records]
        if missing or len(set(self.names)) != len(self.names):
            problem = f"{len(missing)} images have no features yet" if missing else "images repeat"
            raise FeatureError(
                f"{folder}: {problem}; only complete features of images that are listed once can "
                "be searched"
            )
        if self.table is not None and [row[0] for row in self.table] != [*range(len(self.names))]:
            raise FeatureError(f"{folder / INDEX_FILE} is damaged: places and images differ")

    def rows(self, start: int = 0) -> list[Row]:
        """Return what the table says of the images from ``start`` on."""
        return [
            Row(row[1], self.records[name], position_of(row), (row[5], row[6]))
            for name, row in zip(self.names[start:], (self.table or [])[start:], strict=True)
        ]


def read_saved(folder: Path) -> SavedPlaces:
    """Read the SQLite index of a folder; FeatureError if it has none, or a part of a job."""
    check_no_share(folder)
    if not (folder / INDEX_FILE).is_file():
        raise FeatureError(
            f"there is no index in {folder}: PlaceIndex.save writes one; features in .npy "
            "files are converted by patchnetvlad-store convert"
        )
    with contextlib.closing(StoreIndex(folder)) as index:
        return read_places(index)


def read_places(index: StoreIndex) -> SavedPlaces:
    """Read an open SQLite index, as it is at one moment."""
    with index.snapshot():
        return SavedPlaces(index.manifest, index.names(), index.records(), place_rows(index))


@dataclass(frozen=True, eq=False)
class NewPlace:
    """An image to be added.

    Attributes
    ----------
    key : str
    position : tuple of float or None
    image : ndarray [H, W, 3] of uint8
        As the network saw it.
    descriptor : ndarray [P] of float32
    arrays : list of ndarray
        Of its patches or its feature map, as they are stored.
    modified : int
        Time stamp of the file, ns; 0 where it is not known.
    aspect : float
        Width over height of the image before it was resized; 0: that of ``image``.
    """

    key: str
    position: Position
    image: NDArray[np.uint8]
    descriptor: NDArray[np.float32]
    arrays: Arrays
    modified: int
    aspect: float = 0.0


class PlaceReader(RecordReader):
    """Reads the records of an index of places, whose list may grow.

    Parameters
    ----------
    path : Path
    kind : {"float16", "float32", "int8", "map"}
    rows : Rows
    stored_sizes, patch_sizes : sequence of int
        Of the patches that are kept, and of those wanted.
    """

    manifest = None

    def __init__(
        self,
        path: Path,
        kind: str,
        rows: Rows,
        stored_sizes: Sequence[int],
        patch_sizes: Sequence[int],
    ) -> None:
        self.directory, self.kind, self.names = path, kind, rows.names
        self.stored_sizes, self.patch_sizes = stored_sizes, patch_sizes
        self._path = path
        self._rows: Sequence[Row] | Rows = rows

    def of(self, rows: Sequence[Row]) -> PlaceReader:
        """Return a reader of images that are not in the list yet."""
        reader = copy.copy(self)
        reader.names, reader._rows = [row.key for row in rows], rows
        return reader

    def find(self, i: int) -> tuple[str, Record]:
        """Look up a row."""
        row = self._rows[i]
        return row.key, row.record

    def read(self, i: int) -> tuple[NDArray[np.float32], Arrays]:
        """Read a record."""
        with self._hints(i):
            return super().read(i)

    def descriptor(self, i: int) -> NDArray[np.float32]:
        """Read the head of a record."""
        with self._hints(i):
            return super().descriptor(i)

    @contextlib.contextmanager
    def _hints(self, i: int) -> Iterator[None]:
        """Say of a record that is not there as it was written what an index can do about it."""
        try:
            yield
        except RecordError as error:
            if not self._path.is_dir():
                raise FeatureError(
                    f"the folder of the index, {self.directory}, is gone; load it again"
                ) from None
            raise FeatureError(
                f"the record of {self.names[i]} in {self.directory} {error.problem}; load a copy, "
                "or add its images to a new index"
            ) from None


class PlaceFolder:
    """The folder that an index lives in: a feature store with a table of places.

    Reading may be done from any thread; writing by one at a time.

    Parameters
    ----------
    path : Path
    model : PlaceModel
    kind : {"float16", "float32", "int8", "map"}
        How patches are kept.
    rows : Rows
        Gets what is on the disk.
    patch_sizes : sequence of int
        Sizes of the patches that are kept, which may be more than the model's.
    """

    def __init__(
        self, path: Path, model: PlaceModel, kind: str, rows: Rows, patch_sizes: Sequence[int]
    ) -> None:
        self.path = path
        self.model = model
        self.kind = kind
        self.rows = rows
        self._records = PlaceReader(path, kind, rows, patch_sizes, model.config.patch_sizes)
        self._reader: Reader = self._records
        if kind == "map":
            self._reader = MapReader(self._records, model.config, lambda: model.describer)
        # Written, but not yet committed: key, position, size, global descriptor.
        self._pending: list[tuple[str, Position, tuple[int, int], NDArray[np.float32]]] = []
        self._writer: StoreWriter | None = None
        self._open = contextlib.ExitStack()

    # --- writing ----------------------------------------------------------------------------------

    def start_writing(self) -> StoreWriter:
        """Return the writer; it keeps other processes from writing, from the first call on.

        What others have added before is caught up with.

        Raises
        ------
        FeatureError
            Another process writes, or has changed what was there.
        """
        if self._writer is None:
            with contextlib.ExitStack() as on_error:
                on_error.enter_context(locked(self.path))
                manifest, names = self.model.manifest([], self.kind), []
                if (self.path / INDEX_FILE).is_file():
                    with contextlib.closing(StoreIndex(self.path)) as index:
                        manifest, names = index.manifest, index.names()
                        self._catch_up(index)
                writer = StoreWriter(self.path, names, manifest)
                on_error.callback(writer.close)
                writer.start()
                self._open = on_error.pop_all()
                self._writer = writer
        return self._writer

    def stop_writing(self) -> None:
        """Let go of the files; nothing is committed."""
        self._writer = None
        self._open.close()

    def add(self, places: Iterable[NewPlace]) -> None:
        """Add images; what was written before an error is kept.

        Parameters
        ----------
        places : iterable of NewPlace
            Its errors are raised here.

        Raises
        ------
        FeatureError
            The disk is full, or cannot be written.
        """
        written, last = 0, time.monotonic()
        try:
            for place in places:
                self._append(place)
                written += sum(array.nbytes for array in place.arrays)
                if written > COMMIT_BYTES or time.monotonic() - last > _COMMIT_SECONDS:
                    self._commit()
                    written, last = 0, time.monotonic()
        finally:
            self._commit()

    def _append(self, place: NewPlace) -> None:
        size: tuple[int, int] = place.image.shape[:2]
        jpeg = io.BytesIO()
        # Of an image that was resized, the JPEG's density tells the shape before.
        wide, tall = 1000, 1000
        if place.aspect:
            wide = round(1000 * size[1] / size[0] / place.aspect)
        Image.fromarray(place.image).save(
            jpeg, "JPEG", quality=_JPEG_QUALITY, dpi=(min(max(wide, 1), 65535), tall)
        )
        xyz = (*(place.position or ()), None, None, None)[:3]
        row = len(self.rows) + len(self._pending)
        values = (row, place.key, *xyz, *size, jpeg.getvalue())
        also = [(SCHEMA, ()), ("INSERT INTO places VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)]
        writer = self.start_writing()
        try:
            writer.append(place.key, place.descriptor, place.arrays, also, place.modified)
        except BaseException:
            with contextlib.suppress(FeatureError):
                self._commit()  # what is whole counts
            self.stop_writing()
            raise
        self._pending.append((place.key, place.position, size, place.descriptor))

    def _commit(self) -> None:
        """Bring to the disk what was written, and let it be found."""
        writer = self._writer
        if not self._pending or writer is None:
            return
        pending, self._pending = self._pending, []
        try:
            try:
                writer.commit()
            finally:
                there = [
                    (Row(key, writer.records[name], position, size), descriptor)
                    for key, position, size, descriptor in pending
                    if (name := normal_name(key)) in writer.records
                ]
                self.rows.add([row for row, _ in there], [descriptor for _, descriptor in there])
        except BaseException:
            # Whatever is on the disk and not in memory now, as after Ctrl-C, is caught up with
            # when the store is opened to write again.
            self.stop_writing()
            raise

    def _catch_up(self, index: StoreIndex) -> None:
        """Take over what was added to the folder, by another process or before an interruption."""
        there = read_places(index)
        known = self.rows.drop_unfinished()
        same = there.names[:known] == [*map(normal_name, self.rows.keys())]
        if len(there.table or []) != len(there.names) or not same:
            raise FeatureError(f"{self.path} has been changed by another process; load it again")
        new = there.rows(known)
        reader = self._records.of(new)
        self.rows.add(new, [reader.descriptor(i) for i in range(len(new))])

    # --- completing and copying -------------------------------------------------------------------

    def save_copy(self, target: Path) -> None:
        """Put a complete copy in the place of a folder, which becomes it at once or not at all.

        Parameters
        ----------
        target : Path
            New or empty, or a saved index, which is replaced.

        Raises
        ------
        OutputError
            It holds something else, or cannot be written.
        """
        if target.exists() and not is_replaceable(target):
            raise OutputError(
                f"{target} holds something other than a saved index; name another folder"
            )
        if not self.path.is_dir():
            raise OutputError(f"the folder of the index, {self.path}, is gone")
        parent = make_folder(target.parent)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=parent))
        try:
            with disk_errors(f"{target} cannot be written", "name another folder"):
                part.chmod(0o755)
                self._copy(part)
                exchange_folder(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _copy(self, folder: Path) -> None:
        self.stop_writing()
        if (self.path / INDEX_FILE).is_file():
            with contextlib.closing(StoreIndex(self.path)) as index:
                index.copy_to(folder / INDEX_FILE)
            # Shards after it: they only grow.
            for file in sorted(self.path.glob(SHARD_FILES)):
                shutil.copyfile(file, folder / file.name)
        self.complete(folder)

    def complete(self, folder: Path) -> None:
        """Make this folder, or a copy of it, a finished feature store."""
        self.stop_writing()
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(folder))
            if not (folder / INDEX_FILE).is_file():
                StoreIndex.create(folder, [], self.model.manifest([], self.kind)).close()
            index = StoreIndex(folder, writable=True)
            stack.callback(index.close)
            table = place_rows(index)  # perhaps more than this object knows of
            if table is not None and folder == self.path:
                self._catch_up(index)
            keys = [row[1] for row in table] if table is not None else self.rows.keys()
            manifest = self._complete_table(index, keys, table is None)
            if keys:
                writer = StoreWriter(folder, keys, manifest)
                stack.callback(writer.close)
                writer.finish()
            replace_text(folder / LIST_FILE, [f"{key}\n" for key in keys])
            self.rows.faiss.save(folder / FAISS_FILE)

    def _complete_table(self, index: StoreIndex, keys: Sequence[str], fill: bool) -> Manifest:
        """Write the manifest of a list of images and, to ``fill`` it, the table of places."""
        # Of other patch sizes than the model's, perhaps: only the list is new.
        listed = self.model.manifest(keys, self.kind)
        manifest = replace(
            index.manifest,
            images=listed.images,
            paths=listed.paths,
            num_images=listed.num_images,
        )
        about = ("UPDATE about SET value = ? WHERE key = 'manifest'", (manifest.to_json(),))
        rows = [
            ("INSERT INTO places VALUES (?, ?, NULL, NULL, NULL, ?, ?, NULL)", (i, r.key, *r.size))
            for i, r in enumerate(self.rows)
        ]
        index.add([], [(SCHEMA, ()), about, *(rows if fill else [])])
        return manifest

    # --- reading ----------------------------------------------------------------------------------

    def patches(self, row: int) -> Sequence[Tensor]:
        """Read the patches of an image, or compute them from its feature map.

        Returns
        -------
        sequence of Tensor [n_s, P] of float32
            One per patch size of the model, on its device.

        Raises
        ------
        FeatureError
            The record is missing or damaged.
        """
        return self._reader.patches(row, self.model.device)

    def descriptor(self, row: int) -> NDArray[np.float32]:
        """Read the global descriptor [P] of an image; FeatureError if it is damaged."""
        return self._reader.descriptor(row)

    def descriptors(self, start: int) -> NDArray[np.float32]:
        """Read the global descriptors [n, P] of the images from ``start`` on."""
        with contextlib.suppress(FeatureError):
            return load_global_descriptors(self.path, self.rows.names)[start:]
        found = [self.descriptor(i) for i in range(start, len(self.rows))]
        return np.stack(found) if found else np.empty((0, self.model.dimension), np.float32)

    def jpeg(self, row: int) -> bytes | None:
        """Read the JPEG of an image; None where ``feature_extract`` wrote the features."""
        with contextlib.closing(StoreIndex(self.path)) as index:
            if not has_places(index):
                return None
            found = index.rows("SELECT image FROM places WHERE place = ?", (row,))
        return found[0][0] if found else None
