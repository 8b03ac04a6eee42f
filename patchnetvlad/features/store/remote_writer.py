# SPDX-License-Identifier: MIT
"""Feature stores in object storage, written by many workers.

A worker writes a shard, ``features-00012.bin``, and then a note, ``features-00012.json``, which
lists the records in it: from then on they count. At the end the driver writes all of them to
``features.sqlite`` and ``globalfeats.npy``, and deletes the notes.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.interface import Written
from patchnetvlad.features.manifest import GLOBAL_FILE, INDEX_FILE, Manifest, other_features_error
from patchnetvlad.features.store.index import present_manifests
from patchnetvlad.features.store.notes import decode_note, encode_note, note_name
from patchnetvlad.features.store.records import read_record
from patchnetvlad.features.store.shard_writer import ShardWriter
from patchnetvlad.features.store.writer import StoreWriter

_SHARD = re.compile(r"features-(\d+)\.(bin|json)")


class ObjectShardWriter(ShardWriter):
    """Writes one shard on the disk of this machine, and moves it to object storage in the end.

    Parameters
    ----------
    folder : RemoteFolder
    manifest : Manifest
        Of the features.
    shard, names, modified
        As for :class:`~patchnetvlad.features.store.shard_writer.ShardWriter`.
    """

    def __init__(
        self,
        folder: RemoteFolder,
        manifest: Manifest,
        shard: int,
        names: Mapping[int, str],
        modified: Mapping[int, int],
    ) -> None:
        super().__init__(Path(), shard, names, modified)
        self._folder, self._manifest = folder, manifest
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Create the file in a temporary folder."""
        self._temporary = tempfile.TemporaryDirectory(prefix="patchnetvlad-")
        self.directory = Path(self._temporary.name)
        super().start()

    def write(
        self, i: int, descriptor: NDArray[np.float32], arrays: Sequence[Any], modified: int = 0
    ) -> None:
        """Append a record, and keep its global descriptor; see :meth:`StoreWriter.write`."""
        super().write(i, descriptor, arrays, modified)
        self.written.descriptors[i] = descriptor

    def finish(self) -> Written:
        """Move the shard to object storage, and then its note; RemoteError if that fails."""
        written = super().finish()
        if written.records:
            self._folder.write(self.path.name, self.path)
            note = encode_note(self._manifest, written.records)
            self._folder.write(note_name(self.shard), note)
        return written

    def close(self) -> None:
        """Close the file, and delete it here."""
        super().close()
        if self._temporary is not None:
            self._temporary.cleanup()


