# SPDX-License-Identifier: MIT
"""Picture of a training run: loss and recall by epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from patchnetvlad.errors import DrawingError
from patchnetvlad.plots.drawing import (
    COLOURS,
    METHODS,
    drawn,
    finish_axes,
    legend_below,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = (1, 5, 10)
"""The N of the recalls that are drawn, where they are known."""

_RATIO = 0.9  # height over width


@drawn
def plot_training(
    losses: Mapping[int, float],
    recalls: Mapping[int, Mapping[int, float]] | None = None,
    *,
    width: float = 8.0,
) -> Figure:
    """Draw the loss of every epoch and, below it, the recalls of every validation.

    Parameters
    ----------
    losses : mapping of int to float
        Mean loss by epoch, from 1.
    recalls : mapping of int to mapping of int to float, optional
        Recall@N between 0 and 1, by epoch and N; not every epoch needs to be validated.
    width : float, default 8
        Width of the printed picture in cm.

    Returns
    -------
    matplotlib.figure.Figure
        A dot marks the best recall@5. Not attached to any window.

    Raises
    ------
    DrawingError
        There is no epoch, or a recall is not between 0 and 1.

    Examples
    --------
    >>> figure = plot_training({1: 0.11, 2: 0.07}, {1: {1: 0.4, 5: 0.6}, 2: {1: 0.5, 5: 0.7}})
    """
    from matplotlib.ticker import MaxNLocator

    if not losses:
        raise DrawingError("there is no epoch to draw")
    judged = {epoch: of for epoch, of in sorted((recalls or {}).items()) if of}
    figure = new_figure(width, (_RATIO if judged else _RATIO / 2) * width)
    panels = figure.subplots(2 if judged else 1, sharex=True, squeeze=False)[:, 0]
    epochs = sorted(losses)
    panels[0].plot(epochs, [losses[epoch] for epoch in epochs], "o-", color="black", markersize=3)
    panels[0].set_ylabel("loss")
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels:
        finish_axes(axes)
    if judged:
        _draw_recalls(figure, panels[1], judged, width)
    return figure


def _draw_recalls(
    figure: Figure, axes: Axes, judged: Mapping[int, Mapping[int, float]], width: float
) -> None:
    """Draw a line per N, and a dot at the best recall@5."""
    known = set.intersection(*(set(of) for of in judged.values()))
    handles = []
    for n, colour in zip(SHOWN, (METHODS["NetVLAD"], "black", COLOURS[1]), strict=True):
        if n not in known:
            continue
        values = 100 * np.array([of[n] for of in judged.values()])
        if not ((values >= 0) & (values <= 100)).all():
            raise DrawingError(f"recall@{n} must be between 0 and 1")
        handles += axes.plot(
            list(judged), values, "o-", color=colour, markersize=3, label=f"recall@{n}"
        )
        if n == 5:
            best = int(values.argmax())
            axes.plot(list(judged)[best], values[best], "o", color=colour, markersize=6)
    axes.set_ylabel("recall, %")
    if handles:
        legend_below(figure, handles, width)
