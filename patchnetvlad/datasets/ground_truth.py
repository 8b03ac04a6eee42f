# SPDX-License-Identifier: MIT
"""Ground truth: positions and a distance, or the right answers to each query."""

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
from patchnetvlad.base.text import one_line
from patchnetvlad.datasets.kinds import kind_of
from patchnetvlad.datasets.right_answers import (
    PAIRS_KEY,
    ROWS_KEY,
    TABLES,
    Names,
    read_array,
    read_table,
    rows_of_array,
    rows_of_pairs,
)
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
    """Positions of queries and index images, or the right answers to each query.

    Attributes
    ----------
    utm_queries : ndarray [Q, 2] of float64
        Positions, in metres for most data sets; any unit shared with ``threshold`` works. There
        may be one or three coordinates instead, the same number for queries and index.
    utm_index : ndarray [N, 2] of float64
    threshold : float
        An index image within this distance of a query, in the same unit, is a positive.
    right : tuple of Q ndarray of int64, or None
        Rows of the right index images of each query, where there are no positions: these have no
        coordinates then, [Q, 0] and [N, 0], and ``threshold`` means nothing.
    unit : {"m", "frames", ""}
        Of positions and threshold; ``""`` where it is not known. With ``"frames"``, the last
        coordinate is the number of a frame, and the first, if there are two, tells its clip:
        multiples of 1000.
    """

    utm_queries: NDArray[np.float64]
    utm_index: NDArray[np.float64]
    threshold: float
    right: tuple[NDArray[np.int64], ...] | None = None
    unit: str = ""

    @property
    def has_clips(self) -> bool:
        """Whether positions are frame numbers within clips."""
        return self.unit == "frames" and self.utm_index.shape[1] == 2

    @classmethod
    def of_right_answers(cls, right: Sequence[NDArray[np.int64]], num_index: int) -> GroundTruth:
        """Make ground truth from the rows of the right index images, out of ``num_index``."""
        return cls(np.empty((len(right), 0)), np.empty((num_index, 0)), 0.0, tuple(right))

    @property
    def distance(self) -> float | None:
        """The threshold; None without positions."""
        return self.threshold if self.right is None else None

    @classmethod
    def load(
        cls, path: str | Path, threshold: float | None = None, names: Names | None = None
    ) -> GroundTruth:
        """Read positions, or the right answers to each query.

        A ``.npz`` with ``utmQ`` [Q, 2], ``utmDb`` [N, 2] and ``posDistThr`` holds positions. Right
        answers are read from a table of names (``.csv``, ``.tsv``, ``.txt``:
        :func:`~patchnetvlad.datasets.right_answers.read_table`), from ``.npy``
        (:func:`~patchnetvlad.datasets.right_answers.read_array`), or from a ``.npz`` with
        ``positives`` [Q, m], filled up with -1, or ``pairs`` [n, 2] of query and index image, as
        rows of the lists, from 0.

        Positions may have any numeric type, and may be transposed ([2, Q] and [2, N], as in the
        ``.mat`` files of Pittsburgh and Tokyo) if their shape shows it. The keys may also be
        called ``utm_queries``, ``utm_index`` and ``threshold``, in either case, with or without
        underscores. Other arrays in the file are not read; no pickled code is ever run.

        Parameters
        ----------
        path : str or Path
            The file, or the bare name of a benchmark's file, which is fetched on first use.
        threshold : float, optional
            Used in place of ``posDistThr``.
        names : (sequence of Q str, sequence of N str), optional
            Of queries and index images, as in the lists: needed for right answers.

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
        if (right := _right_answers(file, names)) is not None:
            if names is None:
                raise GroundTruthError(f"{file} can only be read together with the lists")
            return cls.of_right_answers(right, len(names[1]))
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
            reason = one_line(error)
            if "pickle" in reason:  # NumPy advises to load them
                reason = "it holds Python objects, not numbers"
            if kind := kind_of(file):
                reason = kind
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
        return cls(queries, index, threshold, unit=unit)

    def save(self, path: Path) -> Path:
        """Write a ``.npz`` that :meth:`load` reads; return its path.

        Raises
        ------
        OutputError
            The file cannot be written.
        ValueError
            There are no positions.
        """
        if self.right is not None:
            raise ValueError("ground truth without positions is not written")
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
        """Raise GroundTruthError unless it has this many queries and index images."""
        if self.right is not None and len(self.right) != num_queries:
            raise GroundTruthError(
                f"{source} has right answers of {len(self.right)} queries, the list has "
                f"{num_queries}; it must be of the same queries, in the same order"
            )
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

    def check_unit(self, source: str | Path) -> None:
        """Raise GroundTruthError for degrees of latitude and longitude with a distance in metres.

        Only if that is certain: coordinates in the range of degrees, all of them nearer to each
        other than the distance, by which every index image would be right.
        """
        both = np.concatenate([self.utm_queries, self.utm_index])
        if both.shape[1] < 2 or len(self.utm_index) < 2 or self.threshold < 1:
            return
        both = both[:, :2]
        low, high = np.sort(np.abs(both).max(axis=0))
        small = low <= 90 and 1 < high <= 360 and (both % 1 != 0).any()
        extent = np.ptp(both, axis=0)
        if small and extent.max() < 1 and np.hypot(*extent) <= self.threshold:
            raise GroundTruthError(
                f"{source}: positions from {both.min(axis=0)} to {both.max(axis=0)} are degrees, "
                f"not metres: all are right within {self.threshold:g}; project them to UTM "
                "(`patchnetvlad-dataset create` does), or give --posDistThr in degrees"
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
        if self.right is not None:
            return list(self.right)
        from sklearn.neighbors import NearestNeighbors

        # The default is inexact for few images: it expands the squares of large coordinates.
        search = NearestNeighbors(algorithm="kd_tree", n_jobs=-1).fit(self.utm_index)
        found = search.radius_neighbors(
            self.utm_queries, radius=self.threshold, return_distance=False
        )
        return [np.sort(indices).astype(np.int64) for indices in found]


def _right_answers(file: Path, names: Names | None) -> tuple[NDArray[np.int64], ...] | None:
    """Read the right answers to each query; None where the file is one of positions."""
    suffix = file.suffix.lower()
    if suffix in TABLES:
        if kind := kind_of(file, tables=False):
            raise GroundTruthError(f"the ground truth {file} cannot be read: {kind}")
        return read_table(file, names)
    try:
        if suffix == ".npy":
            return read_array(file, names)
        with np.load(file, allow_pickle=False) as content:
            if ROWS_KEY in content.files:
                return rows_of_array(file, content[ROWS_KEY], names)
            if PAIRS_KEY in content.files:
                return rows_of_pairs(file, content[PAIRS_KEY], names)
    except GroundTruthError:
        raise
    except Exception as error:  # Damage shows in NumPy, in zipfile, in zlib.
        if suffix == ".npy":
            reason = one_line(error)
            raise GroundTruthError(f"the ground truth {file} cannot be read: {reason}") from None
    return None  # what else is wrong is said by who reads positions


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
