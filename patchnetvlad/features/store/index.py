# SPDX-License-Identifier: MIT
"""The SQLite index of a store: where each record is."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from patchnetvlad.base.files import new_file, sync_folder
from patchnetvlad.base.names import normal_name
from patchnetvlad.base.text import parse_json
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.manifest import (
    GLOBAL_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    Manifest,
    check_no_share,
    read_manifest,
)
from patchnetvlad.features.names import write_error

BUSY_SECONDS = 60.0
"""How long to wait for another process that holds the index."""

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
Statements = Sequence[tuple[str, Sequence[Any]]]
"""SQL statements, each with its values."""


@dataclass(frozen=True)
class Record:
    """Where the features of one image are: a row of the index."""

    shard: int
    start: int
    bytes: int
    head: int
    arrays: str
    head_crc32: int
    crc32: int
    modified: int

    @property
    def is_possible(self) -> bool:
        """Whether all values are of their kinds, and a record can lie there."""
        crcs = self.head_crc32, self.crc32
        numbers = self.shard, self.start, self.bytes, self.head, self.modified
        if not all(type(n) is int and abs(n) < 2**63 for n in (*numbers, *crcs)):
            return False
        if not (isinstance(self.arrays, str) and self.arrays.isascii()):
            return False
        there = 0 <= self.shard < 2**31 and self.start >= 0 and 0 <= self.head <= self.bytes
        return there and all(0 <= crc < 2**32 for crc in crcs)


_NOWHERE = Record(0, 2**62, 0, 0, "", 0, 0, 0)  # cannot be read, so that it counts as damaged


def _record(values: Sequence[Any]) -> Record:
    """Make a record of a row; of one with impossible values, a record that is nowhere."""
    record = Record(*values)
    return record if record.is_possible else _NOWHERE


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
    except (sqlite3.Error, UnicodeError, OverflowError) as error:
        file, text = directory / INDEX_FILE, str(error)
        if "full" in text or "disk I/O" in text:  # an exceeded quota is an I/O error
            raise write_error(directory, f"{text} ({INDEX_FILE})") from None
        if "locked" in text:
            raise FeatureError(
                f"{file} is locked by another process; try again when that has ended"
            ) from None
        if not directory.is_dir():
            raise FeatureError(
                f"the folder {directory} is gone; was it deleted or moved?"
            ) from None
        if "unable to open" in text or "readonly" in text:
            raise FeatureError(
                f"{file} cannot be opened ({text}); check the permissions of the "
                "file and its folder"
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
    share, moved : str
        Empty; see :class:`~patchnetvlad.features.store.share.ShareFolder`.

    Raises
    ------
    FeatureError
        There is no store, or it is damaged or of another version.
    """

    share = moved = ""

    def __init__(self, directory: Path, writable: bool = False) -> None:
        self.directory = directory
        file = directory / INDEX_FILE
        if not file.is_file():
            check_no_share(directory)
            raise FeatureError(f"there is no feature store in {directory}")
        with contextlib.ExitStack() as on_error, _index_errors(directory):
            # "rw" even for reading, so that a half-finished commit of a killed run is rolled back.
            # If the file is read-only, SQLite opens it for reading.
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
            on_error.pop_all()

    @classmethod
    def create(cls, directory: Path, names: Sequence[str], manifest: Manifest) -> StoreIndex:
        """Create an empty index of an image list, atomically."""
        file = directory / INDEX_FILE
        with (
            _index_errors(directory),
            new_file(file) as temporary,
            contextlib.closing(sqlite3.connect(temporary)) as db,
            db,
        ):
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version = {_VERSION}")
            db.execute("INSERT INTO about VALUES ('manifest', ?)", (manifest.to_json(),))
            rows = enumerate(map(normal_name, names))
            db.executemany("INSERT INTO images VALUES (?, ?)", rows)
        sync_folder(directory)
        return cls(directory, writable=True)

    @property
    def failed(self) -> dict[str, str]:
        """Images without features in a finished store: reason by name."""
        rows = self.rows("SELECT value FROM about WHERE key = 'failed'")
        if not rows:
            return {}
        try:
            return {str(key): str(why) for key, why in parse_json(rows[0][0]).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise self._damaged_error(error) from None

    @failed.setter
    def failed(self, failed: Mapping[str, str]) -> None:
        with _index_errors(self.directory), self.db:
            self.db.execute("DELETE FROM about WHERE key = 'failed'")
            if failed:
                text = json.dumps(dict(failed))
                self.db.execute("INSERT INTO about VALUES ('failed', ?)", (text,))

    def names(self) -> list[str]:
        """Return the image list of the store."""
        with _index_errors(self.directory):
            rows = self.db.execute("SELECT name FROM images ORDER BY place").fetchall()
        if not all(isinstance(name, str) for (name,) in rows):
            raise self._damaged_error("a name is not text")
        return [name for (name,) in rows]

    def _damaged_error(self, reason: object) -> FeatureError:
        file = self.directory / INDEX_FILE
        return FeatureError(f"{file} is damaged ({reason}); extract again with --no-resume")

    def set_list(self, names: Sequence[str], manifest: Manifest) -> None:
        """Replace the image list and the manifest, in one transaction; records stay."""
        with _index_errors(self.directory), self.db:
            self.db.execute("DELETE FROM images")
            rows = enumerate(map(normal_name, names))
            self.db.executemany("INSERT INTO images VALUES (?, ?)", rows)
            text = manifest.to_json()
            self.db.execute("INSERT OR REPLACE INTO about VALUES ('manifest', ?)", (text,))
        self.manifest = manifest

    @property
    def has_places(self) -> bool:
        """Whether there is the table of an index of places."""
        return bool(self.rows("SELECT 1 FROM sqlite_master WHERE name = 'places'"))

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read a consistent state, whatever another process adds meanwhile."""
        with _index_errors(self.directory):
            self.db.execute("BEGIN")
        try:
            yield
        finally:
            self.db.rollback()

    def records(self) -> dict[str, Record]:
        """Return all records by the name of their image, in the order of the shards."""
        with _index_errors(self.directory):
            columns = ", ".join(field.name for field in fields(Record))
            rows = self.db.execute(f"SELECT name, {columns} FROM records ORDER BY shard, start")
            return {name: _record(rest) for name, *rest in rows if isinstance(name, str)}

    def add(self, records: Iterable[tuple[str, Record]], more: Statements = ()) -> None:
        """Add records and run the statements ``more``, in one transaction."""
        with _index_errors(self.directory), self.db:
            self.db.executemany(
                "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                ((name, *astuple(record)) for name, record in records),
            )
            for text, values in more:
                self.db.execute(text, values)

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of an SQL query."""
        with _index_errors(self.directory):
            return self.db.execute(query, values).fetchall()

    def remove(self, names: Iterable[str]) -> None:
        """Remove records, in one transaction."""
        with _index_errors(self.directory), self.db:
            self.db.executemany("DELETE FROM records WHERE name = ?", ((n,) for n in names))

    def forget(self, names: Iterable[str]) -> None:
        """Take images out of the list, with their records and rows of other tables of places."""
        gone = set(names)
        if not gone:
            return
        with _index_errors(self.directory), self.db:
            query = "SELECT name FROM sqlite_master WHERE name IN ('images', 'places')"
            tables = [table for (table,) in self.db.execute(query)]
            listed = self.db.execute("SELECT place, name FROM images ORDER BY place").fetchall()
            places = [place for place, name in listed if name in gone]
            kept = [place for place, name in listed if name not in gone]
            self.db.executemany("DELETE FROM records WHERE name = ?", ((n,) for n in gone))
            moved = [(new, old) for new, old in enumerate(kept) if new != old]
            for table in tables:
                self.db.executemany(f"DELETE FROM {table} WHERE place = ?", ((p,) for p in places))
                self.db.executemany(f"UPDATE {table} SET place = ? WHERE place = ?", moved)

    def renumber_shards(self, numbers: Mapping[int, int]) -> None:
        """Give shards other numbers, in one transaction; their files are the caller's."""
        with _index_errors(self.directory), self.db:
            for shard, number in numbers.items():  # below 0, where nothing else is
                self.db.execute(
                    "UPDATE records SET shard = ? WHERE shard = ?", (-1 - number, shard)
                )
            self.db.execute("UPDATE records SET shard = -1 - shard")

    def close(self) -> None:
        """Close the file."""
        self.db.close()

    def copy_to(self, file: Path) -> None:
        """Write a consistent copy of the index."""
        with _index_errors(self.directory), contextlib.closing(sqlite3.connect(file)) as copy:
            self.db.backup(copy)


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
