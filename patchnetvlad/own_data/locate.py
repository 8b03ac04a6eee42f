# SPDX-License-Identifier: MIT
"""Positions of all images of a data set, on one plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patchnetvlad.datasets.ground_truth import CLIP_DISTANCE
from patchnetvlad.errors import ConfigError, GroundTruthError
from patchnetvlad.own_data.choose import ImagePart
from patchnetvlad.own_data.listing import Listed, unsupported_files
from patchnetvlad.own_data.positions.plane import Plane, to_plane
from patchnetvlad.own_data.positions.reader import SOURCES, PositionReader

DEFAULT_METRES = 25.0
DEFAULT_FRAMES = 2.0


@dataclass(frozen=True)
class Located:
    """All images with their positions on one plane, before any is left out.

    Attributes
    ----------
    parts : list of ImagePart
        [images] or [index images, queries].
    source : str
        What the positions were read from, in words.
    plane : Plane
    repeated : tuple of str
        Names that were given twice.
    without_position : tuple of str
    notes : tuple of str
        For the user.
    """

    parts: list[ImagePart]
    source: str
    plane: Plane
    repeated: tuple[str, ...]
    without_position: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def num_images(self) -> int:
        """Number of images."""
        return sum(map(len, self.parts))

    @property
    def num_known(self) -> int:
        """Number of images that have a position."""
        return int(sum(part.found.known.sum() for part in self.parts))


def locate(
    reader: PositionReader,
    listed: Sequence[Listed],
    source: str | Path,
    query_source: str | Path | None,
) -> Located:
    """Read the positions of all images, and project them onto one plane.

    Parameters
    ----------
    reader : PositionReader
    listed : sequence of Listed
        [images] or [index images, queries].
    source : str or Path
        See :meth:`~patchnetvlad.own_data.positions.reader.PositionReader.read`.
    query_source : str or Path, optional
        Of the queries, where it is another.

    Returns
    -------
    Located

    Raises
    ------
    GroundTruthError
        The positions cannot be read, or no image has one.
    """
    if len(listed) == 1:
        found, where = reader.read(source, listed[0])
        parts = [ImagePart(listed[0].names, found)]
    else:
        index, queries = listed
        parts, where = reader.read_both(index, queries, source, query_source)
    names = [name for part in parts for name in part.names]
    known = np.concatenate([part.found.known for part in parts])
    notes = [note for part in parts for note in part.found.notes]
    unsupported = unsupported_files(folder for one in listed for folder in one.folders)
    if not known.any():
        reason = "; ".join([*notes, *unsupported])
        raise GroundTruthError(
            f"none of the {len(names)} images has a position by {where}"
            f"{f' ({reason})' if reason else ''}; first image: {names[0]}. Other sources: "
            f"{', '.join(SOURCES[1:])}, or a file (.csv, .tsv, .gpx, poses)"
        )
    plane = to_plane([part.found for part in parts])
    return Located(
        [
            ImagePart(part.names, part.found, values)
            for part, values in zip(parts, plane.values, strict=True)
        ],
        where,
        plane,
        repeated=tuple(name for one in listed for name in one.repeated),
        without_position=tuple(
            dict.fromkeys(name for name, there in zip(names, known, strict=True) if not there)
        ),
        notes=tuple(dict.fromkeys([*notes, *plane.notes, *unsupported])),
    )


def distance_for(threshold: float | None, kind: str) -> float:
    """Return the distance for a positive, in metres or frames; ConfigError if it is too large."""
    if threshold is None:
        return DEFAULT_FRAMES if kind == "frames" else DEFAULT_METRES
    if kind == "frames" and threshold >= CLIP_DISTANCE:
        raise ConfigError(
            f"threshold = {threshold:g} frames reaches into the next clip, which is "
            f"{CLIP_DISTANCE:g} away"
        )
    return float(threshold)
