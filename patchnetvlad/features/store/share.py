# SPDX-License-Identifier: MIT
"""The share of one job, ``--shard I/N``: its images, its folder, its writer."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import make_folder
from patchnetvlad.base.names import normal_name
from patchnetvlad.errors import ArgumentError, FeatureError
from patchnetvlad.features.lock import locked
from patchnetvlad.features.manifest import (
    GLOBAL_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    SHARES_FOLDER,
    Manifest,
    find_shares,
    refuse,
)
from patchnetvlad.features.names import unfinished
from patchnetvlad.features.store.index import StoreIndex, present_manifests
from patchnetvlad.features.store.records import read_record
from patchnetvlad.features.store.writer import StoreWriter


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

    def places(self, names: Sequence[str], batch_size: int) -> list[int]:
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
        >>> [Share(i, 2).places(names, batch_size=2) for i in (0, 1)]
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


class ShareWriter(StoreWriter):
    """Appends to the store of one job, which has no ``globalfeats.npy``.

    Parameters
    ----------
    directory : Path
    share : Share
    places : sequence of int
        Rows of its images in the whole list.
    names : sequence of str
        Of its images. Rows in :meth:`write` are rows of this list.
    manifest : Manifest
        Of the whole list.
    image_paths : sequence of Path
    resume : bool, default True
    """

    def __init__(
        self,
        directory: Path,
        share: Share,
        places: Sequence[int],
        names: Sequence[str],
        manifest: Manifest,
        image_paths: Sequence[Path | str],
        resume: bool = True,
    ) -> None:
        super().__init__(directory, names, manifest, image_paths, resume)
        self.share = share
        self.places = places
        self.listed = names

    def _create_index(self) -> StoreIndex:
        return StoreIndex.create(
            self.directory, self.listed, self.manifest, self.places, str(self.share)
        )

    def finish(self, failed: Mapping[str, str] | None = None) -> None:
        """Make sure that all images have features; FeatureError if some are missing."""
        self.commit()
        if not self.done.all():
            raise unfinished(self.directory, int((~self.done).sum()))
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
    places: Sequence[int],
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
    places : sequence of int
        As :meth:`Share.places` returns them.
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
    folder = make_folder(share.folder(output))
    with locked(folder):
        if resume:
            for directory in (output, folder):
                for have in present_manifests(directory):
                    if have != manifest:
                        raise refuse(directory, have, manifest)
            if (folder / INDEX_FILE).is_file():
                _check_same_share(folder, share, places)
        writer = ShareWriter(folder, share, places, names, manifest, image_paths, resume)
        with contextlib.closing(writer):
            yield writer


def _check_same_share(folder: Path, share: Share, places: Sequence[int]) -> None:
    with contextlib.closing(StoreIndex(folder)) as index:
        rows = index.rows("SELECT place FROM images ORDER BY place")
    if index.share != str(share) or [row for (row,) in rows] != list(places):
        what = f"share {index.share}" if index.share else "features"
        raise FeatureError(
            f"{folder} holds {what} with other images than share {share} has now; was it started "
            "with another cachebatchsize? Give that one, or --no-resume to replace them"
        )


def is_merged(output: Path, share: Share, manifest: Manifest) -> bool:
    """Return True if this share, or all of them, were merged: the job has nothing to do."""
    folder = share.folder(output)
    if (folder / INDEX_FILE).is_file():
        with contextlib.closing(StoreIndex(folder)) as index:
            return bool(index.moved) and index.manifest == manifest
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
