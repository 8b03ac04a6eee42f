# SPDX-License-Identifier: MIT
"""Areas from lists with positions, and their split into training and validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import ArgumentError, GroundTruthError
from patchnetvlad.training.tuples import Area


def area_of_lists(
    query_list: str | Path,
    index_list: str | Path,
    ground_truth: str | Path,
    dataset_root: str | Path = "",
) -> Area:
    """Make an area from two image lists and their ground truth.

    Parameters
    ----------
    query_list, index_list : str or Path
    ground_truth : str or Path
        ``.npz`` with ``utmQ`` and ``utmDb``; its distance for a positive is not used.
    dataset_root : str or Path, default ""
        Folder that relative names lie under.

    Returns
    -------
    Area

    Raises
    ------
    ImageListError, GroundTruthError
        A file cannot be read, or they do not fit each other.
    """
    queries, index = ImageList.read(query_list), ImageList.read(index_list)
    truth = GroundTruth.load(ground_truth, threshold=0.0)
    truth.check_counts(len(queries), len(index), ground_truth)
    return Area(
        Path(ground_truth).stem,
        tuple(queries.image_locations(dataset_root)),
        tuple(index.image_locations(dataset_root)),
        truth.utm_queries,
        truth.utm_index,
        np.zeros(len(queries), dtype=bool),
        np.zeros(len(queries), dtype=bool),
    )


def area_of_images(
    name: str,
    images: Sequence[Path | str],
    positions: NDArray[np.float64],
    headings: NDArray[np.float64] | None = None,
) -> Area:
    """Make an area from images that are both queries and index.

    Parameters
    ----------
    name : str
        For messages.
    images : sequence of Path or str, length N
    positions : ndarray [N, c] of float64
    headings : ndarray [N] of float64, optional
        Degrees, NaN where they are not known.

    Returns
    -------
    Area

    Raises
    ------
    GroundTruthError
        There is not one finite position an image.
    """
    if positions.ndim != 2 or len(positions) != len(images) or not np.isfinite(positions).all():
        raise GroundTruthError(
            f"{name}: positions of shape {list(positions.shape)} for {len(images)} images; each "
            "needs one, of finite numbers"
        )
    none = np.zeros(len(images), dtype=bool)
    return Area(
        name, tuple(images), tuple(images), positions, positions, none, none,
        one_list=True, headings=headings,
    )  # fmt: skip


def split_area(area: Area, share: float, cell: float, gap: float, seed: int) -> tuple[Area, Area]:
    """Split an area by position, so that no place is in both parts.

    The area is cut into square cells. Of some, chosen at random until they hold ``share`` of the
    queries, all images are for validation; of the others, those that lie further than ``gap`` from
    all of these are for training.

    Parameters
    ----------
    area : Area
    share : float
        Between 0 and 1.
    cell : float
        Side of the cells, in the unit of the positions.
    gap : float
        In that unit.
    seed : int
        Of the choice.

    Returns
    -------
    training, validation : Area

    Raises
    ------
    ArgumentError
        The share or the side is out of range, or nothing is left for one of the parts.
    """
    if not (0 < share < 1 and cell > 0):
        raise ArgumentError(f"share = {share:g} must lie between 0 and 1, cell = {cell:g} above 0")
    of_query, of_index = _cells(area, cell)
    numbers, counts = np.unique(of_query, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(numbers))
    before = np.cumsum(counts[order]) - counts[order]
    chosen = numbers[order[before < share * len(of_query)]]
    held_query, held_index = np.isin(of_query, chosen), np.isin(of_index, chosen)
    held = np.concatenate([area.utm_queries[held_query], area.utm_index[held_index]])
    train_query = ~held_query & _far(area.utm_queries, held, gap)
    train_index = ~held_index & _far(area.utm_index, held, gap)
    parts = _take(area, train_query, train_index), _take(area, held_query, held_index)
    for part, what in zip(parts, ("training", "validation"), strict=True):
        if not part.queries or not part.index:
            raise ArgumentError(
                f"{area.name}: with cells of {cell:g} and a gap of {gap:g} nothing is left for "
                f"{what}; there are {len(numbers)} cells: make them smaller"
            )
    return parts


def _cells(area: Area, side: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the number of the cell of each query [Q] and of each index image [N]."""
    positions = np.concatenate([area.utm_queries, area.utm_index])
    numbers = number_rows(np.floor((positions - positions.min(axis=0)) / side))
    return numbers[: len(area.queries)], numbers[len(area.queries) :]


def number_rows(keys: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return for each row of [N, c] its number [N] among the different rows in sorted order."""
    return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _far(
    positions: NDArray[np.float64], others: NDArray[np.float64], gap: float
) -> NDArray[np.bool_]:
    from scipy.spatial import KDTree

    distances, _ = KDTree(others).query(positions)
    return np.asarray(distances > gap)


def _take(area: Area, queries: NDArray[np.bool_], index: NDArray[np.bool_]) -> Area:
    return replace(
        area,
        queries=tuple(area.queries[row] for row in np.flatnonzero(queries)),
        index=tuple(area.index[row] for row in np.flatnonzero(index)),
        utm_queries=area.utm_queries[queries],
        utm_index=area.utm_index[index],
        night=area.night[queries],
        sideways=area.sideways[queries],
        headings=None if area.headings is None else area.headings[index],
    )
