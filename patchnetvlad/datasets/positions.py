# SPDX-License-Identifier: MIT
"""Where images were taken: readers of file names, tables, tracks, EXIF data and poses.

Every reader takes names of images, paths relative to a root, and returns :class:`Positions`, one
row a name. :func:`to_plane` then puts several of them on one plane.
"""

from __future__ import annotations

import calendar
import csv
import datetime
import io
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.datasets.image_list import IMAGE_SUFFIXES
from patchnetvlad.datasets.transforms import _opened
from patchnetvlad.errors import ConfigError, GroundTruthError, ImageError

logger = logging.getLogger(__name__)

KINDS = ("latlon", "metres", "frames")
CLIP_DISTANCE = 1000.0
"""Distance of two clips, in frames: further than any tolerance."""
GPX_TOLERANCE = 10.0
"""Seconds from an image to the nearest point of a track, at most, unless told otherwise."""
POSE_TOLERANCE = 0.1
"""Seconds from an image to the nearest pose, at most, unless told otherwise."""
_SHOWN, _LONGEST = 20, 60  # names in a message, and their characters
_FARTHEST = 1e12  # metres or frames: distances are exact to better than a millimetre
FRAME_PATTERN = (
    r"(?i)(?:^|/)(?P<clip>[^/]*?)(?:[_\-. ]*(?:frame|image|img))?[_\-. ]*(?P<frame>[0-9]+)\.[^./]+$"
)
"""Clip and frame number in a name such as ``floor1/hall_frame_000012.jpg``: "hall" and 12."""


@dataclass(frozen=True, eq=False)
class Positions:
    """Where n images were taken, in the terms of the source.

    Attributes
    ----------
    values : ndarray [n, 2] of float64
        (latitude, longitude) in degrees, (x, y) in metres, or (1000 x clip, frame number); NaN
        where it is not known.
    kind : {"latlon", "metres", "frames"}
    headings : ndarray [n] of float64
        Degrees, clockwise from north where the source says so; NaN where they are not known.
    zones : tuple of n str
        UTM zone and hemisphere of positions in metres, such as ``32N``; empty where not known.
    sequences : tuple of n str
        The clip of each image; empty if the source knows none.
    notes : tuple of str
        What was found on the way, for the user.
    """

    values: NDArray[np.float64]
    kind: str
    headings: NDArray[np.float64]
    zones: tuple[str, ...] = ()
    sequences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which images have a position, [n]."""
        return np.asarray(np.isfinite(self.values).all(axis=1))

    def take(self, rows: NDArray[np.int64] | slice) -> Positions:
        """Return the positions of some of the images; notes are left behind."""
        which = np.arange(len(self))[rows]
        return Positions(
            self.values[which],
            self.kind,
            self.headings[which],
            tuple(self.zones[i] for i in which) if self.zones else (),
            tuple(self.sequences[i] for i in which) if self.sequences else (),
        )


def _unknown(count: int) -> NDArray[np.float64]:
    return np.full(count, np.nan)


# --- file names -----------------------------------------------------------------------------------


def positions_from_names(names: Sequence[str]) -> Positions:
    """Read UTM coordinates from names such as ``@0544822@4179498@10@S@...@.jpg``.

    The fields between the @ of a file's name are easting, northing (metres), zone number, zone
    letter, latitude, longitude, pano id, tile, heading (degrees), pitch, roll, height, timestamp
    and note. All after the northing may be empty or absent.

    Parameters
    ----------
    names : sequence of n str

    Returns
    -------
    Positions
        In metres; NaN for names without easting and northing.

    Examples
    --------
    >>> found = positions_from_names(["map/@0544822@4179498@10@S@37.76@@@@90@.jpg", "other.jpg"])
    >>> found.values.tolist(), found.zones
    ([[544822.0, 4179498.0], [nan, nan]], ('10N', ''))
    """
    values = np.full((len(names), 2), np.nan)
    headings, zones = _unknown(len(names)), []
    for i, name in enumerate(names):
        fields = name.rsplit("/", 1)[-1].split("@")[1:]
        fields += [""] * (9 - len(fields))
        values[i] = [_number(field) for field in fields[:2]]
        headings[i] = _number(fields[8])
        zones.append(parse_zone(fields[2] + fields[3], values[i, 1], _number(fields[4])))
    values[~np.isfinite(values).all(axis=1)] = np.nan
    return Positions(values, "metres", headings, tuple(zones))


def parse_zone(text: str, northing: float = math.nan, latitude: float = math.nan) -> str:
    """Read a UTM zone: a number, and the letter of a latitude band or of a hemisphere.

    Parameters
    ----------
    text : str
        Such as ``10S``, ``32 n`` or ``56``.
    northing : float, optional
        Metres. It tells the band S (32 to 40 degrees north) from the southern hemisphere.
    latitude : float, optional
        Degrees. If it is known, it decides the hemisphere.

    Returns
    -------
    str
        The number and N or S, or ``?`` where nothing tells the hemisphere; empty if there is no
        zone in the text.

    Examples
    --------
    >>> parse_zone("32 n"), parse_zone("10S", northing=4179498.0), parse_zone("56S", latitude=-33.9)
    ('32N', '10N', '56S')
    """
    match = re.fullmatch(r"\s*([0-9]{1,2})\s*([A-Za-z]?).*", text, re.DOTALL)
    if match is None or not 1 <= int(match[1]) <= 60:
        return ""
    letter = match[2].upper()
    if math.isfinite(latitude):
        north = latitude >= 0
    elif letter == "S":
        north = not math.isfinite(northing) or 3.5e6 < northing < 4.5e6
    elif not letter:
        return f"{int(match[1])}?"
    else:
        north = letter >= "N"
    return f"{int(match[1])}{'N' if north else 'S'}"


def positions_from_frames(names: Sequence[str], pattern: str | None = None) -> Positions:
    """Read clip and frame number from names; the position is (1000 x clip, frame number).

    Parameters
    ----------
    names : sequence of n str
        Of all clips: these are numbered in sorted order, from 0.
    pattern : str, optional
        Regular expression that is searched in each name, with a group ``frame`` of digits and, if
        there is more than one clip, a group ``clip``. The default takes the number at the end of
        the file's name as the frame, and what stands before it, without the folders and without
        a word like ``frame``, as the clip.

    Returns
    -------
    Positions
        In frames; NaN for names that the pattern does not fit.

    Raises
    ------
    ConfigError
        The pattern is no regular expression, or has no group ``frame``.

    Examples
    --------
    >>> positions_from_frames(["hall_left_frame_12.jpg", "stairs_frame_7.jpg"]).values.tolist()
    [[0.0, 12.0], [1000.0, 7.0]]
    """
    search = compile_pattern(pattern or FRAME_PATTERN, "frame_pattern")
    if "frame" not in search.groupindex:
        raise ConfigError(
            f"the frame pattern {pattern!r} has no group named frame; write for example "
            r"'(?P<clip>\w+)/(?P<frame>\d+)'"
        )
    has_clip = "clip" in search.groupindex
    found: list[tuple[str, float]] = []
    for name in names:
        match = search.search(name)
        frame = _number(match["frame"] or "") if match else math.nan
        found.append(((match["clip"] or "") if match and has_clip else "", frame))
    clips = sorted({clip for clip, frame in found if math.isfinite(frame)})
    number = {clip: CLIP_DISTANCE * i for i, clip in enumerate(clips)}
    values = np.array(
        [[number[clip] if math.isfinite(frame) else math.nan, frame] for clip, frame in found]
    ).reshape(-1, 2)
    shown = ", ".join(clip or "(no name)" for clip in clips[:5]) + ", ..." * (len(clips) > 5)
    notes = [f"clips: {len(clips)} ({shown})"] if clips else []
    return Positions(
        values,
        "frames",
        _unknown(len(names)),
        sequences=tuple(clip for clip, _ in found),
        notes=tuple(notes),
    )


def positions_from_order(count: int) -> Positions:
    """Take the place of an image in its list, from 0, as its frame number: (0, place)."""
    values = np.stack([np.zeros(count), np.arange(count, dtype=np.float64)], axis=1)
    return Positions(values, "frames", _unknown(count))


def compile_pattern(pattern: str, what: str) -> re.Pattern[str]:
    """Compile a regular expression; ConfigError, which names the option, if it is none."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{what} = {pattern!r} is no regular expression: {error}") from None


