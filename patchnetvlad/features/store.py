# SPDX-License-Identifier: MIT
"""The feature store: raw shards, and an SQLite index of what lies where in them.

A record holds everything of one image: its global descriptor (float32) and its patch descriptors
in the type of the store, or its feature map. Records are appended to ``features-00000.bin`` and
so on; ``features.sqlite`` says where each lies and what its checksum is. A record is entered in
the index only after the shard that it lies in is on the disk, so whatever happens in between, all
that the index names can be read.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import sqlite3
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.config import Config
from patchnetvlad.device import download, upload
from patchnetvlad.errors import (
    FeatureError,
    PatchNetVLADError,
    RemoteNotFoundError,
    make_folder,
)
from patchnetvlad.features.formats import (
    NpyReader,
    NpyWriter,
    atomic_file,
    cannot_write,
    disk_errors,
    load_global_descriptors,
    places_of,
    read_manifest,
    sync_folder,
    unfinished,
    write_all,
)
from patchnetvlad.features.manifest import (
    GLOBAL_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    SHARD_FILES,
    SHARES_FOLDER,
    Manifest,
    check_fits,
    erase,
    refuse,
)
from patchnetvlad.remote import RemoteFolder, is_remote, normal_name, url_of

logger = logging.getLogger(__name__)

LOCK_FILE = "features.lock"
SHARD_BYTES = 2**30
"""A shard that has reached this size is followed by the next."""

COMMIT_BYTES = 64 * 2**20
"""Who writes many records commits after about this many bytes."""

BUSY_SECONDS = 60.0
"""How long to wait for another process that has the index open."""

TRANSFERS = 3
"""How often a record is fetched from object storage that does not agree with its checksum."""

_VERSION = 1
_SCHEMA = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE images (place INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE records (
    name TEXT PRIMARY KEY,        -- the image's path in the list
    shard INTEGER NOT NULL,
    start INTEGER NOT NULL,       -- byte offset in the shard
    bytes INTEGER NOT NULL,
    head INTEGER NOT NULL,        -- bytes of the global descriptor, which comes first
    arrays TEXT NOT NULL,         -- [[dtype, [shape]], ...], in the order of the bytes
    head_crc32 INTEGER NOT NULL,  -- of the text before, and of the global descriptor
    crc32 INTEGER NOT NULL,       -- of the text before, and of all bytes
    modified INTEGER NOT NULL     -- time stamp of the image file, ns; 0 where it is not known
) WITHOUT ROWID;
"""
Arrays = list[NDArray[Any]]
Statements = Sequence[tuple[str, Sequence[Any]]]
"""Of SQL, each with its values."""


class Sink(Protocol):
    """What described images are given to; one thread at a time."""

    def write(
        self, i: int, descriptor: NDArray[np.float32], arrays: Sequence[Any], modified: int = 0
    ) -> None:
        """Write the features of image ``i``: [P] and what :func:`encode_patches` made."""

    def commit(self) -> None:
        """Make sure that everything written survives."""


class Writer(Sink, Protocol):
    """What extraction writes the features of an image list with."""

    done: NDArray[np.bool_]
    """Images [N] whose features are on disk."""

    def start(self) -> None:
        """Make ready to write; features that are to be replaced make way."""

    def finish(self, failed: Mapping[str, str] | None = None) -> None:
        """Write ``globalfeats.npy``; FeatureError if images other than ``failed`` are missing."""

    def close(self) -> None:
        """Let go of the files."""


# --- what a record holds --------------------------------------------------------------------------


def encode_patches(patches: Sequence[Tensor], kind: str) -> Arrays:
    """Turn patch descriptors into the arrays of a record.

    Parameters
    ----------
    patches : sequence of Tensor [n_s, P] of float32
        One a patch size, on any device.
    kind : {"float32", "float16", "int8", "npy"}
        int8 keeps one scale a patch: its largest component becomes 127.

    Returns
    -------
    list of ndarray
        [n_s, P] a patch size; for int8, the scales [sum n_s] of float32 come first.
    """
    return [values.numpy() for values in download(round_patches(patches, kind))]


def round_patches(patches: Sequence[Tensor], kind: str) -> list[Tensor]:
    """Round patch descriptors to what :func:`encode_patches` returns, on their device."""
    if kind == "int8":
        scales = [p.abs().amax(dim=1).clamp_min(1e-12) / 127 for p in patches]
        values = [
            (p / s[:, None]).round().to(torch.int8) for p, s in zip(patches, scales, strict=True)
        ]
        return [torch.cat(scales), *values]
    dtype = torch.float16 if kind == "float16" else torch.float32
    return [p.to(dtype) for p in patches]


