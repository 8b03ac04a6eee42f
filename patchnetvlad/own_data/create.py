# SPDX-License-Identifier: MIT
"""Making image lists and ground truth from your own images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from patchnetvlad.base.files import check_inputs_stay, make_folder, replace_text
from patchnetvlad.base.names import locate as locate_image
from patchnetvlad.base.text import table_cell
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList, check_names, write_names
from patchnetvlad.errors import ConfigError, ImageListError
from patchnetvlad.own_data.choose import (
    ImagePart,
    check_options,
    choose_queries,
    facing_alike,
    group_same_content,
    names_in_both,
    spaced,
)
from patchnetvlad.own_data.listing import list_images, resolve
from patchnetvlad.own_data.locate import Located, distance_for, locate
from patchnetvlad.own_data.positions.reader import PositionReader
from patchnetvlad.own_data.summary import DatasetSummary, PositiveStatistics, positive_statistics

INDEX_FILE, QUERY_FILE = "index.txt", "query.txt"
GROUND_TRUTH_FILE, TABLE_FILE, MAP_FILE = "ground_truth.npz", "positions.csv", "map.png"
_ELSEWHERE = "name another folder"


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
        A folder, including the folders below it, or an image list. ``query_every`` or
        ``query_pattern`` choose the queries; the other images are the index.
    index, queries : str or Path, optional
        Two folders or image lists, instead of ``images``.
    root : str or Path
        Names are written relative to it; folders and lists may also be given relative to it.
        Without it, names begin with the folder as given.
    positions : str or Path
        ``names`` (UTM in file names), ``exif``, ``frames`` (clip and frame number in file names),
        ``order`` (the i-th query is where the i-th index image is), or a file: ``.csv``, ``.tsv``,
        ``.gpx``, or poses of KITTI, TUM, COLMAP or kapture. ``auto`` takes UTM from the names if
        they have any, else the poses of a kapture folder, else EXIF.
    query_positions : str or Path, optional
        The source for the queries, if it differs.
    query_every : int, optional
        Of ``images``, every n-th of each sequence is a query. A sequence is a clip or a folder.
    query_start : int, optional
        The first query of each sequence, from 1; by default the n-th.
    query_pattern : str, optional
        Of ``images``, those whose name matches this regular expression are queries.
    order : {"natural", "plain"}
        Sort images in folders with numbers by value (2 before 10), or character by character.
    frame_pattern : str, optional
        See :func:`~patchnetvlad.own_data.positions.names.positions_from_frames`.
    columns : mapping of str to str, optional
        See :func:`~patchnetvlad.own_data.positions.table.positions_from_table`.
    time_offset : float
        Seconds to add to the images' times to get the times of a GPX track.
    time_tolerance : float, optional
        Seconds from an image to the nearest point of a track (default 10) or pose (0.1).
    pose_plane : {"xz", "xy", "yz"}, optional
        The axes of poses that are kept; by default xz for KITTI, xy for TUM, and the two over which
        cameras extend furthest for COLMAP and kapture.
    threshold : float, optional
        An index image within this distance of a query is right; 25 m or 2 frames by default.
    spacing : float, optional
        Keep an image only if it is this far from the one kept before it in its sequence.
    max_heading_difference : float, optional
        Degrees. Queries are left out if all their positives face elsewhere. Ground truth itself
        cannot hold headings: for the remaining queries, index images that face elsewhere still
        count as right; the summary counts them.
    check_content : bool, default False
        Look for images with equal content; reads files of equal size.
    draw_map : bool, default True
        Write ``map.png``.

    Returns
    -------
    DatasetSummary
        Summary of the files, read back after writing.

    Raises
    ------
    ConfigError
        Options that contradict each other.
    ImageListError
        There are no images, or no queries, or no index.
    GroundTruthError
        The positions cannot be read, or no image has one.
    OutputError
        The folder cannot be written, or a file in it is an input.
    """
    check_options(images, index, queries, query_every, query_start, query_pattern, order)
    _check_limits(threshold, spacing, max_heading_difference)
    out = Path(output_dir)
    sources = [source for source in (images, index, queries) if source is not None]
    written = (INDEX_FILE, QUERY_FILE, GROUND_TRUTH_FILE, TABLE_FILE, *[MAP_FILE] * draw_map)
    targets = [out / name for name in written]
    read = [x for x in (*sources, positions, query_positions) if x is not None]
    check_inputs_stay(targets, [*read, *(resolve(x, root) for x in read)], _ELSEWHERE)

    listed = [list_images(source, root, order, leave_out=out / MAP_FILE) for source in sources]
    for of in listed:
        check_inputs_stay(targets, (locate_image(root, name) for name in of.names), _ELSEWHERE)
    reader = PositionReader(
        root, frame_pattern, columns or {}, time_offset, time_tolerance, pose_plane
    )
    located = locate(reader, listed, positions, query_positions)
    distance = distance_for(threshold, located.plane.kind)

    parts = [part.keep(part.found.known) for part in located.parts]
    if spacing:
        parts = [part.keep(spaced(part, spacing)) for part in parts]
    num_kept = sum(map(len, parts))
    if images is not None:
        chosen = choose_queries(parts[0], query_every, query_start, query_pattern)
        parts = [parts[0].keep(~chosen), parts[0].keep(chosen)]
    _check_both(parts, located)
    dataset = _drop_by_heading(parts[0], parts[1], distance, max_heading_difference)
    dataset = replace(dataset, truth=replace(dataset.truth, unit=_unit(located)))

    make_folder(out)
    _write(out, dataset)
    summary = _summarise(out, dataset, located, num_kept, root, check_content)
    if draw_map:
        _draw(dataset.truth, summary)
    return summary


