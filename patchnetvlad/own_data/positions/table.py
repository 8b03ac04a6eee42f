# SPDX-License-Identifier: MIT
"""Positions from CSV tables."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.datasets.formats import has_image_suffix
from patchnetvlad.errors import ConfigError, GroundTruthError
from patchnetvlad.own_data.positions.base import (
    Positions,
    angle_of,
    check_degrees,
    few,
    number_of,
    read_text,
    short,
    unknown,
)
from patchnetvlad.own_data.positions.names import parse_zone

logger = logging.getLogger(__name__)

# Usual names of columns, the likelier first; compared in lower case, letters and digits only.
COLUMNS: dict[str, tuple[str, ...]] = {
    "image": (
        *("image", "imagename", "imagefile", "imagepath", "imagefilename", "filename", "file"),
        *("filepath", "name", "path", "img", "imgname", "imgpath", "photo", "picture", "key"),
        *("sourcefile", "imagekey", "imageid", "label"),
    ),
    "lat": (
        *("lat", "latitude", "gpslat", "gpslatitude", "latdeg", "latitudedeg", "wgs84lat"),
        *("ylatitude",),
    ),
    "lon": (
        *("lon", "lng", "long", "longitude", "gpslon", "gpslng", "gpslong", "gpslongitude"),
        *("londeg", "longitudedeg", "wgs84lon", "xlongitude"),
    ),
    "x": (
        *("easting", "eastings", "utme", "utmeast", "utmeasting", "utmx", "xutm", "east", "x"),
        *("xeasting", "xeast"),
    ),
    "y": (
        *("northing", "northings", "utmn", "utmnorth", "utmnorthing", "utmy", "yutm", "north", "y"),
        *("ynorthing", "ynorth"),
    ),
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
        A text file with a line that names the columns; comments may stand before it. Where several
        columns may name the images, the one that names most of them does.
    names : sequence of n str
    root : str or Path
        Folder that relative names lie under.
    folders : sequence of str or Path
        Folders of the images. An image in the table is a path, with or without its extension, that
        is relative to ``root``, to one of these or to the table's own folder.
    columns : mapping of str to str, optional
        Names of columns that should not be guessed, by ``image``, ``lat``, ``lon``, ``x``, ``y``,
        ``zone`` and ``heading``.

    Returns
    -------
    Positions
        Latitude and longitude, in degrees or degrees, minutes and seconds, if the table has both;
        NaN for images that are not in the table, or
        whose cells are empty.

    Raises
    ------
    GroundTruthError
        The table cannot be read, has no column of images or of positions, holds a value that is
        not a number or not a coordinate, or gives one image two positions.
    ConfigError
        ``columns`` has an unknown key, or names a column that does not exist.
    """
    file = Path(path)
    find = _finder(names, root, [root, *folders, file.parent], file)
    header, rows = _read_table(file, columns or {})
    chosen = _choose_columns(file, header, columns or {})
    if "image" not in (columns or {}):
        chosen["image"] = _image_column(file, header, rows, chosen, find)
    kind, keys = ("latlon", ("lat", "lon")) if "lat" in chosen else ("metres", ("x", "y"))
    shown = ", ".join(f"{key} = {header[column]!r}" for key, column in chosen.items())
    note = f"{file.name}: columns {shown}"
    logger.info("%s", note)

    values = np.full((len(names), 2), np.nan)
    headings, zones = unknown(len(names)), [""] * len(names)
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
        position = [_cell(file, line, header[chosen[key]], cells[key], key) for key in keys]
        if kind == "latlon":
            check_degrees(position[0], position[1], f"{file}, line {line}")
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
            f"{file} names none of the {len(names)} images: its first row has {short(example)!r}, "
            f"the first image is {names[0] if names else 'missing'!r}; its paths must be relative "
            "to the root, to the images' folder or to its own"
        )
    notes = [note] + [f"{file.name}: rows of other images: {strangers}"] * (strangers > 0)
    if nowhere:
        notes.append(f"{file.name}: rows at 0, 0, taken for unknown: {nowhere}")
    values[~np.isfinite(values).all(axis=1)] = np.nan
    if kind == "metres" and not {"x", "y"} & set(columns or {}) and _like_degrees(values):
        x, y = (short(header[chosen[key]]) for key in ("x", "y"))
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


_Rows = list[tuple[int, list[str]]]  # the line of each, from 1, and its cells
_PREAMBLE = 50  # lines that may stand before the names of the columns


def _read_table(file: Path, columns: Mapping[str, str]) -> tuple[list[str], _Rows]:
    """Return the names of the columns, and the rows with their lines, from 1.

    Before the names there may be comments, blank lines, other text and Excel's ``sep=;``; the
    names may be a comment, too.
    """
    lines = [
        (number, line)
        for number, line in enumerate(io.StringIO(read_text(file), newline=None), start=1)
        if line.strip()
    ]
    mark = ""
    if lines and (excel := re.fullmatch(r"\s*\"?sep=(.)\"?\s*", lines[0][1], re.IGNORECASE)):
        mark, lines = excel[1], lines[1:]
    if not lines:
        raise GroundTruthError(f"{file} is empty; its first line must name columns")
    start = next(
        (i for i, (_, line) in enumerate(lines[:_PREAMBLE]) if _names_columns(line, mark, columns)),
        next((i for i, (_, line) in enumerate(lines) if not line.startswith("#")), 0),
    )
    first = lines[start][1].lstrip("# ")
    mark = mark or _separator(first)
    lines = [(lines[start][0], first)] + [
        (number, line) for number, line in lines[start + 1 :] if not line.startswith("#")
    ]
    try:
        reader = csv.reader((line for _, line in lines), delimiter=mark, skipinitialspace=True)
        rows = []
        for row in reader:
            rows.append((lines[min(reader.line_num, len(lines)) - 1][0], row))
    except csv.Error as error:
        raise GroundTruthError(f"{file} is not a table that can be read: {error}") from None
    header = [name.strip() for name in rows[0][1]]
    if mark != ",":
        rows = [(line, [_decimal_point(cell) for cell in row]) for line, row in rows]
    return header, rows[1:]


