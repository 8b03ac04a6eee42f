# SPDX-License-Identifier: MIT
"""A place index on disk: a feature store with a table of places."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from patchnetvlad.base.files import (
    disk_errors,
    make_folder,
    replace_text,
    temporary_folder,
)
from patchnetvlad.base.names import normal_name
from patchnetvlad.errors import FeatureError, ImageError, OutputError
from patchnetvlad.features.from_maps import MapReader
from patchnetvlad.features.interface import Reader
from patchnetvlad.features.lock import locked
from patchnetvlad.features.manifest import (
    INDEX_FILE,
    Manifest,
)
from patchnetvlad.features.npy_files import load_global_descriptors
from patchnetvlad.features.store.codec import Arrays
from patchnetvlad.features.store.index import Record, StoreIndex, shard_file
from patchnetvlad.features.store.reader import RecordReader
from patchnetvlad.features.store.records import RecordError, is_head
from patchnetvlad.features.store.writer import COMMIT_BYTES, StoreWriter
from patchnetvlad.places.lock import Changing
from patchnetvlad.places.model import PlaceModel
from patchnetvlad.places.replacing import (
    free_numbers,
    is_replaceable,
    locked_target,
    put_in_place,
    remove_empty,
)
from patchnetvlad.places.rows import Position, Row, Rows
from patchnetvlad.places.saved import (
    FAISS_FILE,
    LIST_FILE,
    SCHEMA,
    checksums,
    place_rows,
    read_places,
)

logger = logging.getLogger(__name__)
_COMMIT_SECONDS = 5.0
_JPEG_QUALITY = 85
_BUSY = "another process is adding to {folder}; wait until that has closed the index"


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


class DamagedRecordError(FeatureError):
    """A damaged record of an index; ``row`` says which one."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


def way_out(folder: Path) -> str:
    """Say what can be done about damaged records."""
    return (
        f"patchnetvlad-store verify --drop {folder} takes what is damaged out, and it can be added "
        "again; save() writes a copy without it"
    )