# --- tables ---------------------------------------------------------------------------------------

# Usual names of columns, the likelier first; compared in lower case, letters and digits only.
COLUMNS: dict[str, tuple[str, ...]] = {
    "image": (
        *("image", "imagename", "imagefile", "imagepath", "imagefilename", "filename", "file"),
        *("filepath", "name", "path", "img", "imgname", "imgpath", "photo", "picture", "key"),
        *("sourcefile", "imagekey", "imageid"),
    ),
    "lat": ("lat", "latitude", "gpslat", "gpslatitude", "latdeg", "latitudedeg", "wgs84lat"),
    "lon": (
        *("lon", "lng", "long", "longitude", "gpslon", "gpslng", "gpslong", "gpslongitude"),
        *("londeg", "longitudedeg", "wgs84lon"),
    ),
    "x": ("easting", "eastings", "utme", "utmeast", "utmeasting", "utmx", "xutm", "east", "x"),
    "y": ("northing", "northings", "utmn", "utmnorth", "utmnorthing", "utmy", "yutm", "north", "y"),
    "zone": ("utmzone", "zone", "zonenumber", "utmzonenumber"),
    "heading": (
        *("heading", "bearing", "azimuth", "compass", "compassangle", "ca", "course"),
        *("gpsimgdirection", "headingdeg"),
    ),
}  # fmt: skip


