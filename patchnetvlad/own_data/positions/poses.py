# SPDX-License-Identifier: MIT
"""Positions from pose files (TUM, KITTI)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import ConfigError, GroundTruthError
from patchnetvlad.own_data.positions.base import Positions, number_of, read_text
from patchnetvlad.own_data.positions.track import interpolate

POSE_TOLERANCE = 0.1
"""Seconds from an image to the nearest pose, at most, unless told otherwise."""

_LEAST_SECONDS = 1e8  # since 1970, as opposed to counters
# Up to which a time since 1970 is in s, ms, us, ns; None: a date written as a number.
_UNITS = ((1e11, 1.0), (1e13, 1e-3), (1e14, None), (1e17, 1e-6), (math.inf, 1e-9))


def positions_from_poses(
    path: str | Path,
    names: Sequence[str],
    *,
    plane: str | None = None,
    time_tolerance: float = POSE_TOLERANCE,
    in_order: bool = True,
) -> Positions:
    """Read camera centres from a pose file of KITTI or of TUM.

    KITTI: 12 numbers per line, the first three rows of a matrix from camera to world. TUM:
    timestamp, tx ty tz, qx qy qz qw. Where images are named by times, since 1970 or as TUM's, in
    seconds to nanoseconds, TUM's poses are interpolated at these times. Otherwise, and of KITTI,
    there must be as many poses as images, which belong to them in order. The heading is that of
    the camera's z axis on the plane, from its second axis to its first.

    Parameters
    ----------
    path : str or Path
        Lines that begin with # are ignored.
    names : sequence of n str
        In the order of the poses.
    plane : {"xz", "xy", "yz"}, optional
        The axes that are kept; xz for KITTI, where y points down, and xy for TUM by default.
    time_tolerance : float
        Largest distance in seconds from an image to the nearest pose.
    in_order : bool, default True
        Whether the images are one sequence, so that they may match the poses by order.

    Returns
    -------
    Positions
        In metres; NaN for images without a pose.

    Raises
    ------
    GroundTruthError
        The file cannot be read, or images cannot be assigned to poses.
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
    taken = np.array([_time_in_name(name) for name in names])
    timed = not kitti and bool(np.isfinite(taken).any())
    if timed or len(table) != len(names) or not in_order:
        if kitti:
            apart = "" if in_order else " in two sets"
            raise GroundTruthError(
                f"{file} has {len(table)} poses for {len(names)} images{apart}; give the whole "
                "sequence as images, and choose queries by query_every or query_pattern; or give "
                "queries a pose file of their own (query_positions)"
            )
        notes[0] += ", found by the times in the images' names"
        centres, forward = _poses_at(file, table[:, 0], centres, forward, taken, time_tolerance)
    elif not kitti:
        notes[0] += ", in the order of the images, whose names hold no times"
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
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        words = line.replace(",", " ").split()
        if not words or words[0].startswith("#"):
            continue
        row = [number_of(word) for word in words]
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
    taken: NDArray[np.float64],
    tolerance: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Interpolate poses at the times that images are named by."""
    order = np.argsort(times, kind="stable")
    times, centres, forward = times[order], centres[order], forward[order]
    times = np.array([_in_seconds(time) for time in times])
    both = interpolate(times, np.concatenate([centres, forward], axis=1), taken, tolerance)
    if np.isnan(both).all():
        raise GroundTruthError(
            f"{file} has {len(times)} poses for {len(taken)} images, and {_span(taken)} within "
            f"{tolerance:g} s of the poses' (from {times[0]:.6f} to {times[-1]:.6f}); is it of "
            "these images? A table (.csv) can give each image its position by name"
        )
    return both[:, :3], both[:, 3:]


def _time_in_name(name: str) -> float:
    """Return the seconds that an image is named by; NaN for no number or a mere counter."""
    stem = os.path.splitext(name.rsplit("/", 1)[-1])[0]
    value = number_of(stem)
    if math.isnan(value) and (match := re.search(r"(?<![0-9.])[0-9]{9,}(\.[0-9]+)?$", stem)):
        value = float(match[0])  # after words
    return _in_seconds(value) if "." in stem or value > _LEAST_SECONDS else math.nan


def _in_seconds(time: float) -> float:
    """Return a time of any unit in seconds; NaN for a date such as 20240501120000."""
    unit = next((unit for most, unit in _UNITS if time < most), None)
    return math.nan if unit is None else time * unit


def _span(taken: NDArray[np.float64]) -> str:
    known = taken[np.isfinite(taken)]
    if not len(known):
        return "the images are not named by times"
    return f"the times in the images' names (from {known.min():.6f} to {known.max():.6f}) are not"