@dataclass(frozen=True)
class _Dataset:
    """The data set, with what a limit on headings did to it."""

    database: ImagePart
    queries: ImagePart
    truth: GroundTruth
    dropped_by_heading: tuple[str, ...] = ()
    num_facing_elsewhere: int | None = None  # None without a limit


def _check_limits(threshold: float | None, spacing: float | None, heading: float | None) -> None:
    """Raise ConfigError unless distances are 0 or more, and an angle is 0 to 180 degrees."""
    for what, value in (("threshold", threshold), ("spacing", spacing)):
        if value is not None and not (np.isfinite(value) and value >= 0):
            raise ConfigError(f"{what} = {value} must be 0 or more")
    if heading is not None and not 0 <= heading <= 180:
        raise ConfigError(f"max_heading_difference = {heading} must be from 0 to 180 degrees")


def _unit(located: Located) -> str:
    return "frames" if located.plane.kind == "frames" else "m"


def _check_both(parts: Sequence[ImagePart], located: Located) -> None:
    """Raise ImageListError unless there are both index images and queries."""
    for what, part in zip(("index images", "queries"), parts, strict=True):
        if not len(part):
            raise ImageListError(
                f"no {what} are left of {located.num_images} images "
                f"({len(located.without_position)} without a position); "
                "is the choice of queries right?"
            )


def _drop_by_heading(
    database: ImagePart, queries: ImagePart, threshold: float, limit: float | None
) -> _Dataset:
    """Leave out queries whose positives all face elsewhere by more than ``limit`` degrees."""
    truth = GroundTruth(queries.values, database.values, threshold)
    if limit is None:
        return _Dataset(database, queries, truth)
    keep, elsewhere = facing_alike(truth, queries.found.headings, database.found.headings, limit)
    dropped = tuple(name for name, ok in zip(queries.names, keep, strict=True) if not ok)
    queries = queries.keep(keep)
    if not len(queries):
        raise ImageListError(
            f"no query is left: the positives of all {len(dropped)} face elsewhere by more "
            f"than {limit:g} degrees; are headings right?"
        )
    truth = replace(truth, utm_queries=queries.values)
    return _Dataset(database, queries, truth, dropped, elsewhere)


