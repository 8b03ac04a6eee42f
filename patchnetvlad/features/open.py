# SPDX-License-Identifier: MIT
"""Opening features: the reader or writer for their layout on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from patchnetvlad.base.files import make_folder
from patchnetvlad.base.names import is_remote, url_of
from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.config import Config
from patchnetvlad.features.interface import Reader, Writer
from patchnetvlad.features.lock import locked
from patchnetvlad.features.manifest import (
    INDEX_FILE,
    Manifest,
    check_no_share,
    other_features_error,
)
from patchnetvlad.features.npy_files import NpyReader
from patchnetvlad.features.npy_writer import NpyWriter
from patchnetvlad.features.store.index import present_manifests
from patchnetvlad.features.store.reader import StoreReader
from patchnetvlad.features.store.remote_writer import open_object_store
from patchnetvlad.features.store.writer import StoreWriter


def open_reader(
    directory: str | Path, names: Sequence[str], config: Config, dataset_root: str | Path = ""
) -> Reader:
    """Open the features in a directory, whatever their layout.

    The parameters and errors are those of :class:`StoreReader`; ``.npy`` files must be on a disk.
    """
    if is_remote(directory) or (Path(directory) / INDEX_FILE).is_file():
        return StoreReader(directory, names, config, dataset_root)
    check_no_share(Path(directory))
    return NpyReader(directory, names, config, dataset_root)


@contextlib.contextmanager
def open_writer(
    directory: str | Path,
    names: Sequence[str],
    manifest: Manifest,
    image_paths: Sequence[Path | str] | None = None,
    resume: bool = True,
) -> Iterator[Writer]:
    """Open a directory for writing features, and lock it against other processes.

    Parameters
    ----------
    directory : str or Path
        Created if it is missing; or a URL, where one process at a time may write.
    names : sequence of str
        The image list.
    manifest : Manifest
        Its ``local_features`` chooses between a store and ``.npy`` files.
    image_paths : sequence of Path or str, optional
        Where the images are: features older than their image are not reused. The age of a URL is
        not known.
    resume : bool, default True
        Resume from existing features, also of another list; False replaces them.

    Yields
    ------
    Writer

    Raises
    ------
    FeatureError
        Features of other settings are there already, or ``.npy`` files of another list, or another
        process writes there; or ``.npy`` files in object storage.
    OutputError
        The directory cannot be created.
    RemoteError
        Object storage cannot be reached.
    """
    if is_remote(directory):
        remote = RemoteFolder(url_of(directory))
        with open_object_store(remote, names, manifest, image_paths, resume) as store:
            yield store
        return
    folder = make_folder(directory)
    with locked(folder):
        if resume:
            check_no_share(folder)
            for have in present_manifests(folder):
                if not manifest.may_continue(have):
                    raise other_features_error(folder, have, manifest)
        kind = NpyWriter if manifest.local_features == "npy" else StoreWriter
        writer: Writer = kind(folder, names, manifest, image_paths, resume)
        with contextlib.closing(writer):
            yield writer