def decode_patches(arrays: Arrays, kind: str, device: torch.device | str = "cpu") -> list[Tensor]:
    """Turn the arrays of :func:`encode_patches` back into descriptors, float32 on a device.

    What was rounded to int8 is L2-normalised again.
    """
    tensors = [upload(array, torch.device(device)) for array in arrays]
    if kind != "int8":
        return [tensor.float() for tensor in tensors]
    # A scale for all of a patch's components has no effect on a unit vector.
    return [torch.nn.functional.normalize(tensor.float(), dim=1) for tensor in tensors[1:]]


def encode_map(feature_map: Tensor) -> Arrays:
    """Turn a feature map [D, h, w] into the arrays of a record: one, of float16."""
    return [round_map(feature_map).cpu().numpy()]


def round_map(feature_map: Tensor) -> Tensor:
    """Round a feature map to what :func:`encode_map` returns, on its device."""
    return feature_map.to(torch.float16).contiguous()


def record_bytes(kind: str, dimension: int, num_patches: Sequence[int], map_numbers: int) -> int:
    """Count the bytes that the features of one image take on disk.

    Parameters
    ----------
    kind : {"float16", "float32", "int8", "map", "npy"}
    dimension : int
        P, of global and of patch descriptors.
    num_patches : sequence of int
        n_s of each size.
    map_numbers : int
        D * h * w of the feature map.

    Returns
    -------
    int
    """
    patches = sum(num_patches)
    local = {
        "float16": 2 * patches * dimension,
        "float32": 4 * patches * dimension,
        "npy": 4 * patches * dimension + 128 * len(num_patches),
        "int8": patches * (dimension + 4),
        "map": 2 * map_numbers,
    }[kind]
    # The row of globalfeats.npy, and in a store its copy in the record.
    return local + 4 * dimension * (1 if kind == "npy" else 2)


# --- the index ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """Where the features of one image lie: a row of the index."""

    shard: int
    start: int
    bytes: int
    head: int
    arrays: str
    head_crc32: int
    crc32: int
    modified: int


def shard_name(shard: int) -> str:
    """Return the name of a shard in its store."""
    return f"features-{shard:05d}.bin"


def shard_file(directory: Path, shard: int) -> Path:
    """Return the file of a shard."""
    return directory / shard_name(shard)


@contextlib.contextmanager
def _index_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        file, text = directory / INDEX_FILE, str(error)
        if "full" in text or "disk I/O" in text:  # I/O: a quota is reported so
            raise cannot_write(directory, f"{text} ({INDEX_FILE})") from None
        if "locked" in text:
            raise FeatureError(
                f"{file} is locked by another process; try again when that has ended"
            ) from None
        if "unable to open" in text or "readonly" in text:
            raise FeatureError(
                f"{file} cannot be opened ({text}); see to its permissions and its folder's"
            ) from None
        raise FeatureError(f"{file} is damaged ({text}); extract again with --no-resume") from None