def _separator(line: str) -> str:
    return max("\t;,", key=line.count)


def _names_columns(line: str, mark: str, columns: Mapping[str, str]) -> bool:
    """Return whether a line holds the names that were given, or usual ones of positions."""
    line = line.lstrip("# ")
    try:
        cells = next(csv.reader([line], delimiter=mark or _separator(line), skipinitialspace=True))
    except (csv.Error, StopIteration):
        return False
    given, usual = set(columns.values()), _usual_keys([cell.strip() for cell in cells])
    if given:
        return given <= {cell.strip() for cell in cells}
    return {"lat", "lon"} <= usual.keys() or {"x", "y"} <= usual.keys()


def _usual_keys(header: Sequence[str]) -> dict[str, int]:
    """Return the columns that have usual names, by their keys."""
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in header]
    return {
        key: plain.index(name)
        for key, usual in reversed(COLUMNS.items())
        for name in reversed(usual)
        if name in plain
    }


def _image_column(
    file: Path,
    header: list[str],
    rows: _Rows,
    chosen: Mapping[str, int],
    find: Callable[[str, int], int | None],
) -> int:
    """Return the column that names most images, of those of usual names, or else of all."""
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in header]
    usual = [plain.index(name) for name in COLUMNS["image"] if name in plain]
    taken = {column for key, column in chosen.items() if key != "image"}
    others = [column for column in range(len(header)) if column not in {*usual, *taken}]
    hits: dict[int, int] = {}
    for column in [*usual, *others]:
        if column in others and any(hits.values()):
            break  # a column without a usual name is a last resort
        hits[column] = 0
        for line, row in rows:
            with contextlib.suppress(GroundTruthError):  # that it may be several
                cell = row[column].strip() if column < len(row) else ""
                hits[column] += bool(cell) and find(cell, line) is not None
    best = max(hits, key=lambda column: hits[column], default=None)
    if best is None or not (usual or hits[best]):
        raise GroundTruthError(
            f"{file} has no column that names images; it has {few(header)}. Name it with "
            "columns (image=NAME); the order of rows is never taken for that of images"
        )
    return best


def _decimal_point(cell: str) -> str:
    return cell.replace(",", ".") if re.fullmatch(r"\s*-?\d+,\d+\s*", cell) else cell


def _choose_columns(file: Path, header: list[str], columns: Mapping[str, str]) -> dict[str, int]:
    """Return the column of each key that was named or guessed."""
    chosen: dict[str, int] = {}
    for key, name in columns.items():
        if key not in COLUMNS:
            raise ConfigError(f"columns: {key!r} is unknown; one of {', '.join(COLUMNS)}")
        if name not in header:
            raise ConfigError(f"{file} has no column {name!r}; it has {few(header)}")
        chosen[key] = header.index(name)
    usual = _usual_keys(header)
    for key in COLUMNS:
        if key in columns or (key == "zone" and {"lat", "lon"} <= set(chosen)):
            continue
        # A pair that was named rules the other out.
        if key in ("lat", "lon") and {"x", "y"} & set(columns):
            continue
        if key in usual:
            chosen[key] = usual[key]
    for pair, other in ((("lat", "lon"), ("x", "y")), (("x", "y"), ("lat", "lon"))):
        if set(pair) <= set(chosen):
            chosen = {key: column for key, column in chosen.items() if key not in other}
            break
    else:
        raise GroundTruthError(
            f"{file} has no columns lat and lon, or x and y; it has {few(header)}. Name "
            "them with columns (lat=NAME lon=NAME, or x=NAME y=NAME); if no line names columns, "
            "write one above all others, such as image,lat,lon"
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
        paths = [os.path.normpath(os.path.join(base, entry)) for base in bases]
        hits = {whole[path] for path in paths if path in whole}
        if not hits and not has_image_suffix(entry):
            hits = {i for path in paths for i in stems.get(path, ())}
        if len(hits) > 1:
            several = " and ".join(names[i] for i in sorted(hits)[:2])
            raise GroundTruthError(
                f"{file}, line {line}: {short(entry)!r} may be {several}; write paths relative to "
                "the root, or give the queries' positions as a file of their own"
            )
        return hits.pop() if hits else None

    return find


def _cell(file: Path, line: int, column: str, text: str, key: str = "") -> float:
    """Return a number, or an angle if it is a latitude or longitude; NaN for an empty cell."""
    if text.lower() in ("", "nan", "none", "null", "na", "n/a"):
        return math.nan
    sides = {"lat": "NS", "lon": "EW"}.get(key)
    value = angle_of(text, sides) if sides else number_of(text)
    if math.isnan(value):
        raise GroundTruthError(
            f"{file}, line {line}: {short(text)!r} in column {short(column)!r} is not a number; "
            "empty cells are taken for unknown"
        )
    return value