def positions_from_table(
    path: str | Path,
    names: Sequence[str],
    *,
    root: str | Path = "",
    folders: Sequence[str | Path] = (),
    columns: Mapping[str, str] | None = None,
) -> Positions:
    """Read latitude/longitude or UTM from a table, in CSV, TSV or with semicolons.

    Parameters
    ----------
    path : str or Path
        A text file, whose first line names the columns.
    names : sequence of n str
    root : str or Path
        Folder that relative names lie under.
    folders : sequence of str or Path
        Folders of the images. An image in the table is a path, with or without its extension, that
        is relative to ``root``, to one of these or to the table's own folder.
    columns : mapping of str to str, optional
        Names of columns that are not to be guessed, by ``image``, ``lat``, ``lon``, ``x``, ``y``,
        ``zone`` and ``heading``.

    Returns
    -------
    Positions
        Latitude and longitude, if the table has both; NaN for images that are not in the table, or
        whose cells are empty.

    Raises
    ------
    GroundTruthError
        The table cannot be read, has no column of images or of positions, holds a value that is no
        number or no coordinate, or gives one image two positions.
    ConfigError
        ``columns`` names something else, or a column that is not there.
    """
    file = Path(path)
    header, rows = _read_table(file)
    chosen = _choose_columns(file, header, columns or {})
    kind, keys = ("latlon", ("lat", "lon")) if "lat" in chosen else ("metres", ("x", "y"))
    shown = ", ".join(f"{key} = {header[column]!r}" for key, column in chosen.items())
    note = f"{file.name}: columns {shown}"
    logger.info("%s", note)

    find = _finder(names, root, [root, *folders, file.parent], file)
    values = np.full((len(names), 2), np.nan)
    headings, zones = _unknown(len(names)), [""] * len(names)
    source: dict[int, int] = {}
    strangers = nowhere = 0
    for line, row in rows:
        cells = {key: row[c].strip() if c < len(row) else "" for key, c in chosen.items()}
        if not cells["image"]:
            continue
        i = find(cells["image"], line)
        if i is None:
            strangers += 1
            continue
        position = [_cell(file, line, header[chosen[key]], cells[key]) for key in keys]
        if kind == "latlon":
            _check_degrees(position[0], position[1], f"{file}, line {line}")
            if position == [0, 0]:
                nowhere += 1
                position = [math.nan, math.nan]
        if i in source and not np.array_equal(values[i], position, equal_nan=True):
            raise GroundTruthError(
                f"{file}: lines {source[i]} and {line} give {names[i]} two positions; delete one"
            )
        source[i], values[i] = line, position
        if "heading" in cells:
            headings[i] = _cell(file, line, header[chosen["heading"]], cells["heading"])
        if "zone" in cells:
            zones[i] = parse_zone(cells["zone"], position[1])
    if not source:
        cells_of_images = (row[chosen["image"]] for _, row in rows if len(row) > chosen["image"])
        example = next(cells_of_images, "nothing")
        raise GroundTruthError(
            f"{file} names none of the {len(names)} images: its first row has {_short(example)!r}, "
            f"the first image is {names[0] if names else 'missing'!r}; its paths must be relative "
            "to the root, to the images' folder or to its own"
        )
    notes = [note] + [f"{file.name}: rows of other images: {strangers}"] * (strangers > 0)
    if nowhere:
        notes.append(f"{file.name}: rows at 0, 0, taken for unknown: {nowhere}")
    values[~np.isfinite(values).all(axis=1)] = np.nan
    if kind == "metres" and not {"x", "y"} & set(columns or {}) and _like_degrees(values):
        x, y = (_short(header[chosen[key]]) for key in ("x", "y"))
        raise GroundTruthError(
            f"{file}: {x!r} and {y!r} look like degrees, not metres; write --columns lon={x} "
            f"lat={y}, or --columns x={x} y={y} if they are metres"
        )
    return Positions(values, kind, headings, tuple(zones), notes=tuple(notes))


def _like_degrees(values: NDArray[np.float64]) -> bool:
    """Whether x, y are in the range of degrees, and all so near that metres would be a room."""
    known = values[np.isfinite(values).all(axis=1)]
    if len(known) < 2 or (np.abs(known) > [180, 90]).any() or (known % 1 == 0).all():
        return False
    return bool((np.ptp(known, axis=0) < 1).all() and np.abs(known).max() > 1)


