# SPDX-License-Identifier: MIT
"""Camera poses of reference images, read from the files of their data sets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import GroundTruthError


@dataclass(frozen=True)
class Pose:
    """Where a camera is and looks: x_camera = R x_world + t.

    Attributes
    ----------
    rotation : tuple of 4 float
        Unit quaternion w, x, y, z of R, from world to camera.
    translation : tuple of 3 float
        t, in the unit of the data set (metres); not the position of the camera.
    """

    rotation: tuple[float, float, float, float]
    translation: tuple[float, float, float]

    @classmethod
    def from_translation(cls, rotation: Sequence[float], translation: Sequence[float]) -> Pose:
        """Take R as a quaternion w, x, y, z and t; ValueError if its length is not 1."""
        _check_sane((*rotation, *translation))
        length = math.hypot(*rotation)
        if not 0.99 < length < 1.01:
            raise ValueError(f"the quaternion has length {length:.6g}; it must be 1")
        w, x, y, z = (part / length for part in rotation)
        t = tuple(float(part) for part in translation)
        return cls((w, x, y, z), (t[0], t[1], t[2]))

    @classmethod
    def from_centre(cls, rotation: Sequence[float], centre: Sequence[float]) -> Pose:
        """Take R as a quaternion w, x, y, z and the position c of the camera; t = -R c."""
        pose = cls.from_translation(rotation, centre)
        translation = -_matrix(pose.rotation) @ np.array(centre)
        return cls.from_translation(rotation, translation.tolist())

    @classmethod
    def from_camera_to_world(cls, matrix: NDArray[np.float64]) -> Pose:
        """Take the [4, 4] matrix that maps camera to world coordinates; ValueError if it cannot."""
        turn, centre = matrix[:3, :3], matrix[:3, 3]
        _check_sane(matrix.ravel())
        if not np.allclose(matrix[3], (0, 0, 0, 1), atol=1e-6):
            raise ValueError("the last row of the matrix is not 0 0 0 1")
        if not np.allclose(turn @ turn.T, np.eye(3), atol=1e-3) or np.linalg.det(turn) < 0:
            raise ValueError("the matrix does not hold a rotation")
        return cls.from_translation(_quaternion(turn.T), (-turn.T @ centre).tolist())

    def line(self, name: str) -> str:
        """Return ``name qw qx qy qz tx ty tz``, the line of visuallocalization.net."""
        return " ".join([name, *map(repr, (*self.rotation, *self.translation))])


def _check_sane(values: Iterable[float]) -> None:
    if not all(abs(value) < 1e30 for value in values):
        raise ValueError("the pose holds NaN or a number of 1e30 or more")


def _matrix(q: tuple[float, float, float, float]) -> NDArray[np.float64]:
    """Rotation matrix [3, 3] of a unit quaternion w, x, y, z."""
    from scipy.spatial.transform import Rotation

    w, *xyz = q
    return Rotation.from_quat([*xyz, w]).as_matrix()


def _quaternion(r: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Unit quaternion w, x, y, z, w >= 0, of the rotation nearest to a matrix [3, 3]."""
    from scipy.spatial.transform import Rotation

    x, y, z, w = (float(part) for part in Rotation.from_matrix(r).as_quat(canonical=True))
    return w, x, y, z


def read_reference_poses(paths: str | Path | Sequence[str | Path]) -> dict[str, Pose]:
    """Read the poses of reference images.

    The format of a file is recognised by its content:

    - RobotCar Seasons, ``3D-models/all-merged/all.nvm`` (VisualSfM): after ``NVM_V3`` and the
      number of cameras, ``name focal qw qx qy qz cx cy cz distortion 0``: the rotation from world
      to camera and the position of the camera.
    - RobotCar Seasons, ``images.txt`` of the individual models, and other models of COLMAP in
      text: ``id qw qx qy qz tx ty tz camera name``, from world to camera, each line followed by
      one of key points.
    - RobotCar Seasons v2, ``robotcar_v2_train.txt``: ``name`` and the 16 numbers of a matrix
      [4, 4], row by row, that maps camera to world coordinates.
    - Extended CMU Seasons, ``ground-truth-database-images-sliceN.txt`` and the files in
      ``camera-poses``: ``name qw qx qy qz cx cy cz``, the rotation from world to camera and the
      position of the camera. (Files made to be submitted look the same but hold translations;
      they are no references.)

    Parameters
    ----------
    paths : str or Path, or sequence of them

    Returns
    -------
    dict of str to Pose
        By image name as in the file, without suffix (models of RobotCar name ``.png`` files,
        the data set has ``.jpg``) and without a leading ``./``.

    Raises
    ------
    GroundTruthError
        A file is missing, is none of these, or gives an image a second, other pose.
    """
    poses: dict[str, Pose] = {}
    for file in [Path(paths)] if isinstance(paths, str | Path) else map(Path, paths):
        try:
            with file.open(encoding="utf-8-sig") as opened:
                for number, name, pose in _poses(file, opened):
                    key = pose_key(name)
                    if poses.setdefault(key, pose) != pose:
                        raise _line_error(file, number, f"{name} has another pose already")
        except UnicodeDecodeError:
            raise GroundTruthError(
                f"the reference poses {file} are not a text file in UTF-8; of COLMAP's models, "
                "give the one in text"
            ) from None
        except OSError as error:
            raise GroundTruthError(
                f"the reference poses {file} cannot be read: {error.strerror}"
            ) from None
    if not poses:
        raise GroundTruthError("the reference poses name no image")
    return poses