def _summarise(
    out: Path,
    dataset: _Dataset,
    located: Located,
    num_kept: int,
    root: str | Path,
    check_content: bool,
) -> DatasetSummary:
    """Read back what was written, and say what it holds."""
    database, queries = dataset.database, dataset.queries
    headings = np.concatenate([database.found.headings, queries.found.headings])
    limited = dataset.num_facing_elsewhere is not None
    every = [*database.names, *queries.names]
    statistics = _read_back(out, len(database), len(queries))
    return DatasetSummary(
        folder=out,
        source=located.source,
        num_index=len(database),
        num_queries=len(queries),
        threshold=dataset.truth.threshold,
        unit=dataset.truth.unit,
        zone=located.plane.zone,
        extent=_extent(dataset.truth),
        statistics=statistics,
        without_position=located.without_position,
        without_positive=tuple(queries.names[q] for q in statistics.without),
        num_thinned=located.num_known - num_kept,
        dropped_by_heading=dataset.dropped_by_heading,
        num_facing_elsewhere=dataset.num_facing_elsewhere,
        num_without_heading=int(np.isnan(headings).sum()) if limited else 0,
        repeated=located.repeated,
        in_both=names_in_both(queries.names, database.names, root),
        same_place=len(database) - len(np.unique(database.values, axis=0)),
        same_content=group_same_content(every, root) if check_content else (),
        unreadable=_unreadable(out, root),
        notes=located.notes,
    )


def _draw(truth: GroundTruth, summary: DatasetSummary) -> None:
    """Write the map."""
    from patchnetvlad.plots.dataset_map import plot_dataset  # loads Matplotlib and PyTorch
    from patchnetvlad.plots.drawing import save_figure

    title = f"{summary.num_index} index images, {summary.num_queries} queries"
    missing = summary.statistics.without
    figure = plot_dataset(truth, missing, unit=summary.unit, zone=summary.zone, title=title)
    save_figure(figure, summary.folder / MAP_FILE)


def _extent(truth: GroundTruth) -> tuple[float, float]:
    """Return the width and height of all positions."""
    both = np.concatenate([truth.utm_queries, truth.utm_index])
    width, height = np.ptp(both, axis=0)
    return float(width), float(height)


def _read_back(out: Path, num_index: int, num_queries: int) -> PositiveStatistics:
    """Read the ground truth that was written, as matching will, and measure it."""
    truth = GroundTruth.load(out / GROUND_TRUTH_FILE)
    truth.check_counts(num_queries, num_index, out / GROUND_TRUTH_FILE)
    return positive_statistics(truth)


def _unreadable(out: Path, root: str | Path) -> tuple[str, ...]:
    """Name the images in the lists that cannot be read."""
    from patchnetvlad.datasets.images import image_troubles  # loads PyTorch

    return tuple(
        name
        for images in (ImageList.read(out / file) for file in (INDEX_FILE, QUERY_FILE))
        for name, trouble in zip(
            images.names, image_troubles(images.image_paths(root)), strict=True
        )
        if trouble
    )


def _write(out: Path, dataset: _Dataset) -> None:
    """Write the lists, the ground truth and the table, each file as a whole or not at all."""
    database, queries = dataset.database, dataset.queries
    check_names([*database.names, *queries.names], "an image list")
    write_names(database.names, out / INDEX_FILE)
    write_names(queries.names, out / QUERY_FILE)
    dataset.truth.save(out / GROUND_TRUTH_FILE)
    rows = ["image,set,x,y,heading\n"]
    for name, part in (("index", database), ("query", queries)):
        for image, (x, y), heading in zip(
            part.names, part.values.tolist(), part.found.headings.tolist(), strict=True
        ):
            image = table_cell(image)
            quoted = '"' + image.replace('"', '""') + '"' if re.search(r'[",#]', image) else image
            rows.append(f"{quoted},{name},{x!r},{y!r},{'' if heading != heading else heading}\n")
    replace_text(out / TABLE_FILE, rows)
