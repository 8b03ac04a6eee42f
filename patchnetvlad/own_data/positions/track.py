# SPDX-License-Identifier: MIT
"""Positions from GPX tracks."""

from __future__ import annotations

import calendar
import datetime
import math
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import GroundTruthError
from patchnetvlad.own_data.positions.base import (
    Positions,
    check_degrees,
    number_of,
    read_bytes,
    short,
    unknown,
    utc_offset,
)
from patchnetvlad.own_data.positions.exif import image_times

GPX_TOLERANCE = 10.0
"""Seconds from an image to the nearest point of a track, at most, unless told otherwise."""


def positions_from_gpx(
    path: str | Path,
    names: Sequence[str],
    *,
    root: str | Path = "",
    time_offset: float = 0.0,
    time_tolerance: float = GPX_TOLERANCE,
) -> Positions:
    """Find the position of a GPX track at the time of each image.

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
        Seconds to add to the images' times to get the times of the track.
    time_tolerance : float
        Seconds from an image to the nearest point of the track, at most.

    Returns
    -------
    Positions
        Latitude and longitude; NaN for images without a time near a point of the track.

    Raises
    ------
    GroundTruthError
        The track cannot be read, has no points with times, or covers the time of no image.
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
    return Positions(values, "latlon", unknown(len(names)), notes=(shown, *notes))


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
        The file cannot be read, or has no such points.
    """
    file = Path(path)
    raw = read_bytes(file)
    if b"<!DOCTYPE" in raw[:100_000].upper():
        raise GroundTruthError(f"{file} declares a document type, which a GPX track has no use for")
    try:
        tree = ElementTree.fromstring(raw)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise GroundTruthError(f"{file} is not a GPX file: {error}") from None
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
        latitude, longitude = (number_of(element.get(key, "")) for key in ("lat", "lon"))
        if math.isnan(latitude + longitude):
            raise GroundTruthError(f"{file}: point {number} of the track has no lat and lon")
        check_degrees(latitude, longitude, f"{file}, point {number} of the track")
        found.setdefault(_parse_time(text, file), (latitude, longitude))
    if not found:
        why = f"its {without} points have no times" if without else "it has no track points"
        raise GroundTruthError(f"{file} is not a track that images can be found on: {why}")
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
        return calendar.timegm(moment.timetuple()) + fraction - utc_offset(match[4] or "")
    except ValueError:
        raise GroundTruthError(
            f"{file}: {short(text.strip())!r} is not a time such as 2024-05-01T12:00:00Z"
        ) from None


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