def _read_table(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the names of the columns, and the rows with their lines, from 1."""
    text = _read_text(file)
    lines = [
        (number, line)
        for number, line in enumerate(io.StringIO(text, newline=None), start=1)
        if line.strip()
    ]
    if lines and lines[0][1].startswith("#"):
        lines[0] = lines[0][0], lines[0][1].lstrip("# ")
    lines = [(number, line) for number, line in lines if not line.startswith("#")]
    if not lines:
        raise GroundTruthError(f"{file} is empty; its first line must name columns")
    marks = {mark: lines[0][1].count(mark) for mark in "\t;,"}
    mark = max(marks, key=lambda mark: marks[mark])
    try:
        reader = csv.reader((line for _, line in lines), delimiter=mark, skipinitialspace=True)
        rows = []
        for row in reader:
            rows.append((lines[min(reader.line_num, len(lines)) - 1][0], row))
    except csv.Error as error:
        raise GroundTruthError(f"{file} is no table that can be read: {error}") from None
    header = [name.strip() for name in rows[0][1]]
    if mark != ",":
        rows = [(line, [_decimal_point(cell) for cell in row]) for line, row in rows]
    return header, rows[1:]


def _decimal_point(cell: str) -> str:
    return cell.replace(",", ".") if re.fullmatch(r"\s*-?\d+,\d+\s*", cell) else cell


def _choose_columns(file: Path, header: list[str], columns: Mapping[str, str]) -> dict[str, int]:
    """Return the column of each key that was named or guessed."""
    chosen: dict[str, int] = {}
    for key, name in columns.items():
        if key not in COLUMNS:
            raise ConfigError(f"columns: {key!r} is unknown; one of {', '.join(COLUMNS)}")
        if name not in header:
            raise ConfigError(f"{file} has no column {name!r}; it has {_some(header)}")
        chosen[key] = header.index(name)
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in header]
    for key, usual in COLUMNS.items():
        if key in columns or (key == "zone" and {"lat", "lon"} <= set(chosen)):
            continue
        # A pair that was named rules the other out.
        if key in ("lat", "lon") and {"x", "y"} & set(columns):
            continue
        for name in usual:
            if name in plain:
                chosen[key] = plain.index(name)
                break
    for pair, other in ((("lat", "lon"), ("x", "y")), (("x", "y"), ("lat", "lon"))):
        if set(pair) <= set(chosen):
            chosen = {key: column for key, column in chosen.items() if key not in other}
            break
    else:
        raise GroundTruthError(
            f"{file} has no columns lat and lon, or x and y; it has {_some(header)}. Name them "
            "with columns (lat=NAME lon=NAME)"
        )
    if "image" not in chosen:
        raise GroundTruthError(
            f"{file} has no column that names images; it has {_some(header)}. Name it with "
            "columns (image=NAME); the order of rows is never taken for that of images"
        )
    return {key: chosen[key] for key in COLUMNS if key in chosen}


def _finder(
    names: Sequence[str], root: str | Path, folders: Iterable[str | Path], file: Path
) -> Callable[[str, int], int | None]:
    """Return a function from a path in a table, and its line, to the image it means."""
    whole: dict[str, int] = {}
    stems: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        full = os.path.abspath(os.path.join(root, name))
        whole.setdefault(full, i)
        stems.setdefault(os.path.splitext(full)[0], []).append(i)
    bases = list(dict.fromkeys(os.path.abspath(folder) for folder in folders))

    def find(entry: str, line: int) -> int | None:
        entry = entry if os.sep == "\\" else entry.replace("\\", "/")
        places = [os.path.normpath(os.path.join(base, entry)) for base in bases]
        hits = {whole[place] for place in places if place in whole}
        if not hits and os.path.splitext(entry)[1].lower() not in IMAGE_SUFFIXES:
            hits = {i for place in places for i in stems.get(place, ())}
        if len(hits) > 1:
            several = " and ".join(names[i] for i in sorted(hits)[:2])
            raise GroundTruthError(
                f"{file}, line {line}: {_short(entry)!r} may be {several}; write paths relative to "
                "the root, or give the queries' positions as a file of their own"
            )
        return hits.pop() if hits else None

    return find


def _cell(file: Path, line: int, column: str, text: str) -> float:
    """Return a number; NaN for an empty cell."""
    if text.lower() in ("", "nan", "none", "null", "na", "n/a"):
        return math.nan
    value = _number(text)
    if math.isnan(value):
        raise GroundTruthError(
            f"{file}, line {line}: {_short(text)!r} in column {_short(column)!r} is not a number; "
            "empty cells are taken for unknown"
        )
    return value


# --- tracks and times -----------------------------------------------------------------------------


def positions_from_gpx(
    path: str | Path,
    names: Sequence[str],
    *,
    root: str | Path = "",
    time_offset: float = 0.0,
    time_tolerance: float = GPX_TOLERANCE,
) -> Positions:
    """Find where a GPX track was when each image was taken.

    The time of an image is DateTimeOriginal of its EXIF data, in universal time by
    OffsetTimeOriginal, if the camera wrote it. Between two points of the track, positions are
    interpolated linearly.

    Parameters
    ----------
    path : str or Path
        GPX 1.0 or 1.1, with times.
    names : sequence of n str
    root : str or Path
        Folder that relative names lie under.
    time_offset : float
        Seconds to add to the images' times to get the track's.
    time_tolerance : float
        Seconds from an image to the nearest point of the track, at most.

    Returns
    -------
    Positions
        Latitude and longitude; NaN for images without a time, or too far from the track's.

    Raises
    ------
    GroundTruthError
        The track cannot be read, has no points with times, or none at the time of an image.
    """
    file = Path(path)
    times, points = read_gpx(file)
    taken, notes = image_times(names, root)
    taken = taken + time_offset
    points = np.stack([points[:, 0], np.unwrap(points[:, 1], period=360)], axis=1)
    values = interpolate(times, points, taken, time_tolerance)
    values[:, 1] = (values[:, 1] + 180) % 360 - 180
    if np.isnan(values).all():
        raise GroundTruthError(
            f"{file}: no image was taken within {time_tolerance:g} s of the track. The track is "
            f"from {_clock(times[0])} to {_clock(times[-1])} UTC, {_span(taken)}; time_offset adds "
            "seconds to the images' times"
        )
    shown = f"{file.name}: {len(times)} points from {_clock(times[0])} to {_clock(times[-1])} UTC"
    return Positions(values, "latlon", _unknown(len(names)), notes=(shown, *notes))


def read_gpx(path: str | Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Read the points of all tracks of a GPX file that have a time.

    Returns
    -------
    times : ndarray [m] of float64
        Seconds since 1970, UTC, ascending, each once.
    points : ndarray [m, 2] of float64
        Latitude and longitude in degrees.

    Raises
    ------
    GroundTruthError
        It cannot be read, or has no such points.
    """
    file = Path(path)
    raw = _read_bytes(file)
    if b"<!DOCTYPE" in raw[:100_000].upper():
        raise GroundTruthError(f"{file} declares a document type, which a GPX track has no use for")
    try:
        tree = ElementTree.fromstring(raw)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise GroundTruthError(f"{file} is no GPX file: {error}") from None
    found: dict[float, tuple[float, float]] = {}
    without = 0
    for element in tree.iter():
        if _tag(element) != "trkpt":
            continue
        text = next((child.text or "" for child in element if _tag(child) == "time"), "")
        if not text.strip():
            without += 1
            continue
        number = len(found) + without + 1
        latitude, longitude = (_number(element.get(key, "")) for key in ("lat", "lon"))
        if math.isnan(latitude + longitude):
            raise GroundTruthError(f"{file}: point {number} of the track has no lat and lon")
        _check_degrees(latitude, longitude, f"{file}, point {number} of the track")
        found.setdefault(_parse_time(text, file), (latitude, longitude))
    if not found:
        why = f"its {without} points have no times" if without else "it has no track points"
        raise GroundTruthError(f"{file} is no track that images can be found on: {why}")
    times = sorted(found)
    return np.array(times), np.array([found[time] for time in times])


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rsplit("}", 1)[-1]


def _parse_time(text: str, file: Path) -> float:
    """Return seconds since 1970 of a time of ISO 8601; UTC unless it says otherwise."""
    match = re.fullmatch(
        r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)([.,]\d+)?\s*(Z|[+-]\d\d:?\d\d)?", text.strip()
    )
    try:
        if match is None:
            raise ValueError
        moment = datetime.datetime.strptime(f"{match[1]} {match[2]}", "%Y-%m-%d %H:%M:%S")
        fraction = float((match[3] or "0").replace(",", "."))
        return calendar.timegm(moment.timetuple()) + fraction - _utc_offset(match[4] or "")
    except ValueError:
        raise GroundTruthError(
            f"{file}: {_short(text.strip())!r} is no time such as 2024-05-01T12:00:00Z"
        ) from None


