# SPDX-License-Identifier: MIT
"""Image lists and ground truth of one's own images."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from patchnetvlad.base.files import make_folder, replace_text
from patchnetvlad.datasets.ground_truth import CLIP_DISTANCE, GroundTruth
from patchnetvlad.datasets.image_list import (
    IMAGE_SUFFIXES,
    ImageList,
    check_names,
    natural_key,
    write_names,
)
from patchnetvlad.datasets.images import image_troubles
from patchnetvlad.errors import ConfigError, GroundTruthError, ImageListError, OutputError
from patchnetvlad.own_data.choose import (
    ImagePart,
    check_options,
    choose_queries,
    facing_alike,
    group_same_content,
    names_in_both,
    spaced,
)
from patchnetvlad.own_data.positions.base import Positions
from patchnetvlad.own_data.positions.exif import positions_from_exif
from patchnetvlad.own_data.positions.names import (
    positions_from_frames,
    positions_from_names,
    positions_from_order,
)
from patchnetvlad.own_data.positions.plane import to_plane
from patchnetvlad.own_data.positions.poses import POSE_TOLERANCE, positions_from_poses
from patchnetvlad.own_data.positions.table import positions_from_table
from patchnetvlad.own_data.positions.track import GPX_TOLERANCE, positions_from_gpx
from patchnetvlad.own_data.summary import DatasetSummary, PositiveStatistics, positive_statistics
from patchnetvlad.plots.dataset_map import plot_dataset
from patchnetvlad.plots.drawing import save_figure

logger = logging.getLogger(__name__)

SOURCES = ("auto", "names", "exif", "frames", "order")
DEFAULT_METRES = 25.0
DEFAULT_FRAMES = 2.0
INDEX_FILE, QUERY_FILE = "index.txt", "query.txt"
GROUND_TRUTH_FILE, TABLE_FILE, MAP_FILE = "ground_truth.npz", "positions.csv", "map.png"
_UNREADABLE = (".heic", ".heif", ".avif", ".dng", ".cr2", ".nef", ".arw", ".mp4", ".mov")


def create_dataset(
    output_dir: str | Path,
    *,
    images: str | Path | None = None,
    index: str | Path | None = None,
    queries: str | Path | None = None,
    root: str | Path = "",
    positions: str | Path = "auto",
    query_positions: str | Path | None = None,
    query_every: int | None = None,
    query_start: int | None = None,
    query_pattern: str | None = None,
    order: str = "natural",
    frame_pattern: str | None = None,
    columns: Mapping[str, str] | None = None,
    time_offset: float = 0.0,
    time_tolerance: float | None = None,
    pose_plane: str | None = None,
    threshold: float | None = None,
    spacing: float | None = None,
    max_heading_difference: float | None = None,
    check_content: bool = False,
    draw_map: bool = True,
) -> DatasetSummary:
    """Make image lists and ground truth from images whose positions are known.

    Parameters
    ----------
    output_dir : str or Path
        Gets ``index.txt``, ``query.txt``, ``ground_truth.npz`` (``utmQ`` [Q, 2] and ``utmDb``
        [N, 2] of float64, ``posDistThr``), ``positions.csv`` (image, set, x, y, heading) and
        ``map.png``.
    images : str or Path, optional
        A folder, with those below it, or an image list, that queries are chosen from by
        ``query_every`` or ``query_pattern``; the others are the index.
    index, queries : str or Path, optional
        A folder or an image list each, in place of ``images``.
    root : str or Path
        Names are written relative to it; folders and lists may be, too. Without it, names begin
        with the folder as it is given.
    positions : str or Path
        ``names`` (UTM in file names), ``exif``, ``frames`` (clip and frame number in file names),
        ``order`` (the i-th query is where the i-th index image is), or a file: ``.csv``, ``.tsv``,
        ``.gpx``, or poses of KITTI or TUM. ``auto`` takes UTM from the names if there is any, else
        EXIF.
    query_positions : str or Path, optional
        The same for the queries, if it is another source.
    query_every : int, optional
        Of ``images``, every n-th of each sequence is a query. A sequence is a clip or a folder.
    query_start : int, optional
        The first query of each sequence, from 1; by default the n-th.
    query_pattern : str, optional
        Of ``images``, those whose name holds this regular expression are queries.
    order : {"natural", "plain"}
        Of images in folders: numbers by value (2 before 10), or character by character.
    frame_pattern : str, optional
        See :func:`~patchnetvlad.own_data.positions.names.positions_from_frames`.
    columns : mapping of str to str, optional
        See :func:`~patchnetvlad.own_data.positions.table.positions_from_table`.
    time_offset : float
        Seconds to add to the images' times to get those of a GPX track.
    time_tolerance : float, optional
        Seconds from an image to the nearest point of a track (default 10) or pose (0.1).
    pose_plane : {"xz", "xy", "yz"}, optional
        The axes of poses that are kept; xz for KITTI, xy for TUM by default.
    threshold : float, optional
        An index image within this distance of a query is right; 25 m or 2 frames by default.
    spacing : float, optional
        Keep an image only if it is this far from the one kept before it in its sequence.
    max_heading_difference : float, optional
        Degrees. Queries that have positives, all of which face elsewhere, are left out. Ground
        truth itself cannot hold headings: of the queries that stay, index images that face
        elsewhere still count as right, and are counted in the summary.
    check_content : bool, default False
        Look for images of equal content; reads files of equal size.
    draw_map : bool, default True
        Write ``map.png``.

    Returns
    -------
    DatasetSummary
        Of what was written, read back.

    Raises
    ------
    ConfigError
        Options that contradict each other.
    ImageListError
        There are no images, or no queries, or no index.
    GroundTruthError
        Positions that cannot be read, or no image that has one.
    OutputError
        The folder cannot be written, or a file in it is one that was given.
    """
    check_options(images, index, queries, query_every, query_start, query_pattern, order)
    for what, value in (("threshold", threshold), ("spacing", spacing)):
        if value is not None and not (np.isfinite(value) and value >= 0):
            raise ConfigError(f"{what} = {value} must be 0 or more")
    limit = max_heading_difference
    if limit is not None and not 0 <= limit <= 180:
        raise ConfigError(f"max_heading_difference = {limit} must be from 0 to 180 degrees")
    out = Path(output_dir)
    given = [images, index, queries, positions, query_positions]
    _check_inputs_stay(out, [value for value in given if value is not None])

    read = _Reader(
        root, frame_pattern, columns or {}, time_offset, time_tolerance, pose_plane
    )  # fmt: skip
    parts: list[ImagePart] = []
    if images is not None:
        names, folders, repeated = _names(images, root, order, out)
        found, source = read.one(positions, names, folders)
        parts.append(ImagePart(names, found))
    else:
        assert index is not None
        assert queries is not None
        names, folders, repeated = _names(index, root, order, out)
        query_names, query_folders, again = _names(queries, root, order, out)
        repeated += again
        parts, source = read.two(
            (positions, names, folders), (query_positions, query_names, query_folders)
        )

    every = [name for part in parts for name in part.names]
    known = np.concatenate([part.found.known for part in parts])
    without = tuple(dict.fromkeys(n for n, ok in zip(every, known, strict=True) if not ok))
    notes = [note for part in parts for note in part.found.notes]
    if not known.any():
        heic = _unreadable_beside([images, index, queries], root)
        reason = "; ".join([*notes, *heic])
        raise GroundTruthError(
            f"none of the {len(every)} images has a position by {source}"
            f"{f' ({reason})' if reason else ''}; first image: {every[0]}. Other sources: "
            f"{', '.join(SOURCES[1:])}, or a file (.csv, .tsv, .gpx, poses)"
        )
    plane = to_plane([part.found for part in parts])
    notes += [*plane.notes, *_unreadable_beside([images, index, queries], root)]
    for part, values in zip(parts, plane.values, strict=True):
        part.values = values
    if threshold is None:
        threshold = DEFAULT_FRAMES if plane.kind == "frames" else DEFAULT_METRES
    if plane.kind == "frames" and threshold >= CLIP_DISTANCE:
        raise ConfigError(
            f"threshold = {threshold:g} frames reaches into the next clip, which is "
            f"{CLIP_DISTANCE:g} away"
        )

    parts = [part.keep(part.found.known) for part in parts]
    before = sum(map(len, parts))
    if spacing:
        parts = [part.keep(spaced(part, spacing)) for part in parts]
    thinned = before - sum(map(len, parts))
    if images is not None:
        chosen = choose_queries(parts[0], query_every, query_start, query_pattern)
        parts = [parts[0].keep(~chosen), parts[0].keep(chosen)]
    for what, part in zip(("index images", "queries"), parts, strict=True):
        if not len(part):
            raise ImageListError(
                f"no {what} are left of {len(every)} images ({len(without)} without a position); "
                "is the choice of queries right?"
            )
    database, query = parts
    truth = GroundTruth(query.values, database.values, float(threshold))
    facing: int | None = None
    dropped: tuple[str, ...] = ()
    if limit is not None:
        keep, facing = facing_alike(truth, query.found.headings, database.found.headings, limit)
        dropped = tuple(name for name, ok in zip(query.names, keep, strict=True) if not ok)
        query = query.keep(keep)
        if not len(query):
            raise ImageListError(
                f"no query is left: the positives of all {len(dropped)} face elsewhere by more "
                f"than {limit:g} degrees; are headings right?"
            )
        truth = replace(truth, utm_queries=query.values)

    make_folder(out)
    _write(out, database, query, truth)
    summary = DatasetSummary(
        folder=out,
        source=source,
        num_index=len(database),
        num_queries=len(query),
        threshold=truth.threshold,
        unit="frames" if plane.kind == "frames" else "m",
        zone=plane.zone,
        extent=_extent(truth),
        statistics=_read_back(out, database.names, query.names),
        without_position=without,
        num_thinned=thinned,
        dropped_by_heading=dropped,
        num_facing_elsewhere=facing,
        num_without_heading=0
        if limit is None
        else int(sum(np.isnan(part.found.headings).sum() for part in (database, query))),
        repeated=tuple(repeated),
        in_both=names_in_both(query.names, database.names, root),
        same_place=len(database) - len(np.unique(database.values, axis=0)),
        same_content=group_same_content([*database.names, *query.names], root)
        if check_content
        else (),
        unreadable=_unreadable(out, root),
        notes=tuple(dict.fromkeys(notes)),
    )
    missing = summary.statistics.without
    summary = replace(summary, without_positive=tuple(query.names[q] for q in missing))
    if draw_map:
        title = f"{len(database)} index images, {len(query)} queries"
        figure = plot_dataset(truth, missing, unit=summary.unit, zone=plane.zone, title=title)
        save_figure(figure, out / MAP_FILE)
    return summary


def _check_inputs_stay(out: Path, given: Sequence[str | Path]) -> None:
    """Raise OutputError if a file that is to be read would be replaced."""
    written = (INDEX_FILE, QUERY_FILE, GROUND_TRUTH_FILE, TABLE_FILE, MAP_FILE)
    targets = {os.path.abspath(out / name) for name in written}
    for value in given:
        if os.path.abspath(value) in targets:
            raise OutputError(f"{value} would be replaced by what is written; name another folder")


def _place(source: str | Path, root: str | Path) -> Path:
    """Return the folder or file meant by a path, which may be relative to the root."""
    below = Path(root) / source
    try:
        return below if root and below.exists() else Path(source)
    except (OSError, ValueError):
        return Path(source)


def _names(
    source: str | Path, root: str | Path, order: str, out: Path
) -> tuple[list[str], list[Path], list[str]]:
    """Return the images in a folder or list, their folder, and names that came twice."""
    place = _place(source, root)
    if place.is_dir():
        return _names_in_folder(place, root, order, out), [place], []
    listed = ImageList.read(place)
    counts = Counter(listed.names)
    return list(counts), [], [name for name, count in counts.items() if count > 1]


def _names_in_folder(folder: Path, root: str | Path, order: str, out: Path) -> list[str]:
    """List images in a folder and below it, but hidden ones and our own map."""
    own_map = os.path.abspath(out / MAP_FILE)
    names = []
    for file in folder.rglob("*"):
        inside = file.relative_to(folder)
        if file.suffix.lower() not in IMAGE_SUFFIXES or not file.is_file():
            continue
        if os.path.abspath(file) == own_map or any(part.startswith(".") for part in inside.parts):
            continue
        if root:
            try:
                file = Path(os.path.abspath(file)).relative_to(os.path.abspath(root))
            except ValueError:
                raise ConfigError(f"the folder {folder} is not below the root {root}") from None
        names.append(file.as_posix())
    if not names:
        hint = "; ".join(_unreadable_beside([folder], ""))
        raise ImageListError(
            f"there is no image in {folder} or below it ({' '.join(IMAGE_SUFFIXES)})"
            f"{f'; {hint}' if hint else ''}"
        )
    return sorted(names, key=natural_key) if order == "natural" else sorted(names)


def _unreadable_beside(sources: Sequence[str | Path | None], root: str | Path) -> list[str]:
    """Say how many files in folders are pictures of a kind that is not read."""
    counts: Counter[str] = Counter()
    for source in sources:
        folder = _place(source, root) if source is not None else None
        if folder is not None and folder.is_dir():
            suffixes = (file.suffix.lower() for file in folder.rglob("*"))
            counts.update(suffix for suffix in suffixes if suffix in _UNREADABLE)
    return [
        f"{count} {suffix} files are not read; convert them to JPEG"
        for suffix, count in sorted(counts.items())
    ]


@dataclass(frozen=True)
class _Reader:
    """Reads positions from whatever source."""

    root: str | Path
    frame_pattern: str | None
    columns: Mapping[str, str]
    time_offset: float
    time_tolerance: float | None
    pose_plane: str | None

    def one(
        self, source: str | Path, names: list[str], folders: list[Path], in_order: bool = True
    ) -> tuple[Positions, str]:
        """Return positions, and what they were read from, in words.

        ``in_order`` says whether the names are one sequence.
        """
        if source == "auto":
            found = positions_from_names(names)
            if found.known.any():
                return found, "UTM in file names"
            return positions_from_exif(names, root=self.root), "EXIF data"
        if source == "names":
            return positions_from_names(names), "UTM in file names"
        if source == "exif":
            return positions_from_exif(names, root=self.root), "EXIF data"
        if source == "frames":
            return positions_from_frames(names, self.frame_pattern), "frame numbers in file names"
        if source == "order":
            return positions_from_order(len(names)), "places in the lists"
        return self._from_file(Path(source), names, folders, in_order), str(source)

    def _from_file(
        self, file: Path, names: list[str], folders: list[Path], in_order: bool
    ) -> Positions:
        file = _place(file, self.root)
        suffix = file.suffix.lower()
        if not file.is_file():
            known = f"{', '.join(SOURCES)} or a file"
            raise GroundTruthError(f"there is no file of positions {file}; give {known}")
        if suffix in (".csv", ".tsv"):
            return positions_from_table(
                file, names, root=self.root, folders=folders, columns=self.columns
            )
        if suffix == ".gpx":
            tolerance = GPX_TOLERANCE if self.time_tolerance is None else self.time_tolerance
            return positions_from_gpx(
                file,
                names,
                root=self.root,
                time_offset=self.time_offset,
                time_tolerance=tolerance,
            )
        tolerance = POSE_TOLERANCE if self.time_tolerance is None else self.time_tolerance
        return positions_from_poses(
            file, names, plane=self.pose_plane, time_tolerance=tolerance, in_order=in_order
        )

    def two(
        self,
        index: tuple[str | Path, list[str], list[Path]],
        queries: tuple[str | Path | None, list[str], list[Path]],
    ) -> tuple[list[ImagePart], str]:
        """Return the parts of index and queries; from one source they are read together."""
        source, names, folders = index
        query_source, query_names, query_folders = queries
        if source == "order" and query_source in (None, "order"):
            if len(names) != len(query_names):
                logger.warning(
                    "%d index images and %d queries are aligned by their order, from the first on",
                    len(names),
                    len(query_names),
                )
            parts = [
                ImagePart(part, positions_from_order(len(part))) for part in (names, query_names)
            ]
            return parts, "places in the lists"
        if query_source is None or query_source == source:
            every = names + query_names
            both, where = self.one(source, every, folders + query_folders, in_order=False)
            database = both.take(slice(0, len(names)))
            # Notes concern both; one of the parts carries them.
            database = replace(database, notes=both.notes)
            found = both.take(slice(len(names), None))
            return [ImagePart(names, database), ImagePart(query_names, found)], where
        first, where = self.one(source, names, folders)
        second, query_where = self.one(query_source, query_names, query_folders)
        if where != query_where:
            where = f"{where} (index), {query_where} (queries)"
        return [ImagePart(names, first), ImagePart(query_names, second)], where


def _extent(truth: GroundTruth) -> tuple[float, float]:
    both = np.concatenate([truth.utm_queries, truth.utm_index])
    width, height = np.ptp(both, axis=0)
    return float(width), float(height)


def _read_back(out: Path, index_names: list[str], query_names: list[str]) -> PositiveStatistics:
    """Read the files that were written, as matching will, and measure what they hold."""
    truth = GroundTruth.load(out / GROUND_TRUTH_FILE)
    truth.check_counts(len(query_names), len(index_names), out / GROUND_TRUTH_FILE)
    return positive_statistics(truth)


def _unreadable(out: Path, root: str | Path) -> tuple[str, ...]:
    """Name the images in the lists that cannot be read."""
    return tuple(
        name
        for images in (ImageList.read(out / file) for file in (INDEX_FILE, QUERY_FILE))
        for name, trouble in zip(
            images.names, image_troubles(images.image_paths(root)), strict=True
        )
        if trouble
    )


def _write(out: Path, database: ImagePart, query: ImagePart, truth: GroundTruth) -> None:
    """Write lists, ground truth and the table, each under its name at last."""
    check_names([*database.names, *query.names], "an image list")
    write_names(database.names, out / INDEX_FILE)
    write_names(query.names, out / QUERY_FILE)
    truth.save(out / GROUND_TRUTH_FILE)
    rows = ["image,set,x,y,heading\n"]
    for name, part in (("index", database), ("query", query)):
        for image, (x, y), heading in zip(
            part.names, part.values.tolist(), part.found.headings.tolist(), strict=True
        ):
            quoted = '"' + image.replace('"', '""') + '"' if re.search(r'[",#]', image) else image
            rows.append(f"{quoted},{name},{x!r},{y!r},{'' if heading != heading else heading}\n")
    replace_text(out / TABLE_FILE, rows)
