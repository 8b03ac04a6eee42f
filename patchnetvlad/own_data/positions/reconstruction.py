# SPDX-License-Identifier: MIT
"""Positions from the poses of a reconstruction: COLMAP and kapture."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import ConfigError, GroundTruthError
from patchnetvlad.evaluation.poses import Pose, find_poses, pose_key, read_reference_poses
from patchnetvlad.own_data.positions.base import Positions, number_of, read_bytes, read_text

COLMAP_FILES = ("images.bin", "images.txt")
KAPTURE_FILES = ("trajectories.txt", "records_camera.txt")


def find_reconstruction(path: Path) -> Path | None:
    """Return the file of poses of COLMAP or kapture that a path means; None for neither.

    Parameters
    ----------
    path : Path
        ``images.bin`` or ``images.txt`` of COLMAP, ``trajectories.txt`` of kapture, or a folder
        that holds one of these, directly or as these programs lay it out.

    Returns
    -------
    Path or None
    """
    if path.is_file():
        return path if path.name in (*COLMAP_FILES, KAPTURE_FILES[0]) else None
    below = [
        *COLMAP_FILES,
        *(f"sparse/0/{name}" for name in COLMAP_FILES),
        f"sensors/{KAPTURE_FILES[0]}",
    ]
    return next(
        (path / name for name in [*below, KAPTURE_FILES[0]] if (path / name).is_file()), None
    )


def find_kapture(folder: Path) -> Path | None:
    """Return the poses of a kapture data set whose folder is given; None if it is not one."""
    found = find_reconstruction(folder)
    return found if found is not None and found.name == KAPTURE_FILES[0] else None


def positions_from_reconstruction(
    path: str | Path, names: Sequence[str], *, plane: str | None = None
) -> Positions:
    """Read camera positions from a COLMAP model or a kapture data set.

    Parameters
    ----------
    path : str or Path
        See :func:`find_reconstruction`. Beside kapture's ``trajectories.txt``, which needs poses of
        the cameras themselves, lies ``records_camera.txt``.
    names : sequence of n str
        An image's name may begin with folders that its name in the file does not have.
    plane : {"xz", "xy", "yz"}, optional
        The axes that are kept; by default the two over which the cameras extend furthest.

    Returns
    -------
    Positions
        In the unit of the file, which for COLMAP is metres only if the model was scaled so; NaN
        for images without a pose.

    Raises
    ------
    GroundTruthError
        There are no such files, they cannot be read, or two poses fit an image's name.
    ConfigError
        An unknown plane.
    """
    if plane not in (None, "xz", "xy", "yz"):
        raise ConfigError(f"plane = {plane!r} is unknown; one of xz, xy, yz")
    file = find_reconstruction(Path(path))
    if file is None:
        raise GroundTruthError(
            f"{path} holds no poses of COLMAP ({', '.join(COLMAP_FILES)}) or kapture "
            f"({' and '.join(KAPTURE_FILES)})"
        )
    kapture = file.name == KAPTURE_FILES[0]
    if kapture:
        poses = _kapture(file)
    else:
        poses = _colmap_binary(file) if file.suffix == ".bin" else read_reference_poses(file)
    found = find_poses(names, poses)
    if not any(found):
        raise GroundTruthError(
            f"{file} has a pose of {next(iter(poses), 'no image')}, but of none of the images, the "
            f"first of which is {names[0]}; names must end as in the file"
        )
    centres, forward = _centres(found)
    axes = ["xyz".index(axis) for axis in plane] if plane else _widest(centres)
    flat = forward[:, axes]
    with np.errstate(invalid="ignore"):
        headings = np.degrees(np.arctan2(flat[:, 0], flat[:, 1])) % 360
        headings[~(np.linalg.norm(flat, axis=1) > 0.1)] = np.nan
    kept = "".join("xyz"[axis] for axis in axes)
    notes = [
        f"{file.name}: {len(poses)} poses of {'kapture' if kapture else 'COLMAP'}, plane {kept}"
    ]
    if not kapture:
        notes.append("a model of COLMAP is in metres only if it was scaled so")
    return Positions(centres[:, axes], "metres", headings, notes=tuple(notes))


def _centres(poses: Sequence[Pose | None]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return centres of cameras [n, 3], and where they look; NaN where there is no pose."""
    from scipy.spatial.transform import Rotation

    centres, forward = np.full((2, len(poses), 3), np.nan)
    for i, pose in enumerate(poses):
        if pose is not None:
            w, *xyz = pose.rotation
            turn = Rotation.from_quat([*xyz, w]).inv()
            centres[i] = -turn.apply(pose.translation)
            forward[i] = turn.apply([0.0, 0.0, 1.0])
    return centres, forward


def _widest(centres: NDArray[np.float64]) -> list[int]:
    extents = np.nanmax(centres, axis=0) - np.nanmin(centres, axis=0)
    return sorted(np.argsort(-extents, kind="stable")[:2].tolist())


def _pose(file: Path, where: str, values: Sequence[float]) -> Pose:
    """Make a pose of qw qx qy qz tx ty tz, from world to camera."""
    try:
        if len(values) != 7:
            raise ValueError(f"it has {len(values)} numbers, not seven: qw qx qy qz tx ty tz")
        return Pose.from_translation(values[:4], values[4:])
    except ValueError as error:
        raise GroundTruthError(f"{file}, {where}: {error}") from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.startswith("#"):
            yield number, line.strip()


def _colmap_binary(file: Path) -> dict[str, Pose]:
    """Read the number of images; of each id, pose, camera, name, and key points."""
    content = read_bytes(file)
    poses: dict[str, Pose] = {}
    head, count_of = struct.Struct("<I7dI"), struct.Struct("<Q")
    try:
        (count,), at = count_of.unpack_from(content), count_of.size
        for _ in range(count):
            _, *pose, _ = head.unpack_from(content, at)
            at += head.size
            end = content.index(b"\0", at)
            name = content[at:end].decode()
            poses[pose_key(name)] = _pose(file, name, pose)
            (points,) = count_of.unpack_from(content, end + 1)
            at = end + 1 + count_of.size + 24 * points
        if at != len(content):
            raise ValueError(f"it ends at byte {at} of {len(content)}")
    except (struct.error, ValueError, OverflowError) as error:
        if isinstance(error, GroundTruthError):
            raise
        raise GroundTruthError(f"{file} is not COLMAP's images.bin, or is cut: {error}") from None
    return poses


def _kapture(file: Path) -> dict[str, Pose]:
    """Read ``timestamp, camera, qw, qx, qy, qz, tx, ty, tz`` and ``timestamp, camera, image``."""
    records = file.with_name(KAPTURE_FILES[1])
    poses: dict[tuple[str, ...], Pose] = {}
    for number, line in _lines(file):
        words = [word.strip() for word in line.split(",")]
        if line:
            poses[tuple(words[:2])] = _pose(file, f"line {number}", [*map(number_of, words[2:])])
    found: dict[str, Pose] = {}
    for number, line in _lines(records):
        words = [word.strip() for word in line.split(",", maxsplit=2)]
        if line and len(words) != 3:
            raise GroundTruthError(
                f"{records}, line {number}: needed is 'timestamp, camera, image'"
            )
        if line and (pose := poses.get(tuple(words[:2]))) is not None:
            found[pose_key(words[2])] = pose
    if poses and not found:
        raise GroundTruthError(
            f"{file} has no pose of a camera of {records}; turn poses of rigs into poses of their "
            "cameras first"
        )
    return found
