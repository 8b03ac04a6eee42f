# SPDX-License-Identifier: MIT
"""Ground truth: positions of the queries and of the index images, and a distance."""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.assets.data_files import resolve_ground_truth
from patchnetvlad.base.files import replacing
from patchnetvlad.errors import GroundTruthError

logger = logging.getLogger(__name__)

# Keys, and other names that they go by; case and underscores make no difference.
_NAMES = {
    "utmQ": ("utmq", "utmquery", "utmqueries"),
    "utmDb": ("utmdb", "utmdatabase", "utmindex"),
    "posDistThr": ("posdistthr", "posdistthreshold", "threshold"),
}
_MOST_COORDINATES = 3
CLIP_DISTANCE = 1000.0
"""Distance of two clips, in frames: further than any tolerance."""
_UNITS = ("m", "frames")


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Where queries and index images were taken.

    Attributes
    ----------
    utm_queries : ndarray [Q, 2] of float64
        Positions, in metres for most data sets; any unit shared with ``threshold`` works. There
        may be one or three coordinates instead, the same number for queries and index.
    utm_index : ndarray [N, 2] of float64
    threshold : float
        An index image within this distance of a query, in the same unit, is a positive.
    unit : {"m", "frames", ""}
        Of positions and threshold; ``""`` where it is not known. With ``"frames"``, the last
        coordinate is the number of a frame, and the first, if there are two, tells its clip:
        multiples of 1000.
    """

    utm_queries: NDArray[np.float64]
    utm_index: NDArray[np.float64]
    threshold: float
    unit: str = ""

    @property
    def has_clips(self) -> bool:
        """Whether positions are those of frames in clips."""
        return self.unit == "frames" and self.utm_index.shape[1] == 2

    @classmethod
    def load(cls, path: str | Path, threshold: float | None = None) -> GroundTruth:
        """Read a ``.npz`` with ``utmQ`` [Q, 2], ``utmDb`` [N, 2] and ``posDistThr``.

        Positions may have any numeric type, and may be transposed ([2, Q] and [2, N], as in the
        ``.mat`` files of Pittsburgh and Tokyo) if their shape shows it. The keys may also be
        called ``utm_queries``, ``utm_index`` and ``threshold``, in either case, with or without
        underscores. Other arrays in the file are not read; nothing is ever unpickled.

        Parameters
        ----------
        path : str or Path
            The file, or the bare name of a benchmark's file, which is fetched on first use.
        threshold : float, optional
            Used in place of ``posDistThr``.

        Returns
        -------
        GroundTruth

        Raises
        ------
        GroundTruthError
            The file is missing or damaged, lacks an array, holds NaN, or has arrays of ambiguous
            shape.
        """
        file = resolve_ground_truth(path)
        try:
            content = np.load(file, allow_pickle=False)
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise ValueError("it is not an .npz archive")
            with content:
                keys = _keys(content.files, threshold is None, file)
                # Members that are not arrays come as bytes.
                arrays = {name: np.asarray(content[key]) for name, key in keys.items()}
                unit = _stored_unit(content)
        except GroundTruthError:
            raise
        except Exception as error:  # Damage shows in NumPy, in zipfile, in zlib.
            reason = textwrap.shorten(str(error) or type(error).__name__, 250, placeholder=" ...")
            raise GroundTruthError(f"the ground truth {file} cannot be read: {reason}") from None
        queries, index = _positions(arrays["utmQ"], arrays["utmDb"], file)
        if threshold is None:
            stored = np.asarray(arrays["posDistThr"])
            if stored.size != 1 or stored.dtype.kind not in "fiu":
                raise GroundTruthError(
                    f"{file}: 'posDistThr' must be one number, not {stored.dtype} of shape "
                    f"{list(stored.shape)}; or give --posDistThr"
                )
            threshold = float(stored.reshape(-1)[0])
        if not (np.isfinite(threshold) and threshold >= 0):
            raise GroundTruthError(
                f"{file}: the distance for a positive is {threshold}; it must be 0 or more"
            )
        unit = unit or _likely_unit(np.concatenate([queries, index]))
        return cls(queries, index, threshold, unit)

    def save(self, path: Path) -> Path:
        """Write a ``.npz`` that :meth:`load` reads; return its path.

        Raises
        ------
        OutputError
            The file cannot be written.
        """
        arrays: dict[str, Any] = {
            "utmQ": self.utm_queries,
            "utmDb": self.utm_index,
            "posDistThr": np.float64(self.threshold),
        }
        if self.unit:
            arrays["unit"] = np.array(self.unit)
        with replacing(path) as file:
            np.savez(file, **arrays)
        return path

    def check_counts(self, num_queries: int, num_index: int, source: str | Path) -> None:
        """Raise GroundTruthError unless there is one position per image."""
        for what, name, have, need in (
            ("queries", "utmQ", len(self.utm_queries), num_queries),
            ("index images", "utmDb", len(self.utm_index), num_index),
        ):
            if have != need:
                counts = (len(self.utm_queries), len(self.utm_index))
                hint = (
                    "; were the two lists exchanged?" if counts == (num_index, num_queries) else ""
                )
                raise GroundTruthError(
                    f"{source}: {name} has {have} rows for {need} {what} in the list; ground truth "
                    f"and lists must be of the same data set, in the same order{hint}"
                )

    def positives(self) -> list[NDArray[np.int64]]:
        """Return for every query the index images within the threshold, ascending.

        Returns
        -------
        list of ndarray of int64, length Q
            Rows of the index list.

        Examples
        --------
        >>> queries, index = np.array([[0.0, 0.0]]), np.array([[3.0, 4.0], [99.0, 0.0]])
        >>> [rows.tolist() for rows in GroundTruth(queries, index, threshold=5.0).positives()]
        [[0]]
        """
        from sklearn.neighbors import NearestNeighbors

        # The default is inexact for few images: it expands the squares of large coordinates.
        search = NearestNeighbors(algorithm="kd_tree", n_jobs=-1).fit(self.utm_index)
        found = search.radius_neighbors(
            self.utm_queries, radius=self.threshold, return_distance=False
        )
        return [np.sort(indices).astype(np.int64) for indices in found]


def _stored_unit(content: np.lib.npyio.NpzFile) -> str:
    """Return the unit that a file names, "" if it names none that is known."""
    try:
        unit = str(content["unit"])
    except (KeyError, ValueError):  # it has none; it has an object of Python's
        return ""
    return unit if unit in _UNITS else ""


def _likely_unit(positions: NDArray[np.float64]) -> str:
    """Tell the unit of positions [n, D] that do not say it, "" where it cannot be told."""
    if (positions % 1).any():
        return "m"
    clips = positions[:, 0]
    of_clips = positions.shape[1] == 2 and np.ptp(clips) and not (clips % CLIP_DISTANCE).any()
    return "frames" if of_clips else ""


def _keys(found: Sequence[str], with_threshold: bool, file: Path) -> dict[str, str]:
    """Return the key in the file of each array that is needed."""
    keys = {}
    for name, others in _NAMES.items():
        if name == "posDistThr" and not with_threshold:
            continue
        like = [key for key in found if re.sub("[_ -]", "", key.lower()) in others]
        if name in found:
            like = [name]
        if not like:
            holds = textwrap.shorten(", ".join(found) or "nothing", 200, placeholder=" ...")
            hint = "; or give --posDistThr" if name == "posDistThr" else ""
            raise GroundTruthError(
                f"the ground truth {file} has no {name!r} (it holds {holds}){hint}"
            )
        if len(like) > 1:
            raise GroundTruthError(
                f"the ground truth {file} has {' and '.join(like[:5])}; keep one, as {name!r}"
            )
        if like != [name]:
            logger.info("%s: %r is read as %r", file, like[0], name)
        keys[name] = like[0]
    return keys


def _positions(
    queries: NDArray[np.generic], index: NDArray[np.generic], file: Path
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Check both arrays of positions, and turn them upright."""
    arrays = {"utmQ": queries, "utmDb": index}
    for name, values in arrays.items():
        if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "fiu":
            raise GroundTruthError(
                f"{file}: {name!r} must be numbers of shape [n, 2], not {values.dtype} of shape "
                f"{list(values.shape)}"
            )
        if values.shape[1] > _MOST_COORDINATES and len(values) != 2:
            raise GroundTruthError(
                f"{file}: {name!r} of shape {list(values.shape)} has {values.shape[1]} columns; a "
                "position has 2, easting and northing: keep these"
            )
    # A row of more than three numbers is not a position: then the rows are coordinates.
    lying = any(values.shape[1] > _MOST_COORDINATES for values in arrays.values())
    upright = {}
    for name, values in arrays.items():
        if lying and len(values) == 2:
            logger.info("%s: %r is of shape %s; it is transposed", file, name, list(values.shape))
            values = values.T
        positions = values.astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(positions).all(axis=1))
        if len(bad):
            raise GroundTruthError(
                f"{file}: {name!r} holds NaN or infinite values in {len(bad)} rows, first in row "
                f"{bad[0]} (from 0)"
            )
        upright[name] = positions
    if upright["utmQ"].shape[1] != upright["utmDb"].shape[1]:
        raise GroundTruthError(
            f"{file}: 'utmQ' has {upright['utmQ'].shape[1]} columns, 'utmDb' has "
            f"{upright['utmDb'].shape[1]}; both must be of shape [n, 2]"
        )
    return upright["utmQ"], upright["utmDb"]
