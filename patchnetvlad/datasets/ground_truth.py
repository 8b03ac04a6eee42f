# SPDX-License-Identifier: MIT
"""Ground truth: positions of the queries and of the index images, and a distance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.assets import resolve_ground_truth
from patchnetvlad.errors import GroundTruthError


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Where queries and index images were taken.

    Attributes
    ----------
    utm_queries : ndarray [Q, 2] of float64
        Positions; metres for most data sets, but any unit of ``threshold`` will do.
    utm_index : ndarray [N, 2] of float64
    threshold : float
        An index image within this distance of a query, in the same unit, is a positive.
    """

    utm_queries: NDArray[np.float64]
    utm_index: NDArray[np.float64]
    threshold: float

    @classmethod
    def load(cls, path: str | Path, threshold: float | None = None) -> GroundTruth:
        """Read a ``.npz`` with ``utmQ`` [Q, 2], ``utmDb`` [N, 2] and ``posDistThr``.

        Parameters
        ----------
        path : str or Path
            The file, or the bare name of a benchmark's, which is fetched on first use.
        threshold : float, optional
            Used in place of ``posDistThr``.

        Returns
        -------
        GroundTruth

        Raises
        ------
        GroundTruthError
            The file is missing or damaged, lacks an array, or holds NaN.
        """
        file = resolve_ground_truth(path)
        try:
            content = np.load(file, allow_pickle=False)
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise ValueError("it is not an .npz archive")
            with content:
                arrays = {name: content[name] for name in content.files}
        except Exception as error:  # Damage shows in NumPy, in zipfile, in zlib.
            raise GroundTruthError(f"the ground truth {file} cannot be read: {error}") from None
        needed = ["utmQ", "utmDb"] + ([] if threshold is not None else ["posDistThr"])
        for name in needed:
            if name not in arrays:
                found = ", ".join(arrays) or "nothing"
                way_out = "; or give --posDistThr" if name == "posDistThr" else ""
                raise GroundTruthError(
                    f"the ground truth {file} has no {name!r} (it holds {found}){way_out}"
                )
        positions = [_positions(arrays[name], name, file) for name in ("utmQ", "utmDb")]
        if positions[0].shape[1] != positions[1].shape[1]:
            raise GroundTruthError(
                f"{file}: 'utmQ' has {positions[0].shape[1]} columns, 'utmDb' has "
                f"{positions[1].shape[1]}; both must be of shape [n, 2]"
            )
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
        return cls(positions[0], positions[1], threshold)

    def check_counts(self, num_queries: int, num_index: int, source: str | Path) -> None:
        """Raise GroundTruthError unless there is one position an image."""
        for what, name, have, need in (
            ("queries", "utmQ", len(self.utm_queries), num_queries),
            ("index images", "utmDb", len(self.utm_index), num_index),
        ):
            if have != need:
                raise GroundTruthError(
                    f"{source}: {name} has {have} rows for {need} {what} in the list; ground truth "
                    "and lists must be of the same data set, in the same order"
                )

    def positives(self) -> list[NDArray[np.int64]]:
        """Return for every query the index images within the threshold, ascending."""
        from sklearn.neighbors import NearestNeighbors

        # The default is inexact for few images: it expands the squares of large coordinates.
        search = NearestNeighbors(algorithm="kd_tree", n_jobs=-1).fit(self.utm_index)
        found = search.radius_neighbors(
            self.utm_queries, radius=self.threshold, return_distance=False
        )
        return [np.sort(indices).astype(np.int64) for indices in found]


def _positions(values: NDArray[np.generic], name: str, file: Path) -> NDArray[np.float64]:
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "fiu":
        raise GroundTruthError(
            f"{file}: {name!r} must be numbers of shape [n, 2], not {values.dtype} of shape "
            f"{list(values.shape)}"
        )
    positions = values.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(positions).all(axis=1))
    if len(bad):
        raise GroundTruthError(
            f"{file}: {name!r} holds NaN or infinite values in {len(bad)} rows, first in row "
            f"{bad[0]} (from 0)"
        )
    return positions
