# SPDX-License-Identifier: MIT
"""Folders of indexes: which of them can be written, and how one replaces another."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from patchnetvlad.base.files import is_temporary, remove_leftovers, sync_file, sync_folder
from patchnetvlad.errors import FeatureError, OutputError
from patchnetvlad.features.lock import LOCK_FILE, locked
from patchnetvlad.features.manifest import GLOBAL_FILE, INDEX_FILE, SHARD_FILES
from patchnetvlad.features.store.index import StoreIndex
from patchnetvlad.places.saved import FAISS_FILE, LIST_FILE

_NUMBERED = "features-[0-9]*.bin"


def is_replaceable(folder: Path) -> bool:
    """Tell whether a folder is empty, or holds a saved index and nothing else."""
    if not folder.is_dir():
        return False
    ours = {INDEX_FILE, f"{INDEX_FILE}-journal", LOCK_FILE, GLOBAL_FILE, LIST_FILE, FAISS_FILE}
    there = {file.name: file.is_file() for file in folder.iterdir() if not is_temporary(file.name)}
    shards = {file.name for file in folder.glob(SHARD_FILES)}
    if not all(is_file and name in ours | shards for name, is_file in there.items()):
        return False
    if INDEX_FILE not in there:
        return is_unused(folder)
    with contextlib.closing(StoreIndex(folder)) as index:
        return index.has_places or not index.names()


def is_unused(folder: Path) -> bool:
    """Tell whether a new index can live in a folder: what killed processes leave does not count.

    They leave shards without an index, in which nothing can be found.
    """
    remove_leftovers(folder)
    left = {folder / LOCK_FILE, folder / f"{INDEX_FILE}-journal", *folder.glob(SHARD_FILES)}
    there = [file for file in folder.iterdir() if not is_temporary(file.name)]
    return all(file in left and file.is_file() for file in there)


def put_in_place(part: Path, target: Path) -> None:
    """Let a complete index take the place of another, or of none: at once, or not at all.

    It is the SQLite index that says which records there are; without ``globalfeats.npy``, they are
    read one by one.

    Parameters
    ----------
    part : Path
        Folder of the new one, inside the other; its shards have numbers of their own.
    target : Path
    """
    old = [*target.glob(SHARD_FILES)]
    (target / GLOBAL_FILE).unlink(missing_ok=True)
    if (target / INDEX_FILE).is_file():
        with contextlib.closing(StoreIndex(target, writable=True)) as index:
            index.names()  # rolls back what a killed process has begun
    (target / f"{INDEX_FILE}-journal").unlink(missing_ok=True)  # it would change the new index
    for shard in part.glob(SHARD_FILES):
        sync_file(shard)
        os.replace(shard, target / shard.name)
    sync_folder(target)
    os.replace(part / INDEX_FILE, target / INDEX_FILE)
    sync_folder(target)
    (target / FAISS_FILE).unlink(missing_ok=True)
    for name in (LIST_FILE, FAISS_FILE, GLOBAL_FILE):
        if (part / name).is_file():
            os.replace(part / name, target / name)
    for shard in old:
        shard.unlink()


def free_numbers(folder: Path, count: int) -> int:
    """Return the first of ``count`` consecutive numbers that no shard in a folder has."""
    taken = {int(file.stem.rpartition("-")[2]) for file in folder.glob(_NUMBERED)}
    return 0 if not taken & set(range(count)) else max(taken) + 1


@contextlib.contextmanager
def locked_target(target: Path) -> Iterator[None]:
    """Keep others from a folder that is to be replaced; OutputError if they are there."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(target))
        except FeatureError:
            raise OutputError(
                f"{target} is being added to; close that index, or name another folder"
            ) from None
        yield


def remove_empty(folder: Path) -> None:
    """Delete a folder that nothing could be written to."""
    with contextlib.suppress(OSError):
        (folder / LOCK_FILE).unlink(missing_ok=True)
        folder.rmdir()


def delete_folder(folder: Path, process: int) -> None:
    """Delete a temporary folder, but not in a process that was forked from its own."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