def _utc_offset(text: str) -> float:
    """Return the seconds of ``+02:00``; 0 for anything else."""
    match = re.fullmatch(r"([+-])(\d\d):?(\d\d)", text.strip())
    if match is None:
        return 0.0
    return (-1 if match[1] == "-" else 1) * (int(match[2]) * 3600.0 + int(match[3]) * 60.0)


def interpolate(
    times: NDArray[np.float64],
    points: NDArray[np.float64],
    wanted: NDArray[np.float64],
    tolerance: float,
) -> NDArray[np.float64]:
    """Interpolate points linearly in time.

    Parameters
    ----------
    times : ndarray [m] of float64
        Seconds, ascending.
    points : ndarray [m, d] of float64
    wanted : ndarray [n] of float64
        Seconds; NaN where not known.
    tolerance : float
        Seconds to the nearest of ``times``, at most.

    Returns
    -------
    ndarray [n, d] of float64
        NaN where nothing is near enough. Before the first time and after the last, its point.
    """
    right = np.searchsorted(times, wanted).clip(0, len(times) - 1)
    left = (right - 1).clip(0)
    near = np.minimum(np.abs(wanted - times[left]), np.abs(wanted - times[right]))
    values = np.stack([np.interp(wanted, times, column) for column in points.T], axis=1)
    values[~(near <= tolerance)] = np.nan
    return values


def _clock(seconds: float) -> str:
    start = datetime.datetime(1970, 1, 1)
    try:
        return (start + datetime.timedelta(seconds=round(seconds))).isoformat(" ")
    except OverflowError:
        return f"{seconds:.0f} s"


def _span(taken: NDArray[np.float64]) -> str:
    known = taken[np.isfinite(taken)]
    if not len(known):
        return "no image has a time (DateTimeOriginal) in its EXIF data"
    return f"the images are from {_clock(known.min())} to {_clock(known.max())}"


# --- EXIF -----------------------------------------------------------------------------------------

_IFD_EXIF, _IFD_GPS = 0x8769, 0x8825


def positions_from_exif(names: Sequence[str], *, root: str | Path = "") -> Positions:
    """Read latitude, longitude and heading from the images' EXIF data.

    Parameters
    ----------
    names : sequence of n str
    root : str or Path
        Folder that relative names lie under.

    Returns
    -------
    Positions
        NaN for images that have none, that cannot be opened, or that are at exactly 0, 0.
    """
    found, notes = _read_exif(names, root, _gps)
    values = np.full((len(names), 2), np.nan)
    headings = _unknown(len(names))
    origin = []
    for i, fix in enumerate(found):
        if fix is None:
            continue
        latitude, longitude, headings[i] = fix
        if latitude == longitude == 0:
            origin.append(names[i])
        elif abs(latitude) <= 90 and abs(longitude) <= 180:
            values[i] = latitude, longitude
    if origin:
        notes.append(
            f"images at 0, 0, which a camera without a fix writes, taken for unknown: "
            f"{len(origin)}, first {origin[0]}"
        )
    return Positions(values, "latlon", headings, notes=tuple(notes))


def image_times(
    names: Sequence[str], root: str | Path = ""
) -> tuple[NDArray[np.float64], list[str]]:
    """Read when images were taken, from their EXIF data.

    Returns
    -------
    times : ndarray [n] of float64
        Seconds since 1970, of the camera's clock, or UTC if it wrote its time zone; NaN where
        there is no time.
    notes : list of str
    """
    found, notes = _read_exif(names, root, _taken)
    known = [one for one in found if one is not None]
    local = sum(not zoned for _, zoned in known)
    if local:
        notes.append(f"images whose time has no time zone, taken for UTC: {local}")
    if len(known) < len(names):
        notes.append(f"images without a time in their EXIF data: {len(names) - len(known)}")
    return np.array([math.nan if one is None else one[0] for one in found]), notes


def _read_exif(
    names: Sequence[str], root: str | Path, read: Callable[[Any], Any]
) -> tuple[list[Any], list[str]]:
    """Return for each image what ``read`` finds in its EXIF data, None where it has none."""

    def one(name: str) -> Any:
        try:
            with _opened(Path(root) / name) as image:
                return read(image.getexif())
        except ImageError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, names))
    broken = [error for error in found if isinstance(error, ImageError)]
    notes = [f"images that cannot be opened: {len(broken)}, first: {broken[0]}"] if broken else []
    return [None if isinstance(value, ImageError) else value for value in found], notes


