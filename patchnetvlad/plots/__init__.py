# SPDX-License-Identifier: MIT
"""Pictures of results.

Each function takes plain values and returns a figure of matplotlib, made for paper: in the size
in which it is printed, in colours that colour-blind readers can tell apart, with markers and
dashes besides. :func:`save_figure` writes it as PNG, JPEG, PDF or SVG.
"""

from patchnetvlad.plots.answer import plot_answers
from patchnetvlad.plots.curves import plot_precision_recall, plot_recalls, read_runs
from patchnetvlad.plots.drawing import COLOURS, METHODS, save_figure
from patchnetvlad.plots.maps import plot_similarity, plot_trajectory
from patchnetvlad.plots.match import plot_match
from patchnetvlad.plots.spread import MAX_LINES

__all__ = [
    "COLOURS",
    "MAX_LINES",
    "METHODS",
    "plot_answers",
    "plot_match",
    "plot_precision_recall",
    "plot_recalls",
    "plot_similarity",
    "plot_trajectory",
    "read_runs",
    "save_figure",
]
