# SPDX-License-Identifier: MIT
"""Projection from degrees to metres on a plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import GroundTruthError
from patchnetvlad.own_data.positions.base import Positions

_FARTHEST = 1e12  # metres or frames: distances are exact to better than a millimetre


@dataclass(frozen=True, eq=False)
class Plane:
    """Positions of several sets of images on one plane.

    Attributes
    ----------
    values : list of ndarray [n, 2] of float64
        One array per set; NaN where a position is not known.
    kind : {"metres", "frames"}
    zone : str
        The UTM zone, such as ``32N``; empty if it is not known.
    notes : tuple of str
    """

    values: list[NDArray[np.float64]]
    kind: str
    zone: str
    notes: tuple[str, ...]


def to_plane(sets: Sequence[Positions]) -> Plane:
    """Project sets of positions onto one plane.

    Latitudes and longitudes are all projected into the UTM zone of the median position, with the
    false northing of its hemisphere, even if they lie beyond the border of the zone or the equator.
    Coordinates in metres stay unchanged, unless they are from several zones.

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

    Zones are 6 degrees wide everywhere, without the exceptions for Norway and Svalbard.
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
            "most images are in; make one data set per region"
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
            raise GroundTruthError(f"{east:.0f}, {north:.0f} is not a position in UTM zone {zone}")
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