def _gps(exif: Any) -> tuple[float, float, float] | None:
    """Return latitude, longitude and heading in degrees."""
    fields = exif.get_ifd(_IFD_GPS)
    try:
        pair = []
        for value, sign, negative in ((2, 1, "S"), (4, 3, "W")):
            degrees = sum(float(part) / 60**i for i, part in enumerate(fields[value]))
            side = fields[sign]
            side = side.decode("ascii", "replace") if isinstance(side, bytes) else str(side)
            pair.append(-degrees if side.strip("\0 ").upper() == negative else degrees)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    if not all(map(math.isfinite, pair)):
        return None
    try:
        heading = float(fields[17])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        heading = math.nan
    return pair[0], pair[1], heading if math.isfinite(heading) else math.nan


def _taken(exif: Any) -> tuple[float, bool] | None:
    """Return seconds since 1970, and whether they are known to be UTC."""
    fields = exif.get_ifd(_IFD_EXIF)
    for time, zone, fraction in ((0x9003, 0x9011, 0x9291), (0x9004, 0x9012, 0x9292)):
        try:
            text = str(fields[time]).strip("\0 ")
            moment = datetime.datetime.strptime(text, "%Y:%m:%d %H:%M:%S")
        except (KeyError, ValueError):
            continue
        digits = str(fields.get(fraction, "")).strip("\0 ")
        part = float(f"0.{digits}") if re.fullmatch("[0-9]+", digits) else 0.0
        offset = str(fields.get(zone, "")).strip("\0 ")
        zoned = re.fullmatch(r"[+-]\d\d:?\d\d", offset) is not None
        return calendar.timegm(moment.timetuple()) + part - _utc_offset(offset), zoned
    return None


# --- poses ----------------------------------------------------------------------------------------


def positions_from_poses(
    path: str | Path,
    names: Sequence[str],
    *,
    plane: str | None = None,
    time_tolerance: float = POSE_TOLERANCE,
    in_order: bool = True,
) -> Positions:
    """Read camera centres from a pose file of KITTI or of TUM.

    KITTI: 12 numbers a line, the first three rows of a matrix from camera to world. TUM:
    timestamp, tx ty tz, qx qy qz qw. If there are as many poses as images, they belong to them in
    order; else the poses of TUM are interpolated at the times, in seconds or nanoseconds, that the
    images are named by. The heading is that of the camera's z axis on the plane, from its second
    axis to its first.

    Parameters
    ----------
    path : str or Path
        Lines that begin with # are ignored.
    names : sequence of n str
        In the order of the poses.
    plane : {"xz", "xy", "yz"}, optional
        The axes that are kept; xz for KITTI, where y points down, and xy for TUM by default.
    time_tolerance : float
        Seconds from an image to the nearest pose, at most.
    in_order : bool, default True
        Whether the names are those of one sequence, so that they may belong to the poses by order.

    Returns
    -------
    Positions
        In metres; NaN for images without a pose.

    Raises
    ------
    GroundTruthError
        The file cannot be read, or there is no telling which pose is whose.
    """
    file = Path(path)
    if plane not in (None, "xz", "xy", "yz"):
        raise ConfigError(f"plane = {plane!r} is unknown; one of xz, xy, yz")
    table = _read_poses(file)
    kitti = table.shape[1] == 12
    axes = ["xyz".index(axis) for axis in (plane or ("xz" if kitti else "xy"))]
    if kitti:
        matrices = table.reshape(-1, 3, 4)
        centres, forward = matrices[:, :, 3], matrices[:, :, 2]
    else:
        centres, forward = table[:, 1:4], _z_axes(table[:, 4:])
    name = "KITTI" if kitti else "TUM"
    notes = [f"{file.name}: {len(table)} poses in the form of {name}"]
    if len(table) != len(names) or not in_order:
        if kitti:
            apart = "" if in_order else " in two sets"
            raise GroundTruthError(
                f"{file} has {len(table)} poses for {len(names)} images{apart}; give the whole "
                "sequence as images, and choose queries by query_every or query_pattern; or give "
                "queries a pose file of their own (query_positions)"
            )
        notes[0] += ", found by the times in the images' names"
        centres, forward = _poses_at(file, table[:, 0], centres, forward, names, time_tolerance)
    with np.errstate(invalid="ignore", over="ignore"):
        extents = _extents(centres)
        flat = forward[:, axes]
        headings = np.degrees(np.arctan2(flat[:, 0], flat[:, 1])) % 360
        headings[~(np.linalg.norm(flat, axis=1) > 0.1)] = np.nan
    kept = "".join("xyz"[axis] for axis in axes)
    sizes = ", ".join(f"{axis} {extent:.4g}" for axis, extent in zip("xyz", extents, strict=True))
    notes.append(f"plane {kept} of positions that extend over {sizes} m")
    left_out = next(axis for axis in range(3) if axis not in axes)
    if extents[left_out] > 2 * min(extents[axis] for axis in axes) + 1:
        notes.append(
            f"{'xyz'[left_out]} is left out, though it extends further than an axis of the plane; "
            "is it the vertical? pose_plane chooses another"
        )
    return Positions(centres[:, axes].astype(np.float64), "metres", headings, notes=tuple(notes))