class StoreIndex:
    """The SQLite file of a store.

    Parameters
    ----------
    directory : Path
    writable : bool, default False

    Attributes
    ----------
    manifest : Manifest
    share : str
        Of the store of a share (see :mod:`patchnetvlad.features.shares`), which, as ``"0/3"``;
        empty for others.
    moved : str
        Where a merge has moved the records of a share; empty while they are here.

    Raises
    ------
    FeatureError
        There is none, it is damaged, or of another version.
    """

    def __init__(self, directory: Path, writable: bool = False) -> None:
        self.directory = directory
        file = directory / INDEX_FILE
        if not file.is_file():
            raise FeatureError(f"there is no feature store in {directory}")
        with contextlib.ExitStack() as on_error, _index_errors(directory):
            # "rw" even to read: what a killed run left half committed is then rolled back. Where
            # the file cannot be written, SQLite opens it to read.
            self.db = sqlite3.connect(
                f"{file.absolute().as_uri()}?mode=rw",
                uri=True,
                timeout=BUSY_SECONDS,
                check_same_thread=False,
            )
            on_error.callback(self.db.close)
            self.db.execute("PRAGMA synchronous = EXTRA")
            self.db.execute(f"PRAGMA query_only = {int(not writable)}")
            (version,) = self.db.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):  # 0: no store, or the head of one
                raise FeatureError(
                    f"{file} is of version {version}, this release of patchnetvlad reads version "
                    f"{_VERSION}; use a later one, or extract again with --no-resume"
                )
            about = dict(self.db.execute("SELECT key, value FROM about"))
            self.manifest = Manifest.from_json(about.get("manifest", ""), file)
            self.share, self.moved = about.get("share", ""), about.get("moved", "")
            on_error.pop_all()

    @classmethod
    def create(
        cls,
        directory: Path,
        names: Sequence[str],
        manifest: Manifest,
        places: Sequence[int] | None = None,
        share: str = "",
    ) -> StoreIndex:
        """Make an empty index; it appears at once, or not at all.

        Parameters
        ----------
        directory : Path
        names : sequence of str
            Of all images in the list; or, of a share, of its own.
        manifest : Manifest
            That of the whole list.
        places : sequence of int, optional
            Where in the list the images of a share stand. Their names are kept as they are
            listed, since the share is merged into any layout.
        share : str, default ""
            Which share.

        Returns
        -------
        StoreIndex
        """
        file = directory / INDEX_FILE
        temporary = file.with_name(f"{INDEX_FILE}.part")
        for old in (temporary, temporary.with_name(f"{temporary.name}-journal")):
            old.unlink(missing_ok=True)
        with (
            _index_errors(directory),
            contextlib.closing(sqlite3.connect(temporary)) as db,
            db,
        ):
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version = {_VERSION}")
            db.execute("INSERT INTO about VALUES ('manifest', ?)", (manifest.to_json(),))
            if share:
                db.execute("INSERT INTO about VALUES ('share', ?)", (share,))
            rows = (
                enumerate(map(normal_name, names))
                if places is None
                else zip(places, names, strict=True)
            )
            db.executemany("INSERT INTO images VALUES (?, ?)", rows)
        os.replace(temporary, file)
        sync_folder(directory)
        return cls(directory, writable=True)

    @property
    def failed(self) -> dict[str, str]:
        """Images that have no features though the store is finished, and why, by name."""
        rows = self.rows("SELECT value FROM about WHERE key = 'failed'")
        return dict(json.loads(rows[0][0])) if rows else {}

    @failed.setter
    def failed(self, failed: Mapping[str, str]) -> None:
        with _index_errors(self.directory), self.db:
            self.db.execute("DELETE FROM about WHERE key = 'failed'")
            if failed:
                text = json.dumps(dict(failed))
                self.db.execute("INSERT INTO about VALUES ('failed', ?)", (text,))

    def names(self) -> list[str]:
        """Return the image list that the store was made for; the part of a share."""
        with _index_errors(self.directory):
            rows = self.db.execute("SELECT name FROM images ORDER BY place").fetchall()
        return [normal_name(name) if self.share else name for (name,) in rows]

    def check_whole(self) -> None:
        """Raise FeatureError for a share, which is of use only when it is merged."""
        if self.share:
            below = self.directory.absolute().parent
            output = below.parent if below.name == SHARES_FOLDER else "OUT"
            raise FeatureError(
                f"{self.directory} holds share {self.share} of an extraction, not all of its "
                f"features; when all shares are done, run patchnetvlad-store merge {output}"
            )

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read what is there at one moment, whatever another process adds meanwhile."""
        with _index_errors(self.directory):
            self.db.execute("BEGIN")
        try:
            yield
        finally:
            self.db.rollback()

    def records(self) -> dict[str, Record]:
        """Return all records by their image's name, in the order of the shards."""
        with _index_errors(self.directory):
            columns = ", ".join(field.name for field in fields(Record))
            rows = self.db.execute(f"SELECT name, {columns} FROM records ORDER BY shard, start")
            return {name: Record(*rest) for name, *rest in rows}

    def add(self, records: Iterable[tuple[str, Record]], more: Statements = ()) -> None:
        """Enter records, all or none, and run ``more`` together with that."""
        with _index_errors(self.directory), self.db:
            self.db.executemany(
                "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                ((name, *astuple(record)) for name, record in records),
            )
            for text, values in more:
                self.db.execute(text, values)

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return what a query of SQL finds."""
        with _index_errors(self.directory):
            return self.db.execute(query, values).fetchall()

    def remove(self, names: Iterable[str]) -> None:
        """Forget records, all or none."""
        with _index_errors(self.directory), self.db:
            self.db.executemany("DELETE FROM records WHERE name = ?", ((n,) for n in names))

    def close(self) -> None:
        """Close the file."""
        self.db.close()

    def copy_to(self, file: Path) -> None:
        """Write a copy of the index as it is at one moment."""
        with _index_errors(self.directory), contextlib.closing(sqlite3.connect(file)) as copy:
            self.db.backup(copy)


# --- reading --------------------------------------------------------------------------------------


class RecordError(FeatureError):
    """A record that cannot be read, or is not sound; ``problem`` says in a few words why."""

    def __init__(self, what: str, file: Path | str, problem: str, way_out: str) -> None:
        super().__init__(f"the record of {what} in {file} {problem}; {way_out}")
        self.problem = problem


_AGAIN = "run feature_extract again, it computes what is missing"


def read_record(
    directory: Path | RemoteFolder, record: Record, what: str, *, head: bool = False
) -> bytearray:
    """Read a record's bytes, or only those of its global descriptor; from any thread.

    Parameters
    ----------
    directory : Path or RemoteFolder
    record : Record
    what : str
        The image's name, for messages.
    head : bool, default False
        Only the global descriptor.

    Returns
    -------
    bytearray

    Raises
    ------
    RecordError
        The bytes are not there, or not what was written.
    RemoteError
        Object storage cannot be reached.
    """
    size, crc = (record.head, record.head_crc32) if head else (record.bytes, record.crc32)
    if isinstance(directory, Path):
        buffer = _read_shard(directory, record, size, what)
        if _agrees(buffer, record, crc):
            return buffer
        way_out = (
            f"patchnetvlad-store verify --drop {directory} takes damaged records out, and "
            "feature_extract then computes these again"
        )
        file: Path | str = shard_file(directory, record.shard)
        raise RecordError(what, file, "does not agree with its checksum", way_out)
    for _ in range(TRANSFERS):  # it may have been damaged on the way
        buffer = _fetch_shard(directory, record, size, what)
        if _agrees(buffer, record, crc):
            return buffer
    raise RecordError(
        what,
        directory.url_of(shard_name(record.shard)),
        f"does not agree with its checksum, fetched {TRANSFERS} times",
        "copy the store to a disk, where patchnetvlad-store verify --drop takes damaged records "
        "out and feature_extract then computes these again",
    )


def _agrees(buffer: bytearray, record: Record, crc: int) -> bool:
    return zlib.crc32(buffer, zlib.crc32(record.arrays.encode())) == crc


def _read_shard(directory: Path, record: Record, size: int, what: str) -> bytearray:
    file = shard_file(directory, record.shard)
    try:
        with file.open("rb") as stream:
            # First of all, since a damaged size may be any.
            if record.start + size > os.fstat(stream.fileno()).st_size:
                raise RecordError(what, file, "is cut off", _AGAIN)
            buffer = bytearray(size)
            stream.seek(record.start)
            stream.readinto(buffer)  # what is cut off meanwhile does not agree
    except OSError as error:
        raise RecordError(what, file, f"cannot be read ({error.strerror})", _AGAIN) from None
    return buffer


def _fetch_shard(folder: RemoteFolder, record: Record, size: int, what: str) -> bytearray:
    name = shard_name(record.shard)
    try:
        buffer = folder.read(name, record.start, size)
    except RemoteNotFoundError:
        raise RecordError(what, folder.url_of(name), "is gone, with the object", _AGAIN) from None
    if len(buffer) < size:
        raise RecordError(what, folder.url_of(name), "is cut off", _AGAIN)
    return bytearray(buffer)


def split_record(buffer: bytearray, layout: str) -> Arrays:
    """Return the arrays in the bytes of a record; ``layout`` is its :attr:`Record.arrays`."""
    arrays, start = [], 0
    for dtype, shape in json.loads(layout):
        array = np.frombuffer(buffer, dtype, math.prod(shape), start)
        arrays.append(array.reshape(shape))
        start += array.nbytes
    return arrays


@contextlib.contextmanager
def local_copy(folder: RemoteFolder, names: Sequence[str]) -> Iterator[Path]:
    """Fetch files of a feature store into a temporary folder, which is deleted in the end.

    Parameters
    ----------
    folder : RemoteFolder
    names : sequence of str

    Yields
    ------
    Path
        The temporary folder. A FeatureError of the block that names it names ``folder`` instead.

    Raises
    ------
    FeatureError
        There is no finished store in the folder, or no room for the files here.
    RemoteError
        Object storage cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="patchnetvlad-") as temporary:
        try:
            for name in names:
                folder.fetch(name, Path(temporary, name))
        except RemoteNotFoundError:
            raise _no_store(folder) from None
        except PatchNetVLADError:
            raise
        except OSError as error:
            raise FeatureError(
                f"{folder.url_of(name)} cannot be fetched into {temporary}: {error.strerror}; let "
                "TMPDIR name a folder with more room"
            ) from None
        try:
            yield Path(temporary)
        except FeatureError as error:
            raise FeatureError(str(error).replace(temporary, folder.url)) from None


