# SPDX-License-Identifier: MIT
"""A map of a data set: where queries and index images were taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.plots.drawing import INDEX_POINTS, drawn, legend_below, new_figure
from patchnetvlad.plots.maps import finish_map, on_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_QUERY, _WITHOUT = "#E69F00", "black"
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
        Metres have the same scale on both axes; with frames, each clip is a column.
    zone : str
        UTM zone, for the labels.
    title : str

    Returns
    -------
    matplotlib.figure.Figure
        Not attached to any window.
    """
    queries, index, origin = on_map(truth.utm_queries, truth.utm_index, unit)
    missing = np.zeros(len(queries), dtype=bool)
    missing[list(without)] = True

    figure = new_figure(_WIDTH, _HEIGHT)
    axes = figure.add_subplot()
    size = float(np.clip(4000 / len(index), 4, 36))
    query_size = float(np.clip(2000 / len(queries), 3, 20))
    axes.scatter(
        index[:, 0], index[:, 1], s=size, color=INDEX_POINTS, linewidths=0,
        label=f"index ({len(index)})",
    )  # fmt: skip
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
    finish_map(axes, origin, unit)
    if zone:
        axes.set_xlabel(f"east of {origin[0]:.0f} m, UTM zone {zone}")
        axes.set_ylabel(f"north of {origin[1]:.0f} m")
    axes.set_title(title)
    legend_below(figure, axes.get_legend_handles_labels()[0], _WIDTH)
    return figure
