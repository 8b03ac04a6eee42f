# SPDX-License-Identifier: MIT
"""Positions by the name of their source: file names, EXIF data, order, or a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from patchnetvlad.datasets.kinds import kind_of
from patchnetvlad.errors import GroundTruthError
from patchnetvlad.own_data.choose import ImagePart
from patchnetvlad.own_data.listing import Listed, resolve
from patchnetvlad.own_data.positions.base import Positions
from patchnetvlad.own_data.positions.exif import positions_from_exif
from patchnetvlad.own_data.positions.names import (
    positions_from_frames,
    positions_from_names,
    positions_from_order,
)
from patchnetvlad.own_data.positions.poses import POSE_TOLERANCE, positions_from_poses
from patchnetvlad.own_data.positions.reconstruction import (
    find_kapture,
    find_reconstruction,
    positions_from_reconstruction,
)
from patchnetvlad.own_data.positions.table import positions_from_table
from patchnetvlad.own_data.positions.track import GPX_TOLERANCE, positions_from_gpx

logger = logging.getLogger(__name__)

SOURCES = ("auto", "names", "exif", "frames", "order")
"""Sources that are not files."""
_BY_ORDER = "order of the lists"


@dataclass(frozen=True)
class PositionReader:
    """Reads the positions of images from any source.

    Attributes
    ----------
    root, frame_pattern, columns, time_offset, time_tolerance, pose_plane
        As for :func:`~patchnetvlad.own_data.create.create_dataset`.
    """

    root: str | Path
    frame_pattern: str | None
    columns: Mapping[str, str]
    time_offset: float
    time_tolerance: float | None
    pose_plane: str | None

    def read(
        self, source: str | Path, images: Listed, *, in_order: bool = True
    ) -> tuple[Positions, str]:
        """Read the positions of images.

        Parameters
        ----------
        source : str or Path
            One of ``SOURCES``, or a file.
        images : Listed
            n images.
        in_order : bool, default True
            Whether the images are one sequence.

        Returns
        -------
        positions : Positions
            Of the n images.
        where : str
            What the positions were read from, in words.

        Raises
        ------
        GroundTruthError
            There is no such file, or it cannot be read.
        """
        names = images.names
        if source == "auto":
            found = positions_from_names(names)
            if found.known.any():
                return found, "UTM in file names"
            if len(kapture := {*filter(None, map(find_kapture, images.folders))}) == 1:
                return self.read(kapture.pop(), images)
            return positions_from_exif(names, root=self.root), "EXIF data"
        if source == "names":
            return positions_from_names(names), "UTM in file names"
        if source == "exif":
            return positions_from_exif(names, root=self.root), "EXIF data"
        if source == "frames":
            return positions_from_frames(names, self.frame_pattern), "frame numbers in file names"
        if source == "order":
            return positions_from_order(len(names)), _BY_ORDER
        return self._from_file(Path(source), images, in_order), str(source)

    def read_both(
        self,
        index: Listed,
        queries: Listed,
        source: str | Path,
        query_source: str | Path | None,
    ) -> tuple[list[ImagePart], str]:
        """Read the positions of index images and queries, together if they share a source.

        Parameters
        ----------
        index, queries : Listed
        source : str or Path
        query_source : str or Path, optional
            None: ``source``.

        Returns
        -------
        parts : [ImagePart, ImagePart]
            The index images and the queries.
        where : str
            What the positions were read from, in words.
        """
        if source == "order" and query_source in (None, "order"):
            return _aligned(index.names, queries.names), _BY_ORDER
        if query_source is None or query_source == source:
            together = Listed(index.names + queries.names, index.folders + queries.folders, [])
            both, where = self.read(source, together, in_order=False)
            count = len(index.names)
            # Notes concern both; one of the parts carries them.
            first = replace(both.take(slice(0, count)), notes=both.notes)
            second = both.take(slice(count, None))
        else:
            first, where = self.read(source, index)
            second, query_where = self.read(query_source, queries)
            if where != query_where:
                where = f"{where} (index), {query_where} (queries)"
        return [ImagePart(index.names, first), ImagePart(queries.names, second)], where

    def _from_file(self, source: Path, images: Listed, in_order: bool) -> Positions:
        file = resolve(source, self.root)
        suffix = file.suffix.lower()
        if find_reconstruction(file) is not None:
            return positions_from_reconstruction(file, images.names, plane=self.pose_plane)
        if not file.is_file():
            known = f"{', '.join(SOURCES)} or a file"
            raise GroundTruthError(f"there is no file of positions {file}; give {known}")
        if suffix in (".csv", ".tsv"):
            return positions_from_table(
                file, images.names, root=self.root, folders=images.folders, columns=self.columns
            )
        if suffix == ".gpx":
            tolerance = GPX_TOLERANCE if self.time_tolerance is None else self.time_tolerance
            return positions_from_gpx(
                file,
                images.names,
                root=self.root,
                time_offset=self.time_offset,
                time_tolerance=tolerance,
            )
        if kind := kind_of(file, tables=False):
            raise GroundTruthError(f"{file} holds no positions that can be read: {kind}")
        tolerance = POSE_TOLERANCE if self.time_tolerance is None else self.time_tolerance
        return positions_from_poses(
            file, images.names, plane=self.pose_plane, time_tolerance=tolerance, in_order=in_order
        )


def _aligned(index: list[str], queries: list[str]) -> list[ImagePart]:
    """Give the i-th query the position of the i-th index image."""
    if len(index) != len(queries):
        logger.warning(
            "%d index images and %d queries are aligned by their order, from the first on",
            len(index),
            len(queries),
        )
    return [ImagePart(names, positions_from_order(len(names))) for names in (index, queries)]