def _no_store(folder: RemoteFolder) -> FeatureError:
    there = folder.names()
    if not there:
        return FeatureError(
            f"there is nothing in {folder}; run feature_extract with this --output_features_dir "
            "first"
        )
    if INDEX_FILE not in there and GLOBAL_FILE in there:
        return FeatureError(
            f"{folder} holds .npy files, which are read from a disk only; convert them to a store "
            "(patchnetvlad-store convert --to float16) and copy that there"
        )
    return FeatureError(
        f"the feature store in {folder} is not finished; run feature_extract again, it goes on "
        "from there"
    )


@contextlib.contextmanager
def opened_index(directory: Path | RemoteFolder) -> Iterator[StoreIndex]:
    """Open the index of a store to read it, wherever it lies; errors as of :class:`StoreIndex`."""
    with contextlib.ExitStack() as stack:
        if not isinstance(directory, Path):
            directory = stack.enter_context(local_copy(directory, [INDEX_FILE]))
        yield stack.enter_context(contextlib.closing(StoreIndex(directory)))


def feature_folder(directory: str | Path) -> Path | RemoteFolder:
    """Return the folder of features that a path or a URL names."""
    return RemoteFolder(url_of(directory)) if is_remote(directory) else Path(directory)


class StoreReader:
    """Reads a feature store, from a disk or from object storage.

    Parameters
    ----------
    directory : str or Path
        Or a URL, such as ``s3://bucket/prefix``. Of a store there, the index and the global
        descriptors are fetched at once, and each record as it is read.
    names : sequence of str
        The image list that the features were extracted from.
    config : Config
        What they are to be matched with.
    dataset_root : str or Path, default ""
        Folder that relative names lie under.

    Attributes
    ----------
    directory : Path or RemoteFolder
    manifest : Manifest
    global_descriptors : ndarray [N, P] of float32
        Not finite for images of ``failed``.
    failed : dict of str to str
        Images that could not be described on a cluster, and why, by name.

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
            # By place, because the same images may be listed by other names.
            listed = index.names()
            self._names: Sequence[str] | Mapping[int, str] = listed
            failed = {i for i, name in enumerate(listed) if name in self.failed}
            self.global_descriptors = load_global_descriptors(folder, names, failed)
            check_fits(folder, self.manifest, names, config, dataset_root)
            self._records = index.records()

    def stamp(self) -> str:
        """Return a text that is another when the features have been written anew."""
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
        return split_record(read_record(self.directory, record, name), record.arrays)[1:]

    def patches(self, i: int, device: torch.device | str = "cpu") -> list[Tensor]:
        """Read the patch descriptors of image ``i``.

        Parameters
        ----------
        i : int
            Place in the list.
        device : torch.device or str, default "cpu"

        Returns
        -------
        list of Tensor [n_s, P] of float32
            One a patch size of the configuration.

        Raises
        ------
        FeatureError
            The record is missing or damaged, or holds a feature map.
        """
        kind = self.manifest.local_features
        if kind == "map":
            raise FeatureError(f"{self.directory} holds feature maps, not patch descriptors")
        patches = decode_patches(self.arrays(i), kind, device)
        by_size = dict(zip(self.manifest.patch_sizes, patches, strict=True))
        return [by_size[size] for size in self.config.patch_sizes]

    def feature_map(self, i: int, device: torch.device | str = "cpu") -> Tensor:
        """Read the feature map [D, h, w] of image ``i`` from a store of maps, as float32."""
        (feature_map,) = self.arrays(i)
        return upload(feature_map, torch.device(device)).float()

    def part(self, places: Iterable[int]) -> StoreReader:
        """Return a small reader of the records of some images, for another process."""
        part = copy.copy(self)
        if isinstance(self.directory, Path):
            part.directory = Path(os.path.abspath(self.directory))
        part._names = {i: self._names[i] for i in places}
        listed = part._names.values()
        part._records = {name: self._records[name] for name in listed if name in self._records}
        part.global_descriptors = self.global_descriptors[:0]
        return part

    def size(self, i: int) -> int:
        """Return how many bytes the record of image ``i`` has; 0 without."""
        record = self._records.get(self._names[i])
        return record.bytes if record is not None else 0


def open_reader(
    directory: str | Path, names: Sequence[str], config: Config, dataset_root: str | Path = ""
) -> StoreReader | NpyReader:
    """Open the features in a directory, whichever way they are kept.

    The parameters and errors are those of :class:`StoreReader`; ``.npy`` files must be on a disk.
    """
    if is_remote(directory):
        return StoreReader(directory, names, config, dataset_root)
    is_store = (Path(directory) / INDEX_FILE).is_file()
    if is_store:
        with contextlib.closing(StoreIndex(Path(directory))) as index:
            index.check_whole()
    reader = StoreReader if is_store else NpyReader
    return reader(directory, names, config, dataset_root)


# --- writing --------------------------------------------------------------------------------------


class StoreWriter:
    """Appends to a feature store, and goes on where an interrupted run stopped.

    Parameters
    ----------
    directory : Path
    names : sequence of str
        The image list.
    manifest : Manifest
        That of the store, if there is one.
    image_paths : sequence of Path or str, optional
        Where the images lie: features older than their image are not taken over. Of URLs, that is
        not known.
    resume : bool, default True
        False replaces what is there.

    Attributes
    ----------
    done : ndarray [N] of bool
        Images whose features are on disk.
    records : dict of str to Record
        Where these lie, by name.

    Raises
    ------
    FeatureError
        The store is damaged.
    """

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
        self.done = np.zeros(len(names), dtype=bool)
        self._places = places_of(names)
        # Taken before any is read: one that changes meanwhile is done again in the next run.
        self._modified = [time_stamp(path) for path in image_paths or ()] or [0] * len(names)
        self.records: dict[str, Record] = {}
        self._stale: list[str] = []
        self._pending: list[tuple[str, Record]] = []
        self._also: list[tuple[str, Sequence[Any]]] = []
        self._index: StoreIndex | None = None
        self._file: int | None = None
        self._shard = self._end = 0
        if resume and (directory / INDEX_FILE).is_file():
            self._look()

    def _look(self) -> None:
        """Find out which records are of use."""
        with contextlib.closing(StoreIndex(self.directory)) as index:
            records = index.records()
        sizes = self._shard_sizes()
        for name, record in records.items():
            size = sizes.get(shard_file(self.directory, record.shard).name, 0)
            places = self._places.get(name, [])
            whole = record.start + record.bytes <= size
            if whole and places and self._modified[places[0]] in (0, record.modified):
                self.records[name] = record
                self.done[places] = True
            else:
                self._stale.append(name)

    def _shard_sizes(self) -> dict[str, int]:
        """Return the bytes of each shard by the name of its file."""
        return {file.name: file.stat().st_size for file in self.directory.glob(SHARD_FILES)}

    def start(self) -> None:
        """Open the store; what is to be replaced, and what was never committed, makes way."""
        with disk_errors(self.directory):
            (self.directory / GLOBAL_FILE).unlink(missing_ok=True)
            if not self.records:
                erase(self.directory)
                self._index = self._create_index()
            else:
                self._index = StoreIndex(self.directory, writable=True)
                self._index.remove(self._stale)
                self._index.failed = {}
            self.sweep()
            self._shard = max(self._shards_in_use(), default=0)
            lasts = (r for r in self.records.values() if r.shard == self._shard)
            self._end = max((r.start + r.bytes for r in lasts), default=0)

    @property
    def last_shard(self) -> int:
        """The largest number of a shard that is there, of whoever; -1 without."""
        numbers = [Path(name).stem.rpartition("-")[2] for name in self._shard_sizes()]
        return max((int(number) for number in numbers if number.isdigit()), default=-1)

    def sweep(self) -> None:
        """Delete shards that hold nothing of what counts."""
        used = {shard_file(self.directory, shard) for shard in self._shards_in_use()}
        for file in set(self.directory.glob(SHARD_FILES)) - used:
            file.unlink(missing_ok=True)  # a worker that fails deletes its own

    def _shards_in_use(self) -> set[int]:
        return {record.shard for record in self.records.values()}

    def _create_index(self) -> StoreIndex:
        return StoreIndex.create(self.directory, self.names, self.manifest)

    def _open_shard(self, shard: int, end: int) -> int:
        self._close_shard()
        self._file = os.open(shard_file(self.directory, shard), _WRITE, 0o666)
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
            Place in the list.
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
                self._open_shard(self._shard + 1, 0)
        file = self._file
        if file is None:
            with disk_errors(self.directory):
                file = self._open_shard(self._shard, self._end)
        where = self._shard, self._end, self._modified[i] or modified
        try:
            record = _append(file, where, descriptor, arrays)
        except OSError as error:
            # What is whole counts; the room of what is not lets the index grow.
            with contextlib.suppress(OSError, FeatureError):
                os.ftruncate(file, self._end)
                self.commit()
            raise cannot_write(self.directory, error.strerror or error) from None
        self._pending.append((self.names[i], record))
        self._end += record.bytes

    def adopt(self, records: Sequence[tuple[str, Record]]) -> None:
        """Enter records in the index that other processes wrote with a :class:`ShardWriter`."""
        assert self._index is not None
        self._index.add(records)
        for name, record in records:
            self.records[name] = record
            self.done[self._places[name]] = True

    def append(
        self,
        name: str,
        descriptor: NDArray[np.float32],
        arrays: Sequence[Any],
        also: Statements = (),
        modified: int = 0,
    ) -> None:
        """Make the image list longer by an image, and write its record; see :meth:`write`.

        Parameters
        ----------
        name : str
            Of an image that is not in the list.
        descriptor, arrays, modified
            As for :meth:`write`.
        also : sequence of (str, sequence)
            Statements of SQL with their values, which take effect together with the record.
        """
        if self._index is None:
            self.start()
        name, place = normal_name(name), len(self.names)
        self.names.append(name)
        self._modified.append(0)
        try:
            self.write(place, descriptor, arrays, modified)
        except BaseException:
            del self.names[place], self._modified[place]
            raise
        self.done = np.append(self.done, False)
        self._places[name] = [place]
        self._also += [("INSERT INTO images VALUES (?, ?)", (place, name)), *also]

    def commit(self) -> None:
        """Bring everything written to the disk, then enter it in the index."""
        if not self._pending:
            return
        assert self._index is not None
        assert self._file is not None
        # Not tried twice: after a failure the system takes the lost pages for written.
        pending, self._pending = self._pending, []
        also, self._also = self._also, []
        with disk_errors(self.directory):
            os.fsync(self._file)
        self._index.add(pending, also)
        for name, record in pending:
            self.records[name] = record
            self.done[self._places[name]] = True

    def finish(self, failed: Mapping[str, str] | None = None) -> None:
        """Write ``globalfeats.npy`` from the records.

        Parameters
        ----------
        failed : mapping of str to str, optional
            Images of which there will be no features, and why, by name. The index keeps that, and
            their rows are not finite.

        Raises
        ------
        FeatureError
            Other images are missing, or a record is damaged.
        """
        self.commit()
        failed = {name: why for name, why in (failed or {}).items() if name not in self.records}
        missing = sum(len(p) for name, p in self._places.items() if name not in failed)
        missing -= int(self.done.sum())
        if missing or not self.records:
            raise unfinished(self.directory, missing)
        if self._index is not None:
            self._index.failed = failed
        with contextlib.suppress(FeatureError):
            places = {i for name in failed for i in self._places.get(name, ())}
            load_global_descriptors(self.directory, self.names, places)
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

    def _head(self, size: int, name: str) -> bytes | bytearray:
        """Return the bytes of a global descriptor; those of an image that has none are NaN."""
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


class ShardWriter:
    """Writes one shard of a store, which another process then enters in the index.

    Parameters
    ----------
    directory : Path
    shard : int
        Number of a shard that is not there.
    names : mapping of int to str
        Of images, by their places in the list.
    modified : mapping of int to int
        Time stamps of the images, ns; 0 where they are not known.

    Attributes
    ----------
    records : list of (str, Record)
        What was written; it counts once :meth:`close` has brought it to the disk.

    Raises
    ------
    FeatureError
        The file is there, or cannot be made.
    """

    def __init__(
        self,
        directory: Path,
        shard: int,
        names: Mapping[int, str],
        modified: Mapping[int, int],
    ) -> None:
        self.records: list[tuple[str, Record]] = []
        self.directory = directory
        self.path = shard_file(directory, shard)
        self._shard, self._names, self._modified = shard, names, modified
        self._end = 0
        with disk_errors(directory):
            self._file: int | None = os.open(self.path, _WRITE | os.O_EXCL, 0o666)

    def write(
        self, i: int, descriptor: NDArray[np.float32], arrays: Sequence[Any], modified: int = 0
    ) -> None:
        """Append the record of image ``i``; see :meth:`StoreWriter.write`."""
        assert self._file is not None
        where = self._shard, self._end, self._modified[i] or modified
        with disk_errors(self.directory):
            record = _append(self._file, where, descriptor, arrays)
        self.records.append((self._names[i], record))
        self._end += record.bytes

    def commit(self) -> None:
        """Nothing to do: the shard counts as a whole."""

    def finish(self) -> None:
        """Bring the shard to the disk; without records, there is none."""
        assert self._file is not None
        with disk_errors(self.directory):
            os.fsync(self._file)
        sync_folder(self.directory)
        if self.records:
            descriptor, self._file = self._file, None
            os.close(descriptor)
        self.close()

    def close(self) -> None:
        """Close the file; a shard that is not finished is of no use."""
        if self._file is not None:
            descriptor, self._file = self._file, None
            os.close(descriptor)
            self.path.unlink(missing_ok=True)


def _append(
    file: int, where: tuple[int, int, int], descriptor: NDArray[np.float32], arrays: Sequence[Any]
) -> Record:
    """Write a record; ``where`` are its shard, its first byte, and the image's time stamp."""
    shard, start, modified = where
    parts = [np.ascontiguousarray(descriptor, dtype=np.float32)]
    parts += [np.ascontiguousarray(array) for array in arrays]
    layout = json.dumps([[part.dtype.str, list(part.shape)] for part in parts])
    checksums = [zlib.crc32(layout.encode())]
    os.lseek(file, start, os.SEEK_SET)
    for part in parts:
        checksums.append(zlib.crc32(part.data, checksums[-1]))
        write_all(file, part)
    size, head = sum(part.nbytes for part in parts), parts[0].nbytes
    return Record(shard, start, size, head, layout, checksums[1], checksums[-1], modified)


