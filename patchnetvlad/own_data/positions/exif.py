# SPDX-License-Identifier: MIT
"""Positions and times from EXIF data."""

from __future__ import annotations

import calendar
import datetime
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.datasets.images import open_image
from patchnetvlad.errors import ImageError
from patchnetvlad.own_data.positions.base import Positions, unknown, utc_offset

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
        NaN for images that have no position, cannot be opened, or are at exactly 0, 0.
    """
    found, notes = _read_exif(names, root, _gps)
    values = np.full((len(names), 2), np.nan)
    headings = unknown(len(names))
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
        Seconds since 1970 by the camera's clock, or in UTC if it wrote its time zone; NaN without
        a time.
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
            with open_image(Path(root) / name) as image:
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
            degrees = _degrees(fields[value])
            side = fields[sign]
            side = side.decode("ascii", "replace") if isinstance(side, bytes) else str(side)
            pair.append(-degrees if side.strip("\0 ").upper() == negative else degrees)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    if not all(map(math.isfinite, pair)):
        return None
    heading = _number(fields.get(17))
    return pair[0], pair[1], heading if math.isfinite(heading) else math.nan


def _degrees(value: Any) -> float:
    """Return degrees of degrees, minutes, seconds; the last of these may not be given (0/0)."""
    parts = [_number(part) for part in (value if isinstance(value, (tuple, list)) else (value,))]
    while len(parts) > 1 and math.isnan(parts[-1]):
        parts.pop()
    return sum(part / 60**i for i, part in enumerate(parts))


def _number(value: Any) -> float:
    """Return a number; NaN for what is none, such as 0/0."""
    try:
        return float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return math.nan


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
        return calendar.timegm(moment.timetuple()) + part - utc_offset(offset), zoned
    return None