def find_poses(names: Sequence[str], poses: Mapping[str, Pose]) -> list[Pose | None]:
    """Find the poses of images.

    A name fits a pose if its path ends in the name that the pose has in its file:
    ``images/overcast-reference/rear/1.jpg`` in ``overcast-reference/rear/1``. In Extended CMU
    Seasons these are names of files, which are all different there.

    Parameters
    ----------
    names : sequence of N str
    poses : mapping of str to Pose
        As ``read_reference_poses`` gives them.

    Returns
    -------
    list of N Pose or None
        None for images without one.
    """
    found: list[Pose | None] = []
    for name in names:
        parts = pose_key(name).split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        found.append(next((poses[end] for end in ends if end in poses), None))
    return found


def pose_key(name: str) -> str:
    """Return an image's name as poses go by it: without suffix and leading ``./``."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    return re.sub(r"\.[^./]+$", "", "/".join(parts))


def _poses(file: Path, opened: Iterator[str]) -> Iterator[tuple[int, str, Pose]]:
    """Yield line, name and pose of each image."""
    rows = enumerate(opened, start=1)
    first = next(((n, line) for n, line in rows if line.strip() and line[0] != "#"), None)
    if first is None:
        return
    number, line = first
    if line.startswith("NVM_V3"):
        yield from _nvm(file, rows)
        return
    fields = line.split()
    colmap = len(fields) >= 10 and fields[0].isdecimal() and fields[8].isdecimal()
    while True:
        if line.strip() and not line.startswith("#"):
            fields = line.rstrip("\r\n").split(maxsplit=9) if colmap else line.split()
            yield number, *_pose(file, number, fields, colmap)
            if colmap:
                next(rows, None)  # key points, possibly none
        row = next(rows, None)
        if row is None:
            return
        number, line = row


def _pose(file: Path, number: int, fields: list[str], colmap: bool) -> tuple[str, Pose]:
    try:
        if colmap and len(fields) == 10:
            values = [float(field) for field in fields[1:8]]
            return fields[9].strip(), Pose.from_translation(values[:4], values[4:])
        if not colmap and len(fields) in (8, 17):
            values = [float(field) for field in fields[1:]]
            if len(values) == 7:
                return fields[0], Pose.from_centre(values[:4], values[4:])
            return fields[0], Pose.from_camera_to_world(np.array(values).reshape(4, 4))
    except ValueError as error:
        raise _line_error(file, number, str(error)) from None
    expected = "10 (COLMAP)" if colmap else "8 (Extended CMU) or 17 (RobotCar v2)"
    raise _line_error(file, number, f"it has {len(fields)} fields, not {expected}")


def _nvm(file: Path, rows: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str, Pose]]:
    """Yield the cameras of the first model; points, by far the most lines, are not read."""
    count = None
    for number, line in rows:
        fields = line.rsplit(maxsplit=10)
        if not fields:
            continue
        try:
            if count is None:
                count = int(fields[0])
            elif len(fields) == 11:
                values = [float(field) for field in fields[2:9]]
                yield number, fields[0].strip('"'), Pose.from_centre(values[:4], values[4:])
                count -= 1
            else:
                raise ValueError(f"it has {len(fields)} fields; a camera has 11")
        except ValueError as error:
            raise _line_error(file, number, str(error)) from None
        if count <= 0:
            return
    raise GroundTruthError(f"the reference poses {file} end before the last camera")


def _line_error(file: Path, number: int, problem: str) -> GroundTruthError:
    return GroundTruthError(f"the reference poses {file}, line {number}: {problem}")