def _extents(points: NDArray[np.float64]) -> list[float]:
    known = points[np.isfinite(points).all(axis=1)]
    return [float(np.ptp(column)) for column in known.T] if len(known) else [0.0] * 3


def _read_poses(file: Path) -> NDArray[np.float64]:
    """Return [m, 12] or [m, 8] numbers."""
    rows: list[list[float]] = []
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        words = line.replace(",", " ").split()
        if not words or words[0].startswith("#"):
            continue
        row = [_number(word) for word in words]
        if len(row) not in (8, 12) or (rows and len(row) != len(rows[0])):
            raise GroundTruthError(
                f"{file}, line {number}: {len(row)} words; a pose is 12 numbers (KITTI) or 8 "
                "(TUM: timestamp tx ty tz qx qy qz qw), the same in all lines. Positions can also "
                "be given as .csv, .tsv or .gpx"
            )
        if not all(map(math.isfinite, row)):
            raise GroundTruthError(f"{file}, line {number}: a pose must be finite numbers")
        rows.append(row)
    if not rows:
        raise GroundTruthError(f"{file} holds no pose")
    return np.array(rows)


def _z_axes(quaternions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the third column of each rotation, from (x, y, z, w); NaN for a zero quaternion."""
    from scipy.spatial.transform import Rotation

    with np.errstate(invalid="ignore", over="ignore"):
        lengths = np.linalg.norm(quaternions, axis=1)
    axes = np.full((len(quaternions), 3), np.nan)
    turned = np.isfinite(lengths) & (lengths > 0)
    if turned.any():
        axes[turned] = Rotation.from_quat(quaternions[turned]).apply([0, 0, 1])
    return axes


def _poses_at(
    file: Path,
    times: NDArray[np.float64],
    centres: NDArray[np.float64],
    forward: NDArray[np.float64],
    names: Sequence[str],
    tolerance: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Interpolate poses at the times that images are named by."""
    order = np.argsort(times, kind="stable")
    times, centres, forward = times[order], centres[order], forward[order]
    times = times * 1e-9 if times[0] > _LEAST_NANOSECONDS else times
    taken = np.array([_time_in_name(name) for name in names])
    both = interpolate(times, np.concatenate([centres, forward], axis=1), taken, tolerance)
    if np.isnan(both).all():
        raise GroundTruthError(
            f"{file} has {len(times)} poses for {len(names)} images, and the images are not named "
            f"by times within {tolerance:g} s of the poses' (from {times[0]:.6f} to "
            f"{times[-1]:.6f}); give as many images as poses, or name images by their times"
        )
    return both[:, :3], both[:, 3:]


_LEAST_NANOSECONDS, _LEAST_SECONDS = 1e14, 1e8  # of times since 1970, as opposed to counters


def _time_in_name(name: str) -> float:
    """Return the seconds that an image is named by; NaN for no number or a mere counter."""
    stem = os.path.splitext(name.rsplit("/", 1)[-1])[0]
    value = _number(stem)
    if value > _LEAST_NANOSECONDS:
        return value * 1e-9
    return value if "." in stem or value > _LEAST_SECONDS else math.nan


# --- one plane ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plane:
    """Positions of several sets of images on one plane.

    Attributes
    ----------
    values : list of ndarray [n, 2] of float64
        One array a set; NaN where a position is not known.
    kind : {"metres", "frames"}
    zone : str
        The UTM zone, such as ``32N``; empty if the plane is none.
    notes : tuple of str
    """

    values: list[NDArray[np.float64]]
    kind: str
    zone: str
    notes: tuple[str, ...]


def to_plane(sets: Sequence[Positions]) -> Plane:
    """Put sets of positions on one plane.

    Latitudes and longitudes are projected into one UTM zone for all: that of the median position,
    with the false northing of its hemisphere, also for images beyond the zone's border or the
    equator. Coordinates in metres stay as they are, unless they are of several zones.

    Parameters
    ----------
    sets : sequence of Positions

    Returns
    -------
    Plane

    Raises
    ------
    GroundTruthError
        The sets have no common plane.
    """
    known = [one for one in sets if one.known.any()]
    kinds = {one.kind for one in known}
    if "frames" in kinds and len(kinds) > 1:
        raise GroundTruthError(
            "frame numbers and coordinates cannot be compared; give index and queries positions of "
            "the same kind"
        )
    zones = sorted({zone for one in known for zone in _known_zones(one) if zone})
    if "latlon" not in kinds and len(zones) < 2:
        zones = [zone.rstrip("?") for zone in zones]
        notes = [f"positions without a zone, taken to be in {zones[0]}"] if zones else []
        complete = all(all(_known_zones(one)) and one.zones for one in known)
        kind = "frames" if "frames" in kinds else "metres"
        values = [one.values.copy() for one in sets]
        largest = max((np.nanmax(np.abs(one.values)) for one in known), default=0.0)
        if largest > _FARTHEST:
            raise GroundTruthError(
                f"a position has the coordinate {largest:g}, which cannot be metres or frames"
            )
        return Plane(values, kind, zones[0] if zones else "", () if complete else tuple(notes))
    if any(zone.endswith("?") for zone in zones):
        number = next(zone for zone in zones if zone.endswith("?"))[:-1]
        raise GroundTruthError(
            f"positions are in several UTM zones, or in degrees, too, but zone {number} has no "
            f"letter; write {number}N or {number}S, so that all can be put into one"
        )
    for one in known:
        if one.kind == "metres" and (not one.zones or not all(_known_zones(one))):
            other = f"zones {', '.join(zones)}" if "latlon" not in kinds else "degrees"
            raise GroundTruthError(
                f"some positions are in metres without a UTM zone, others in {other}; give all "
                "their zone, or all as latitude and longitude"
            )
    degrees = [_to_degrees(one) for one in sets]
    every = np.concatenate(degrees)
    every = every[np.isfinite(every).all(axis=1)]
    zone = utm_zone(every)
    notes = [f"UTM zones {', '.join(zones)}; all were put into one"] if len(zones) > 1 else []
    values = [project(one, zone) for one in degrees]
    scale = _worst_scale(values)
    if scale > 1.01:
        notes.append(
            f"some images lie so far from the zone's middle that distances there are up to "
            f"{100 * (scale - 1):.1f} % too long"
        )
    return Plane(values, "metres", zone, tuple(notes))


def _known_zones(positions: Positions) -> list[str]:
    known = positions.known
    return [zone for zone, there in zip(positions.zones, known, strict=False) if there]


def utm_zone(degrees: NDArray[np.float64]) -> str:
    """Return the UTM zone of the median of positions, [n, 2] in degrees, n > 0.

    The zones are those of 6 degrees each; the exceptions of Norway and Svalbard are not made.
    """
    start = degrees[0, 1]
    # Longitudes around the first, so that a set may lie on both sides of the 180th meridian.
    longitude = start + np.median((degrees[:, 1] - start + 180) % 360 - 180)
    number = math.floor(((longitude + 180) % 360) / 6) % 60 + 1
    return f"{number}{'N' if np.median(degrees[:, 0]) >= 0 else 'S'}"


def project(degrees: NDArray[np.float64], zone: str) -> NDArray[np.float64]:
    """Project (latitude, longitude), [n, 2] in degrees, to (easting, northing) in metres.

    Parameters
    ----------
    degrees : ndarray [n, 2] of float64
        On WGS 84; rows of NaN stay NaN.
    zone : str
        Such as ``32N`` or ``56S``, for all positions, whether they lie in it or not.

    Returns
    -------
    ndarray [n, 2] of float64

    Raises
    ------
    GroundTruthError
        A position is too far from the zone to be projected.
    """
    values = np.full(degrees.shape, np.nan)
    known = np.isfinite(degrees).all(axis=1)
    transformer = _transformer(zone)
    east, north = transformer.transform(degrees[known, 1], degrees[known, 0])
    values[known] = np.stack([east, north], axis=1)
    far = known & ~np.isfinite(values).all(axis=1)
    if far.any():
        latitude, longitude = degrees[np.flatnonzero(far)[0]]
        raise GroundTruthError(
            f"the position {latitude:.6f}, {longitude:.6f} is too far from UTM zone {zone}, which "
            "most images are in; make a data set a region"
        )
    return values


def _to_degrees(positions: Positions) -> NDArray[np.float64]:
    if positions.kind == "latlon":
        return positions.values
    degrees = np.full(positions.values.shape, np.nan)
    known = positions.known
    rows_of: dict[str, list[int]] = {}
    for i, zone in enumerate(positions.zones):
        if known[i]:
            rows_of.setdefault(zone, []).append(i)
    for zone, rows in rows_of.items():
        longitude, latitude = _transformer(zone).transform(
            *positions.values[rows].T, direction="INVERSE"
        )
        degrees[rows] = np.stack([latitude, longitude], axis=1)
        bad = np.flatnonzero(~np.isfinite(degrees[rows]).all(axis=1))
        if len(bad):
            east, north = positions.values[rows[bad[0]]]
            raise GroundTruthError(f"{east:.0f}, {north:.0f} is no position in UTM zone {zone}")
    return degrees


def _transformer(zone: str) -> Any:
    from pyproj import Transformer

    code = (32600 if zone[-1] == "N" else 32700) + int(zone[:-1])
    return Transformer.from_crs("EPSG:4326", f"EPSG:{code}", always_xy=True)


def _worst_scale(values: Sequence[NDArray[np.float64]]) -> float:
    """Return the largest scale of UTM at eastings, to the second order."""
    east = np.concatenate([one[:, 0] for one in values])
    offset = np.nanmax(np.abs(east - 500_000)) if len(east) else 0.0
    return float(0.9996 * (1 + (offset / 6_367_000) ** 2 / 2))


# --- small things ---------------------------------------------------------------------------------


def _number(text: str) -> float:
    """Return a finite number; NaN for any other text."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) and "_" not in text else math.nan


def _check_degrees(latitude: float, longitude: float, where: str) -> None:
    """Raise GroundTruthError unless NaN or degrees of latitude and longitude."""
    if abs(latitude) > 90 or not (math.isnan(longitude) or -180 <= longitude <= 360):
        raise GroundTruthError(
            f"{where}: latitude {latitude:g}, longitude {longitude:g} is no place on earth; are "
            "the two mixed up, or are they metres (columns x and y)?"
        )


def _short(text: str) -> str:
    text = " ".join(text.split())  # a quoted cell may hold line ends
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return ", ".join(map(_short, names[:_SHOWN])) + more


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise GroundTruthError(f"there is no file of positions {file}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GroundTruthError(f"{file} cannot be read: {reason}") from None


def _read_text(file: Path) -> str:
    raw = _read_bytes(file)
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise GroundTruthError(f"{file} is not a text file in UTF-8 (byte {error.start})") from None
    if "\0" in text:
        raise GroundTruthError(f"{file} is not a text file")
    return text.replace("\r\n", "\n")
