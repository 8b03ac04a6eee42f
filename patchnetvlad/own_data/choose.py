# SPDX-License-Identifier: MIT
"""Choosing queries and index images among images with positions."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import file_sha256
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.errors import ConfigError, GroundTruthError
from patchnetvlad.own_data.positions.base import Positions
from patchnetvlad.own_data.positions.names import compile_pattern

ORDERS = ("natural", "plain")


class ImagePart:
    """Images with their positions, index images or queries or both."""

    def __init__(
        self, names: list[str], found: Positions, values: NDArray[np.float64] | None = None
    ) -> None:
        self.names = names
        self.found = found
        self.values = found.values if values is None else values

    def __len__(self) -> int:
        return len(self.names)

    def keep(self, which: NDArray[np.bool_]) -> ImagePart:
        """Return the images selected by a mask [n]."""
        rows = np.flatnonzero(which)
        return ImagePart([self.names[i] for i in rows], self.found.take(rows), self.values[rows])

    def sequences(self) -> list[str]:
        """Return the clip of each image, or its folder."""
        return list(self.found.sequences) or [os.path.dirname(name) for name in self.names]


def check_options(
    images: str | Path | None,
    index: str | Path | None,
    queries: str | Path | None,
    every: int | None,
    start: int | None,
    pattern: str | None,
    order: str,
) -> None:
    """Raise ConfigError unless it is clear which images are queries.

    The options are those of :func:`~patchnetvlad.own_data.create.create_dataset`.
    """
    if order not in ORDERS:
        raise ConfigError(f"order = {order!r} is unknown; one of {', '.join(ORDERS)}")
    if images is None:
        if index is None or queries is None:
            raise ConfigError("give images, or both index and queries: folders or image lists")
        if (every, start, pattern) != (None, None, None):
            raise ConfigError("query_every, query_start and query_pattern choose among images only")
        return
    if index is not None or queries is not None:
        raise ConfigError("give images, or index and queries, not all of them")
    if (every is None) == (pattern is None):
        raise ConfigError(
            "give either query_every or query_pattern, which choose the queries among the images"
        )
    if every is None and start is not None:
        raise ConfigError("query_start needs query_every")
    if every is not None and every < 2:
        raise ConfigError(f"query_every = {every} must be 2 or more: the others are the index")
    if start is not None and start < 1:
        raise ConfigError(f"query_start = {start} must be 1 or more")


def spaced(part: ImagePart, spacing: float) -> NDArray[np.bool_]:
    """Return which images to keep so that each is far enough from the one kept before it, [n]."""
    keep = np.zeros(len(part), dtype=bool)
    last: dict[str, NDArray[np.float64]] = {}
    for i, sequence in enumerate(part.sequences()):
        here = part.values[i]
        if sequence not in last or np.linalg.norm(here - last[sequence]) >= spacing:
            keep[i], last[sequence] = True, here
    return keep


def choose_queries(
    part: ImagePart, every: int | None, start: int | None, pattern: str | None
) -> NDArray[np.bool_]:
    """Return which images are queries.

    Parameters
    ----------
    part : ImagePart
        n images.
    every, start, pattern
        ``query_every``, ``query_start`` and ``query_pattern`` of
        :func:`~patchnetvlad.own_data.create.create_dataset`.

    Returns
    -------
    ndarray [n] of bool
    """
    if pattern is not None:
        search = compile_pattern(pattern, "query_pattern")
        return np.array([search.search(name) is not None for name in part.names])
    assert every is not None
    first = every if start is None else start
    seen: Counter[str] = Counter()
    chosen = np.zeros(len(part), dtype=bool)
    for i, sequence in enumerate(part.sequences()):
        seen[sequence] += 1
        chosen[i] = seen[sequence] >= first and (seen[sequence] - first) % every == 0
    return chosen


def facing_alike(
    truth: GroundTruth,
    query_headings: NDArray[np.float64],
    index_headings: NDArray[np.float64],
    limit: float,
) -> tuple[NDArray[np.bool_], int]:
    """Return which queries to keep, and how many of their pairs face elsewhere.

    Unknown headings never lead to a query being left out.

    Parameters
    ----------
    truth : GroundTruth
    query_headings : ndarray [Q] of float
        Degrees; NaN where not known.
    index_headings : ndarray [N] of float
    limit : float
        Greatest difference, degrees.

    Returns
    -------
    keep : ndarray [Q] of bool
    elsewhere : int
    """
    if np.isnan(query_headings).all() or np.isnan(index_headings).all():
        raise GroundTruthError(
            "max_heading_difference needs headings, and the positions have none for "
            f"{'queries' if np.isnan(query_headings).all() else 'the index'}"
        )
    keep, elsewhere = np.ones(len(query_headings), dtype=bool), 0
    for q, right in enumerate(truth.positives()):
        difference = np.abs((index_headings[right] - query_headings[q] + 180) % 360 - 180)
        away = difference > limit
        keep[q] = not len(right) or not away.all()
        elsewhere += int(away.sum()) if keep[q] else 0
    return keep, elsewhere


def names_in_both(
    query_names: Sequence[str], index_names: Sequence[str], root: str | Path
) -> tuple[str, ...]:
    """Return the queries whose files are also index images."""
    files = {os.path.abspath(os.path.join(root, name)) for name in index_names}
    return tuple(name for name in query_names if os.path.abspath(os.path.join(root, name)) in files)


def group_same_content(names: Sequence[str], root: str | Path) -> tuple[tuple[str, ...], ...]:
    """Group images whose files are equal, byte for byte."""
    sizes: dict[int, list[str]] = {}
    files = {os.path.abspath(os.path.join(root, name)): name for name in reversed(names)}
    for name in reversed(files.values()):
        try:
            sizes.setdefault((Path(root) / name).stat().st_size, []).append(name)
        except OSError:
            continue
    groups: dict[str, list[str]] = {}
    for alike in sizes.values():
        if len(alike) > 1:
            for name in alike:
                groups.setdefault(file_sha256(Path(root) / name), []).append(name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)