class ObjectStoreWriter(StoreWriter):
    """The driver's side of a store in object storage.

    Parameters
    ----------
    folder : RemoteFolder
    directory : Path
        On the disk of this machine, for the index and, at the end, ``globalfeats.npy``.
    names : sequence of str
    manifest : Manifest
    image_paths : sequence of Path or str, optional
    resume : bool
        As for :class:`~patchnetvlad.features.store.writer.StoreWriter`.
    """

    def __init__(
        self,
        folder: RemoteFolder,
        directory: Path,
        names: Sequence[str],
        manifest: Manifest,
        image_paths: Sequence[Path | str] | None,
        resume: bool,
    ) -> None:
        self.folder = folder
        self._there = folder.names("features")
        self._rows: NDArray[np.float32] | None = None
        self._kept: set[str] = set()
        if resume and INDEX_FILE in self._there:
            folder.fetch(INDEX_FILE, directory / INDEX_FILE)
            for have in present_manifests(directory):
                if not manifest.may_continue(have):
                    raise other_features_error(folder, have, manifest)
        super().__init__(directory, names, manifest, image_paths, resume)
        self.location = folder
        if resume and INDEX_FILE in self._there:
            self._look_at_notes()

    def _shard_sizes(self) -> dict[str, int]:
        return self._there

    def _look_at_notes(self) -> None:
        """Reuse what workers of an interrupted run of this extraction have written."""
        for note in self._there:
            match = _SHARD.fullmatch(note)
            if match is None or match[2] != "json" or f"features-{match[1]}.bin" not in self._there:
                continue
            text, source = bytes(self.folder.read(note)), self.folder.url_of(note)
            for name, record in decode_note(text, self.manifest, source):
                rows = self._rows_of.get(name, [])
                if not rows or name in self.records:
                    continue
                if self._modified[rows[0]] in (0, record.modified):
                    self.records[name] = record
                    self.done[rows] = True

    @property
    def last_shard(self) -> int:
        """A random number after which new shards are numbered.

        Workers of a killed run may still be writing, and objects are overwritten silently.
        """
        return super().last_shard + secrets.randbelow(10**9)

    def start(self) -> None:
        """Prepare for writing; delete what is to be replaced and what does not count."""
        self.folder.delete([GLOBAL_FILE])  # first: without it the store counts as unfinished
        taken_over = dict(self.records)
        super().start()
        assert self._index is not None
        self._index.add(taken_over.items())
        if not taken_over:
            self.folder.write(INDEX_FILE, self.directory / INDEX_FILE)

    def _delete_unused_shards(self) -> None:
        """Delete shards without valid records."""
        used = self._shards_in_use()
        there = {name: _SHARD.fullmatch(name) for name in self.folder.names("features-")}
        self.folder.delete(n for n, match in there.items() if match and int(match[1]) not in used)

    def _part(
        self, shard: int, names: Mapping[int, str], modified: Mapping[int, int]
    ) -> ObjectShardWriter:
        return ObjectShardWriter(self.folder, self.manifest, shard, names, modified)

    def adopt(self, written: Written) -> None:
        """Enter what a worker has written; keep global descriptors, for the end."""
        for i, row in written.descriptors.items():
            if self._rows is None:  # on the disk, since they are as large as globalfeats.npy
                shape = len(self.names), len(row)
                self._rows = np.memmap(self.directory / "rows", np.float32, "w+", shape=shape)
            self._rows[self._rows_of[self.names[i]][0]] = row
            self._kept.add(self.names[i])
        super().adopt(written)

    def finish(self, failed: Mapping[str, str] | None = None, modified: int = 0) -> None:
        """Write ``features.sqlite`` and ``globalfeats.npy``; see :meth:`StoreWriter.finish`."""
        if self._index is None and GLOBAL_FILE in self.folder.names(GLOBAL_FILE):
            self.folder.fetch(GLOBAL_FILE, self.directory / GLOBAL_FILE)
            return  # there was nothing to do
        if self._index is None:
            self.start()
        super().finish(failed)
        self.folder.write(INDEX_FILE, self.directory / INDEX_FILE)
        self.folder.write(GLOBAL_FILE, self.directory / GLOBAL_FILE)
        self.folder.delete(n for n in self.folder.names("features-") if n.endswith(".json"))

    def global_descriptors(self) -> NDArray[np.float32]:
        """Return the global descriptors [N, P]."""
        return np.array(super().global_descriptors())  # since the file is temporary

    def _head(self, size: int, name: str) -> bytes | bytearray:
        if name in self._kept and self._rows is not None:
            return self._rows[self._rows_of[name][0]].tobytes()
        if name in self.records:
            return read_record(self.folder, self.records[name], name, head=True)
        return super()._head(size, name)


@contextlib.contextmanager
def open_object_store(
    folder: RemoteFolder,
    names: Sequence[str],
    manifest: Manifest,
    image_paths: Sequence[Path | str] | None,
    resume: bool,
) -> Iterator[ObjectStoreWriter]:
    """Open a folder in object storage for writing features; one driver at a time.

    Parameters
    ----------
    folder : RemoteFolder
    names : sequence of str
        The image list.
    manifest : Manifest
    image_paths : sequence of Path or str, optional
        Where the images are: features older than their image are not reused. The age of a URL is
        not known.
    resume : bool
        Resume from existing features; False replaces them.

    Yields
    ------
    ObjectStoreWriter

    Raises
    ------
    FeatureError
        Other features are there already, or ``local_features = npy``, which needs a disk.
    RemoteError
        The storage cannot be reached.
    """
    if manifest.patch_sizes and manifest.local_features == "npy":
        raise FeatureError(
            f"local_features = npy writes one file per image and patch size, which {folder} is not "
            "made for; give float16, int8 or map"
        )
    with tempfile.TemporaryDirectory(prefix="patchnetvlad-") as directory:
        writer = ObjectStoreWriter(folder, Path(directory), names, manifest, image_paths, resume)
        with contextlib.closing(writer):
            yield writer
