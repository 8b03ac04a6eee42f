# SPDX-License-Identifier: MIT
"""Writing the share of one job, ``--shard I/N``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import make_folder
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.lock import locked
from patchnetvlad.features.manifest import SHARE_FILE, Manifest, other_features_error
from patchnetvlad.features.names import unfinished_error
from patchnetvlad.features.store.index import present_manifests
from patchnetvlad.features.store.records import read_record
from patchnetvlad.features.store.share import Share, ShareFolder
from patchnetvlad.features.store.writer import StoreWriter


class ShareWriter(StoreWriter):
    """Appends to the shards of one job, which has no ``globalfeats.npy``.

    The numbers of shards are I, I + N and so on, so that those of all jobs can be in one folder.

    Parameters
    ----------
    folder : ShareFolder
        Rows in :meth:`write` are rows of its list.
    image_paths : sequence of Path
    resume : bool, default True
    """

    index_file = SHARE_FILE

    def __init__(
        self, folder: ShareFolder, image_paths: Sequence[Path | str], resume: bool = True
    ) -> None:
        super().__init__(folder.directory, folder.listed, folder.manifest, image_paths, resume)
        self._folder = folder
        self._first_shard, self._shard_step = folder.share.index, folder.share.count

    def _create_index(self) -> ShareFolder:
        self._folder.save()
        return self._folder

    def _open_index(self, writable: bool = False) -> ShareFolder:
        return ShareFolder.read(self.directory)

    def finish(self, failed: Mapping[str, str] | None = None, modified: int = 0) -> None:
        """Make sure that all images have features; FeatureError if some are missing."""
        self.commit()
        if not self.done.all():
            raise unfinished_error(self.directory, int((~self.done).sum()))
        if not self.names:
            self.start()  # shows a merge that this job has run

    def global_descriptors(self) -> NDArray[np.float32]:
        """Read the global descriptors [n, P] from the records; FeatureError if one is damaged."""
        records = [self.records[name] for name in self.names]
        dimension = records[0].head // 4 if records else self.manifest.num_pcs
        rows = np.empty((len(records), dimension), dtype=np.float32)
        for row, name, record in zip(rows, self.names, records, strict=True):
            row[:] = np.frombuffer(read_record(self.directory, record, name, head=True), np.float32)
        return rows


@contextlib.contextmanager
def open_share(
    output: Path,
    share: Share,
    rows: Sequence[int],
    names: Sequence[str],
    manifest: Manifest,
    image_paths: Sequence[Path | str],
    resume: bool = True,
) -> Iterator[ShareWriter]:
    """Open the store of a job for writing, and lock it against other processes.

    Parameters
    ----------
    output : Path
        The folder for the features of the whole list. The job writes only to its own folder below
        it.
    share : Share
    rows : sequence of int
        As :meth:`Share.rows` returns them.
    names : sequence of str
        Of the images in these rows.
    manifest : Manifest
        Of the whole list.
    image_paths : sequence of Path
        Where the images in these rows are.
    resume : bool, default True
        Resume from existing features of the job; False replaces them.

    Yields
    ------
    ShareWriter

    Raises
    ------
    FeatureError
        Other features are there already, or another process writes there.
    OutputError
        The folder cannot be created.
    """
    directory = make_folder(share.folder(output))
    folder = ShareFolder(directory, share, manifest, list(rows), list(names))
    with locked(directory):
        if resume:
            for other in present_manifests(output):
                if other != manifest:
                    raise other_features_error(output, other, manifest)
            if (directory / SHARE_FILE).is_file():
                have = ShareFolder.read(directory)
                if have.manifest != manifest:
                    raise other_features_error(directory, have.manifest, manifest)
                if have.share != share or have.rows != folder.rows:
                    raise FeatureError(
                        f"{directory} holds share {have.share} with other images than share "
                        f"{share} has now; was it started with another cachebatchsize? Give that "
                        "one, or --no-resume to replace them"
                    )
        with contextlib.closing(ShareWriter(folder, image_paths, resume)) as writer:
            yield writer