class PlaceReader(RecordReader):
    """Reads the records of a place index, whose list may grow.

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
            raise DamagedRecordError(
                i,
                f"the record of {self.names[i]} in {self.directory} {error.problem}; "
                f"{way_out(self._path)}",
            ) from None


class PlaceFolder:
    """The folder of an index: a feature store with a table of places.

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

    Attributes
    ----------
    adding : RLock
        For whoever adds.
    damaged : set of str
        Names of images, of those in the folder, whose records are known to be damaged.
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
        self.damaged: set[str] = set()
        self.adding = threading.RLock()
        self._changing = Changing(self._let_go)

    def _let_go(self) -> None:
        """Leave what another process has open to it, in a process that was forked from it."""
        self.adding = threading.RLock()
        self.rows.forget_readers()
        self._pending = []
        with contextlib.suppress(FeatureError, OSError):
            self.stop_writing()  # these are copies, and no transaction is open

    # --- writing ----------------------------------------------------------------------------------

    def start_writing(self) -> StoreWriter:
        """Return the writer; it keeps other processes from writing, from the first call on.

        What others have added before is caught up with.

        Raises
        ------
        FeatureError
            Another process writes, or has changed what was there.
        """
        with self._changing.lock:
            return self._start_writing()

    def _start_writing(self) -> StoreWriter:
        if self._writer is None:
            with contextlib.ExitStack() as on_error:
                on_error.enter_context(locked(self.path, _BUSY))
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
        """Release the files without committing."""
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
                with self._changing.lock:
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
        with self._changing.lock:
            self._commit_pending()

    def _commit_pending(self) -> None:
        writer = self._writer
        if not self._pending or writer is None:
            return
        pending, self._pending = self._pending, []
        try:
            try:
                writer.commit()
            finally:
                there = [
                    (Row(key, writer.records[name], position, size, place), descriptor)
                    for place, (key, position, size, descriptor) in enumerate(
                        pending, len(self.rows)
                    )
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
        whole = len(there.table or []) == len(there.names) and not there.damaged()
        if not (whole and same):
            raise FeatureError(f"{self.path} has been changed by another process; load it again")
        new = there.rows(known)
        reader = self._records.of(new)
        self.rows.add(new, [reader.descriptor(i) for i in range(len(new))])

    # --- completing and copying -------------------------------------------------------------------

    def save_copy(self, target: Path) -> None:
        """Replace a folder by a complete copy, atomically.

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
        is_new = not target.exists()
        make_folder(target)
        try:
            with (
                disk_errors(f"{target} cannot be written", "name another folder"),
                locked_target(target),
                temporary_folder(target) as part,
            ):
                self._copy(part, target)
                put_in_place(part, target)
        except BaseException:
            if is_new:
                remove_empty(target)
            raise

    def _copy(self, folder: Path, target: Path) -> None:
        """Write a copy without what is damaged, with numbers of shards that ``target`` has not."""
        self.stop_writing()
        numbers: dict[int, int] = {}
        if (self.path / INDEX_FILE).is_file():
            with contextlib.closing(StoreIndex(self.path)) as index:
                index.copy_to(folder / INDEX_FILE)
            with contextlib.closing(StoreIndex(folder, writable=True)) as index:
                index.forget(self.damaged)
                used = sorted({record.shard for record in index.records().values()})
                first = free_numbers(target, len(used))
                numbers = {shard: i for i, shard in enumerate(used, start=first)}
                index.renumber_shards(numbers)
            # Shards after it: they only grow.
            for shard, number in numbers.items():
                shutil.copyfile(shard_file(self.path, shard), shard_file(folder, number))
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
            kept = [row for row in self.rows if normal_name(row.key) not in self.damaged]
            keys = [row[1] for row in table] if table is not None else [row.key for row in kept]
            manifest = self._complete_table(index, keys, kept if table is None else [])
            if keys:
                writer = StoreWriter(folder, keys, manifest)
                stack.callback(writer.close)
                writer.finish()
            replace_text(folder / LIST_FILE, [f"{key}\n" for key in keys])
            self.rows.faiss.save(folder / FAISS_FILE, checksums(self.rows))

    def _complete_table(
        self, index: StoreIndex, keys: Sequence[str], new: Sequence[Row]
    ) -> Manifest:
        """Write the manifest of a list of images and, where they are new, the table of places."""
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
            for i, r in enumerate(new)
        ]
        index.add([], [(SCHEMA, ()), about, *rows])
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

    def descriptors(
        self, rows: Sequence[Row], names: Sequence[str]
    ) -> tuple[list[Row], list[NDArray[np.float32]]]:
        """Read the global descriptors of images that are not in the list yet.

        Parameters
        ----------
        rows : sequence of Row
        names : sequence of str
            All N images of the store.

        Returns
        -------
        rows : list of Row
            Those that are whole; of the others, which are counted as damaged, the log says it.
        descriptors : list of ndarray [P] of float32
            Theirs.
        """
        stored: NDArray[np.float32] | None = None
        with contextlib.suppress(FeatureError):
            stored = load_global_descriptors(self.path, names)
        reader, whole, found, problem = self._records.of(rows), [], [], ""
        for i, row in enumerate(rows):
            copied = None if stored is None else stored[row.place]
            try:
                if copied is None or not is_head(copied, row.record):
                    copied = reader.descriptor(i)
            except DamagedRecordError as error:
                problem = problem or str(error)
                self.damaged.add(normal_name(row.key))
                continue
            whole.append(row)
            found.append(copied)
        if problem:
            logger.warning("%d images are damaged and left out: %s", len(self.damaged), problem)
        return whole, found

    def pass_over(self, rows: Iterable[int]) -> set[int]:
        """Find the damaged ones among some rows, and log them."""
        bad: dict[int, FeatureError] = {}
        for row in rows:
            try:
                self._records.read(row)
            except DamagedRecordError as problem:
                bad[row] = problem
        self.damaged.update(normal_name(self.rows[row].key) for row in bad)
        for error in bad.values():
            logger.warning("passed over: %s", error)
        return set(bad)

    def jpeg(self, row: int) -> bytes | None:
        """Read the JPEG of an image; None if ``feature_extract`` wrote the features."""
        place = self.rows[row].place
        with contextlib.closing(StoreIndex(self.path)) as index:
            if not index.has_places:
                return None
            found = index.rows("SELECT image FROM places WHERE place = ?", (place,))
        jpeg: object = found[0][0] if found else None
        if not isinstance(jpeg, (bytes, type(None))):
            raise ImageError(f"the image that is kept of {self.rows[row].key!r} is damaged")
        return jpeg