_WRITE = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
_HEADS, _HEAD_READERS = 1024, 16


def time_stamp(path: Path | str) -> int:
    """Return the time stamp of a file, ns; 0 where it is not known, as of a URL."""
    if isinstance(path, str):
        return 0
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def present_manifests(directory: Path) -> list[Manifest | None]:
    """Return the manifests of the features in a directory; None for features without one."""
    found: list[Manifest | None] = []
    if (directory / INDEX_FILE).is_file():
        with contextlib.closing(StoreIndex(directory)) as index:
            found.append(index.manifest)
    for name in (MANIFEST_FILE, f"{MANIFEST_FILE}.part"):
        if (directory / name).is_file():
            found.append(read_manifest(directory / name))
    if not found and (directory / GLOBAL_FILE).is_file():
        found.append(None)
    return found


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder."""
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FeatureError(
            f"another process is extracting into {folder}; wait for it, or name another "
            "--output_features_dir"
        ) from None
    except NotImplementedError:
        logger.warning("%s has no locks: let one process at a time write to it", folder)
    except OSError as error:
        raise FeatureError(
            f"features cannot be written to {folder}: {error.strerror or error}"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def open_writer(
    directory: str | Path,
    names: Sequence[str],
    manifest: Manifest,
    image_paths: Sequence[Path | str] | None = None,
    resume: bool = True,
) -> Iterator[Writer]:
    """Open a directory to write features to; no other process can meanwhile.

    Parameters
    ----------
    directory : str or Path
        Made if there is none.
    names : sequence of str
        The image list.
    manifest : Manifest
        Its ``local_features`` chooses between a store and ``.npy`` files.
    image_paths : sequence of Path or str, optional
        Where the images lie: features older than their image are not taken over. Of URLs, that is
        not known.
    resume : bool, default True
        Go on with the features that are there; False replaces them.

    Yields
    ------
    Writer

    Raises
    ------
    FeatureError
        Other features are there already, or another process writes there.
    OutputError
        The directory cannot be made.
    """
    folder = make_folder(directory)
    with locked(folder):
        if resume:
            for have in present_manifests(folder):
                if have != manifest:
                    raise refuse(folder, have, manifest)
            if (folder / INDEX_FILE).is_file():
                with contextlib.closing(StoreIndex(folder)) as index:
                    index.check_whole()
        kind: Any = NpyWriter if manifest.local_features == "npy" else StoreWriter
        writer: Writer = kind(folder, names, manifest, image_paths, resume)
        with contextlib.closing(writer):
            yield writer
