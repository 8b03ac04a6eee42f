# SPDX-License-Identifier: MIT
"""Summary of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patchnetvlad.base.text import SHOWN, some
from patchnetvlad.datasets.ground_truth import GroundTruth


@dataclass(frozen=True)
class PositiveStatistics:
    """Statistics of positives, and of distances from queries to the index.

    Attributes
    ----------
    without : tuple of int
        Rows of queries without an index image within the threshold.
    nearest : (float, float, float)
        Minimum, median and maximum of the distances from a query to the nearest index image; NaN
        where there are no positions.
    per_query : (int, float, int)
        Minimum, median and maximum of the numbers of positives.
    num_pairs : int
        Pairs of a query and a positive.
    """

    without: tuple[int, ...]
    nearest: tuple[float, float, float]
    per_query: tuple[int, float, int]
    num_pairs: int


def positive_statistics(truth: GroundTruth) -> PositiveStatistics:
    """Count positives and measure distances; there must be a query and an index image."""
    from sklearn.neighbors import NearestNeighbors

    counts = np.array([len(right) for right in truth.positives()])
    nearest = np.full(len(counts), np.nan)
    if truth.distance is not None:
        search = NearestNeighbors(n_neighbors=1, algorithm="kd_tree").fit(truth.utm_index)
        nearest = search.kneighbors(truth.utm_queries)[0][:, 0]
    return PositiveStatistics(
        tuple(np.flatnonzero(counts == 0).tolist()),
        (float(nearest.min()), float(np.median(nearest)), float(nearest.max())),
        (int(counts.min()), float(np.median(counts)), int(counts.max())),
        int(counts.sum()),
    )


@dataclass(frozen=True)
class DatasetSummary:
    """The data set written by :func:`create_dataset`, as read back from disk.

    Attributes
    ----------
    folder : Path
        With ``index.txt``, ``query.txt``, ``ground_truth.npz``, ``positions.csv`` and ``map.png``.
    source : str
        What the positions were read from.
    num_index, num_queries : int
    threshold : float
    unit : {"m", "frames"}
    zone : str
        UTM zone, such as ``32N``; empty if it is not known.
    extent : (float, float)
        Width and height of all positions, in ``unit``.
    statistics : PositiveStatistics
    without_position : tuple of str
        Images that were left out because they have no position.
    without_positive : tuple of str
        Queries that cannot be answered within the threshold. They stay in the list.
    num_thinned : int
        Images left out because the one kept before was nearer than ``spacing``.
    dropped_by_heading : tuple of str
        Queries left out because every index image within the threshold faces elsewhere.
    num_facing_elsewhere : int or None
        Pairs within the threshold whose headings differ by more than the limit, and which ground
        truth calls right; None without a limit.
    num_without_heading : int
        Images without a heading; 0 without a limit.
    repeated : tuple of str
        Names that were given twice; the second was left out.
    in_both : tuple of str
        Images that are both query and index image.
    same_place : int
        Index images at exactly the position of another.
    same_content : tuple of tuple of str
        Groups of images with equal content; empty unless ``check_content`` was set.
    unreadable : tuple of str
        Images that are missing, empty, or not images. They stay in the lists.
    notes : tuple of str
        Notes from reading the positions.
    """

    folder: Path
    source: str
    num_index: int
    num_queries: int
    threshold: float
    unit: str
    zone: str
    extent: tuple[float, float]
    statistics: PositiveStatistics
    without_position: tuple[str, ...] = ()
    without_positive: tuple[str, ...] = ()
    num_thinned: int = 0
    dropped_by_heading: tuple[str, ...] = ()
    num_facing_elsewhere: int | None = None
    num_without_heading: int = 0
    repeated: tuple[str, ...] = ()
    in_both: tuple[str, ...] = ()
    same_place: int = 0
    same_content: tuple[tuple[str, ...], ...] = ()
    unreadable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the summary as lines of text."""
        found, unit = self.statistics, self.unit
        lines = [f"{self.folder}: {self.num_index} index images, {self.num_queries} queries"]

        def line(key: str, text: str) -> None:
            lines.append(f"  {key:<18} {text}")

        def named(key: str, names: Sequence[str], text: str) -> None:
            if names:
                line(key, f"{text}: {len(names)} ({some(names)})")

        zone = f", UTM zone {self.zone}" if self.zone else ""
        line("positions", f"{self.source}{zone}")
        if unit == "m":
            line("extent", f"{self.extent[0]:.0f} x {self.extent[1]:.0f} m")
        line("right answers", f"index images within {self.threshold:g} {unit} of the query")
        low, middle, high = found.nearest
        line("nearest", f"{low:.1f} to {high:.1f} {unit} from a query, median {middle:.1f}")
        least, median, most = found.per_query
        line("positives", f"{least} to {most} per query, median {median:g}")
        for note in self.notes:
            line("note", note)
        if self.num_thinned:
            line("thinned", f"images left out, too near to the one before: {self.num_thinned}")
        if self.num_facing_elsewhere is not None:
            line(
                "heading",
                f"{self.num_facing_elsewhere} of {found.num_pairs} pairs of query and positive "
                "differ by more than the limit; ground truth goes by position and calls them right",
            )
        if self.num_without_heading:
            line("heading", f"images without one: {self.num_without_heading}")
        named("left out", self.dropped_by_heading, "queries whose positives all face elsewhere")
        named("left out", self.without_position, "images without a position")
        named("left out", self.repeated, "images that were named twice")
        named("warning", self.in_both, "both query and index image, trivially right")
        for group in self.same_content[:SHOWN]:
            line("warning", f"the same content: {some(group)}")
        if len(self.same_content) > SHOWN:
            line("warning", f"and {len(self.same_content) - SHOWN} more groups of equal content")
        if self.same_place:
            hint = "; are clips told apart?" if unit == "frames" else ""
            line("note", f"index images exactly where another is: {self.same_place}{hint}")
        named("warning", self.unreadable, "missing, empty or no images")
        named(
            "warning",
            self.without_positive,
            "queries without a right answer, which count as missed",
        )
        return lines
