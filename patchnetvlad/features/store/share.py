# SPDX-License-Identifier: MIT
"""The share of one job, ``--shard I/N``: its images, and its folder.

A job writes shards of the store, each with a note, and a file that names its images.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from patchnetvlad.base.files import atomic_file, sync_folder
from patchnetvlad.base.names import normal_name
from patchnetvlad.base.text import one_line
from patchnetvlad.errors import ArgumentError, FeatureError
from patchnetvlad.features.manifest import (
    GLOBAL_FILE,
    MANIFEST_FILE,
    NOTE_FILES,
    SHARD_FILES,
    SHARE_FILE,
    SHARES_FOLDER,
    Manifest,
    find_shares,
    read_share_file,
)
from patchnetvlad.features.names import disk_errors
from patchnetvlad.features.store.index import Record, Statements, present_manifests
from patchnetvlad.features.store.notes import decode_note, encode_note, note_name


@dataclass(frozen=True, order=True)
class Share:
    """The part of an image list that one job, ``--shard I/N``, extracts.

    Attributes
    ----------
    index : int
        I, from 0.
    count : int
        N, the number of jobs.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, shard: str | tuple[int, int]) -> Share:
        """Parse ``I/N``.

        Parameters
        ----------
        shard : str or (int, int)
            ``"I/N"``, or I and N.

        Returns
        -------
        Share

        Raises
        ------
        ArgumentError
            It is not of this form, or I is not one of 0 to N - 1.

        Examples
        --------
        >>> Share.parse("1/3")
        Share(index=1, count=3)
        """
        text = shard if isinstance(shard, str) else "/".join(map(str, shard))
        match = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise ArgumentError(
                f"{text!r} is not a share: give I/N, where I is one of 0 to N - 1, such as 0/3, "
                "1/3 and 2/3 in three jobs"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def folder(self, output: str | Path) -> Path:
        """Return the folder that this job writes to."""
        return Path(output, SHARES_FOLDER, f"{self.index}-of-{self.count}")

    def rows(self, names: Sequence[str], batch_size: int) -> list[int]:
        """Return the rows of the images of this job.

        Parameters
        ----------
        names : sequence of str
            The whole list.
        batch_size : int
            As :attr:`~patchnetvlad.config.Config.cache_batch_size`: an image is computed in the
            same batch as in a single run. The sizes of jobs differ by at most one batch.

        Returns
        -------
        list of int
            Rows in the list, in order. All rows of a repeated image belong to the job of its
            first row.

        Examples
        --------
        >>> names = ["a", "b", "c", "d", "a"]
        >>> [Share(i, 2).rows(names, batch_size=2) for i in (0, 1)]
        [[0, 1, 4], [2, 3]]
        """
        first: dict[str, int] = {}
        batch_of = [
            first.setdefault(normal_name(name), i) // batch_size for i, name in enumerate(names)
        ]
        batches = sorted(set(batch_of))
        start, stop = (len(batches) * i // self.count for i in (self.index, self.index + 1))
        ours = set(batches[start:stop])
        return [i for i, batch in enumerate(batch_of) if batch in ours]


@dataclass(eq=False)
class ShareFolder:
    """The folder of one job; in place of the index of a store it has notes.

    Attributes
    ----------
    directory : Path
    share : Share
    manifest : Manifest
        Of the whole list.
    rows : list of int
        Rows of the images in the whole list.
    listed : list of str
        Their names as they are listed, since a job may be merged into any layout.
    moved : str
        Where a merge has moved the records; empty while they are here.
    """

    directory: Path
    share: Share
    manifest: Manifest
    rows: list[int]
    listed: list[str]
    moved: str = ""
    failed: dict[str, str] = field(default_factory=dict)
    _notes: dict[int, dict[str, Record]] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> ShareFolder:
        """Read a folder and its notes; FeatureError if it holds no share, or is damaged."""
        about = read_share_file(directory)
        manifest = Manifest.from_json(json.dumps(about["manifest"]), directory / SHARE_FILE)
        try:
            share = Share.parse(about["share"])
            if not all(0 <= row < manifest.num_images for row in about["rows"]):
                raise ArgumentError("a row is not of the list")
        except ArgumentError as error:
            raise FeatureError(
                f"{directory / SHARE_FILE} is damaged ({one_line(error)}); extract this share "
                "again with --no-resume"
            ) from None
        folder = cls(directory, share, manifest, about["rows"], about["names"], about["moved"])
        for note in sorted(directory.glob(NOTE_FILES)):
            with disk_errors(directory):
                records = decode_note(note.read_bytes(), manifest, str(note))
            for name, record in records:
                folder._notes.setdefault(record.shard, {})[name] = record
        return folder

    def names(self) -> list[str]:
        """Return the normal names of the images."""
        return [normal_name(name) for name in self.listed]

    def records(self) -> dict[str, Record]:
        """Return all records by the name of their image, in the order of the shards."""
        return {
            name: record
            for _, records in sorted(self._notes.items())
            for name, record in records.items()
        }

    def missing(self) -> list[str]:
        """Return the images without records, as they are listed."""
        have = self.records()
        return [name for name in self.listed if normal_name(name) not in have]

    def save(self) -> None:
        """Write the file that names the images."""
        about = {
            "share": str(self.share),
            "manifest": json.loads(self.manifest.to_json()),
            "moved": self.moved,
            "rows": self.rows,
            "names": self.listed,
        }
        self._write(SHARE_FILE, json.dumps(about).encode())

    def add(self, records: Iterable[tuple[str, Record]], more: Statements = ()) -> None:
        """Add records to the notes of their shards; ``more`` is for an index in SQLite."""
        assert not more
        changed = set()
        for name, record in records:
            self._notes.setdefault(record.shard, {})[name] = record
            changed.add(record.shard)
        self._write_notes(changed)

    def remove(self, names: Iterable[str]) -> None:
        """Remove records from the notes."""
        gone = set(names)
        changed = [shard for shard, records in self._notes.items() if gone & records.keys()]
        for shard in changed:
            records = self._notes[shard]
            self._notes[shard] = {name: r for name, r in records.items() if name not in gone}
        self._write_notes(changed)

    def mark_moved(self, output: Path) -> None:
        """Note that all records are in ``output``, and delete them here; the notes stay."""
        self.moved = str(output)
        self.save()
        with disk_errors(self.directory):
            for file in self.directory.glob(SHARD_FILES):
                file.unlink()

    def close(self) -> None:
        """Do nothing: there are no open files."""

    def _write_notes(self, shards: Iterable[int]) -> None:
        for shard in shards:
            self._write(note_name(shard), encode_note(self.manifest, self._notes[shard].items()))

    def _write(self, name: str, text: bytes) -> None:
        with disk_errors(self.directory), atomic_file(self.directory / name) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.directory)


def is_merged(output: Path, share: Share, manifest: Manifest) -> bool:
    """Return True if this share, or all of them, were merged: the job has nothing to do."""
    folder = share.folder(output)
    if (folder / SHARE_FILE).is_file():
        found = ShareFolder.read(folder)
        return bool(found.moved) and found.manifest == manifest
    return is_finished(output, manifest)


def check_no_shares(output: Path) -> None:
    """Raise FeatureError if shares wait to be merged, so that none is extracted again."""
    if not (output / GLOBAL_FILE).is_file() and find_shares(output):
        raise FeatureError(
            f"{output / SHARES_FOLDER} holds shares of an extraction; run patchnetvlad-store merge "
            f"{output} when all are done, or delete that folder to extract without --shard"
        )


def is_finished(output: Path, manifest: Manifest) -> bool:
    """Return whether a folder holds complete features with this manifest."""
    if (output / f"{MANIFEST_FILE}.part").is_file():  # a run was killed before renaming it
        return False
    return (output / GLOBAL_FILE).is_file() and present_manifests(output) == [manifest]
