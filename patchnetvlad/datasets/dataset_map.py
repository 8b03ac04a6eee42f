# SPDX-License-Identifier: MIT
"""A map of a data set: where queries and index images were taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.positions import CLIP_DISTANCE
from patchnetvlad.evaluation.drawing import (
    COLOURS,
    drawn,
    finish_axes,
    legend_below,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INDEX, _QUERY, _WITHOUT = COLOURS[1], COLOURS[0], "black"
_WIDTH, _HEIGHT = 16.0, 13.2  # cm


@drawn
def plot_dataset(
    truth: GroundTruth,
    without: Sequence[int] = (),
    *,
    unit: str = "m",
    zone: str = "",
    title: str = "",
) -> Figure:
    """Draw where queries and index images were taken.

    Parameters
    ----------
    truth : GroundTruth
    without : sequence of int
        Queries without a positive; they are marked.
    unit : {"m", "frames"}
        Metres are drawn at one scale on both axes; of frames, each clip is a column.
    zone : str
        UTM zone, for the labels.
    title : str

    Returns
    -------
    matplotlib.figure.Figure
        It belongs to no window.
    """
    from matplotlib.ticker import MaxNLocator

    frames = unit == "frames"
    both = np.concatenate([truth.utm_queries, truth.utm_index])
    origin = np.zeros(2) if frames else np.floor(both.min(axis=0))
    scale = np.array([CLIP_DISTANCE, 1.0]) if frames else np.ones(2)
    index = (truth.utm_index - origin) / scale
    queries = (truth.utm_queries - origin) / scale
    if frames:  # side by side, so that equal frame numbers do not hide each other
        index[:, 0] -= 0.12
        queries[:, 0] += 0.12
    missing = np.zeros(len(queries), dtype=bool)
    missing[list(without)] = True

    figure = new_figure(_WIDTH, _HEIGHT)
    axes = figure.add_subplot()
    size, query_size = (float(np.clip(2000 / len(one), 3, 20)) for one in (index, queries))
    axes.scatter(
        index[:, 0], index[:, 1], s=size, color=_INDEX, linewidths=0, label=f"index ({len(index)})"
    )
    answered = queries[~missing]
    axes.scatter(
        answered[:, 0], answered[:, 1], s=query_size, color=_QUERY, marker="^", linewidths=0.4,
        edgecolors="black", label=f"queries ({len(answered)})", zorder=3,
    )  # fmt: skip
    if missing.any():
        axes.scatter(
            queries[missing, 0], queries[missing, 1], s=2 * query_size + 10, color=_WITHOUT,
            marker="x", linewidths=1.6,
            label=f"queries without an index image within {truth.threshold:g} {unit} "
            f"({missing.sum()})",
            zorder=4,
        )  # fmt: skip
    if frames:
        axes.set_xlabel("clip")
        axes.set_ylabel("frame")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_aspect("equal", adjustable="datalim")
        east, north = ("east", "north") if zone else ("x", "y")
        where = f", UTM zone {zone}" if zone else ""
        axes.set_xlabel(f"{east} of {origin[0]:.0f} m{where}" if zone else f"x - {origin[0]:g}, m")
        axes.set_ylabel(f"{north} of {origin[1]:.0f} m" if zone else f"y - {origin[1]:g}, m")
        axes.ticklabel_format(useOffset=False, style="plain")
    finish_axes(axes)
    axes.set_title(title)
    legend_below(figure, axes.get_legend_handles_labels()[0], _WIDTH)
    return figure
