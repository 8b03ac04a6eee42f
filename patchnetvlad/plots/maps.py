# SPDX-License-Identifier: MIT
"""Pictures of whole data sets: similarity matrix, and a map of right and wrong answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.datasets.ground_truth import CLIP_DISTANCE
from patchnetvlad.errors import DrawingError
from patchnetvlad.plots.drawing import (
    CM,
    INDEX_POINTS,
    NEUTRAL,
    RIGHT,
    SMALL,
    TEXT,
    WRONG,
    drawn,
    finish_axes,
    legend_below,
    new_figure,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MAX_CELLS = 1200
"""Rows and columns drawn of a similarity matrix; larger ones are reduced by their maxima."""
MAX_EDGES = 20_000  # of outlines
_ANSWERED = "#E69F00"  # neither right nor wrong
FEW_POINTS = 600  # up to here with edges
MANY_POINTS = 20_000  # from here on pixels, also in PDF and SVG


@drawn
def plot_similarity(
    similarity: NDArray[np.floating],
    *,
    positives: Sequence[NDArray[np.integer] | Sequence[int]] | None = None,
    answers: NDArray[np.integer] | Sequence[int] | None = None,
    label: str = "cosine similarity",
    title: str = "",
    width: float = 16.0,
) -> Figure:
    """Draw the similarity of every query and every index image.

    Parameters
    ----------
    similarity : ndarray [Q, N] of float
        Larger is more similar; for L2-normalised global descriptors, ``queries @ index.T``.
        Matrices with more than 1200 rows or columns are reduced to the maximum of each block.
        NaN stays empty.
    positives : sequence of Q sequences of int, optional
        Rows of the right index images of each query, which are outlined.
    answers : [Q] or [Q, k] of int, optional
        Best answer of each query, or candidates, of which the first is taken; -1 for none. It
        is marked, as right or wrong if positives are given.
    label : str, default "cosine similarity"
        Label of the colour bar.
    title : str
    width : float, default 16
        Width of the printed picture in cm.

    Returns
    -------
    matplotlib.figure.Figure
        Not attached to any window.

    Raises
    ------
    DrawingError
        ``similarity`` is not a matrix, or is empty; positives or answers do not fit it.

    Examples
    --------
    >>> import numpy as np
    >>> figure = plot_similarity(np.eye(5), positives=[[i] for i in range(5)], answers=[0] * 5)
    """
    values = _matrix(similarity)
    queries, index = values.shape
    right = _pairs(positives, queries, index) if positives is not None else None
    best = _answers(answers, queries, index) if answers is not None else None

    ratio = float(np.clip(queries / index, 0.12, 1.6))
    tall = max((width - 3.0) * ratio, 2.5)  # cm: of the matrix
    figure = new_figure(width, tall + 1.2 + 0.5 * bool(title))
    axes = figure.add_subplot()
    shown = _draw_matrix(axes, values)
    handles = []
    if right is not None:
        handles.append(_outline_positives(axes, shown, values.shape, right, width))
    if best is not None:
        handles += _mark_answers(axes, best, right, tall / queries)
    _label_matrix(axes, queries, tall)
    bar = figure.colorbar(shown, ax=axes, fraction=0.04, pad=0.015)
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL, length=2)
    if title:
        axes.set_title(shortened(title, width - 3, TEXT))
    if handles:
        legend_below(figure, handles, width)
    return figure


def _matrix(similarity: Any) -> NDArray[Any]:
    """Return similarities [Q, N] of any type of number; DrawingError for anything else."""
    values = np.asarray(similarity)
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "fiu":
        raise DrawingError(
            f"the similarities are an array {list(values.shape)} of {values.dtype}; "
            "needed is [queries, index images] of numbers"
        )
    return values


def _steps(shape: tuple[int, ...]) -> list[int]:
    """Return how many rows, and columns, of a matrix are drawn as one."""
    return [-(-n // MAX_CELLS) for n in shape]


def _draw_matrix(axes: Axes, values: NDArray[Any]) -> AxesImage:
    """Draw a matrix [Q, N], reduced to the maxima of its blocks if it is large."""
    steps = _steps(values.shape)
    blocks = _block_maxima(values, steps)
    finite = blocks[np.isfinite(blocks)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    shown = axes.imshow(
        np.ma.masked_invalid(blocks), cmap="cividis", vmin=low, vmax=high, aspect="auto",
        # The last block may stand for fewer cells than the others.
        extent=(-0.5, blocks.shape[1] * steps[1] - 0.5, blocks.shape[0] * steps[0] - 0.5, -0.5),
        interpolation="nearest" if max(steps) == 1 and max(values.shape) < 400 else None,
    )  # fmt: skip
    _show_whole(axes, values.shape)
    axes.set_facecolor("#DDDDDD")
    return shown


def _show_whole(axes: Axes, shape: tuple[int, ...]) -> None:
    """Set the limits of the axes to a matrix [Q, N]."""
    axes.set_xlim(-0.5, shape[1] - 0.5)
    axes.set_ylim(shape[0] - 0.5, -0.5)


def _outline_positives(
    axes: Axes, shown: AxesImage, shape: tuple[int, ...], right: NDArray[np.int64], width: float
) -> Any:
    """Outline pairs [p, 2] of a matrix [Q, N] drawn as ``shown``; return a legend entry."""
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    steps = _steps(shape)
    mask = np.zeros([-(-n // step) for n, step in zip(shape, steps, strict=True)], dtype=bool)
    mask[right[:, 0] // steps[0], right[:, 1] // steps[1]] = True
    edges = _outlines(mask) * [steps[1], steps[0]] - 0.5  # [e, 2, 2]
    fine = max(mask.shape) > 300
    thick = 0.3 if fine else float(np.clip(8 * width / max(mask.shape), 0.6, 1.4))
    cased = [withStroke(linewidth=thick + 0.8, foreground="black")]
    if len(edges) <= MAX_EDGES:
        axes.add_collection(
            LineCollection(
                list(edges), colors="white", linewidths=thick, capstyle="projecting",
                path_effects=None if fine else cased, gid="positives",
            ),
            autolim=False,
        )  # fmt: skip
    else:
        overlay = np.zeros((*mask.shape, 4))
        overlay[mask] = 1, 1, 1, 0.6
        axes.imshow(overlay, extent=shown.get_extent(), aspect="auto")
        _show_whole(axes, shape)
    return Line2D(
        [], [], linestyle="none", marker="s", markersize=6, markerfacecolor="none",
        markeredgecolor="white", markeredgewidth=1.0, label="right index images",
        path_effects=[withStroke(linewidth=1.8, foreground="black")],
    )  # fmt: skip


def _label_matrix(axes: Axes, queries: int, tall: float) -> None:
    """Label the axes of a matrix of ``queries`` rows that is ``tall`` cm high."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    axes.set_xlabel("index image")
    axes.set_ylabel("query")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(
        MaxNLocator(integer=True, nbins=min(7, int(2 * tall)))
        if queries > 5
        else FixedLocator(range(queries))
    )
    axes.tick_params(labelsize=SMALL, width=0.6, length=2.5)


@drawn
def plot_trajectory(
    utm_queries: NDArray[np.floating],
    utm_index: NDArray[np.floating],
    answers: NDArray[np.integer] | Sequence[int],
    right: NDArray[np.bool_] | Sequence[bool] | None = None,
    *,
    unit: str = "m",
    title: str = "",
    width: float = 12.0,
) -> Figure:
    """Draw a map of the positions of queries, with right and wrong answers.

    A line leads from each wrongly answered query to its answer.

    Parameters
    ----------
    utm_queries : ndarray [Q, D] of float
        Positions, usually in metres. The first two coordinates are drawn; a single one is drawn
        along the x axis.
    utm_index : ndarray [N, D] of float
    answers : [Q] or [Q, k] of int
        Best answer of each query, or candidates, of which the first is taken: a row of
        ``utm_index``, or -1 if the query has no answer.
    right : [Q] of bool, optional
        Whether the answer is right. Without it, lines lead to all answers.
    unit : str, default "m"
        Unit of the positions, for the axes. ``"frames"``: positions of video frames as
        ``patchnetvlad-dataset`` makes them; each clip is a column.
    title : str
    width : float, default 12
        Width of the printed picture in cm.

    Returns
    -------
    matplotlib.figure.Figure
        Both axes have the same scale, except for frames. Not attached to any window.

    Raises
    ------
    DrawingError
        The shapes do not fit, an answer is not a row of the index, or a position is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> path = np.stack([np.arange(9.0), np.sin(np.arange(9))], axis=1)
    >>> figure = plot_trajectory(path + 0.1, path, [*range(8), 2], [True] * 8 + [False])
    """
    from matplotlib.collections import LineCollection

    queries, index = (
        _positions(what, positions)
        for what, positions in (("utm_queries", utm_queries), ("utm_index", utm_index))
    )
    best = _answers(answers, len(queries), len(index))
    is_right = None
    if right is not None:
        is_right = np.asarray(right, dtype=None if len(right) else bool)
        if is_right.dtype != bool:
            raise DrawingError("right must be True or False for every query")
    if is_right is not None and is_right.shape != (len(queries),):
        raise DrawingError(f"right has shape {list(is_right.shape)} for {len(queries)} queries")
    both = np.concatenate([queries, index])
    queries, index, origin = on_map(queries, index, unit)

    # Tall maps are narrower, wide ones lower: one scale on both axes, and little empty paper.
    spans = np.ptp(both, axis=0) if len(both) else np.ones(2)
    ratio = float(spans[1] / spans[0] if spans[0] else spans[1] or 0.7)
    ratio = float(np.clip(ratio, 0.25, 1.3))
    ratio = 0.8 if unit == "frames" else ratio
    figure = new_figure(width, (width - 1.5) * ratio + 1.5 + 0.5 * bool(title))
    axes = figure.add_subplot()
    # Index images are larger, so that a query at the same place leaves a rim of them.
    size = float(np.clip(5000 / max(len(index), 1), 4, 28)) * width / 12
    query_size = float(np.clip(2500 / max(len(queries), 1), 2, 14)) * width / 12
    handles = [
        _points(axes, index, size, "index images", max(len(both), FEW_POINTS + 1),
                marker="o", color=INDEX_POINTS)
    ]  # fmt: skip
    given = best >= 0
    groups: list[tuple[str, NDArray[np.bool_], dict[str, Any]]]
    if is_right is None:
        groups = [("answered", given, {"marker": "o", "color": _ANSWERED})]
        led, paint = given, _ANSWERED
    else:
        groups = [
            ("right", given & is_right, {"marker": "o", "color": RIGHT}),
            ("wrong", given & ~is_right, {"marker": "X", "color": WRONG}),
        ]
        led, paint = given & ~is_right, WRONG
    groups.append(("no answer", ~given, {"marker": "s", "color": "#F0E442"}))
    axes.add_collection(
        LineCollection(
            list(np.stack([queries[led], index[best[led]]], axis=1)),
            colors=paint, linewidths=0.7, alpha=float(np.clip(60 / max(led.sum(), 1), 0.06, 0.7)),
            zorder=2, rasterized=bool(led.sum() > MANY_POINTS), gid="answers",
        )
    )  # fmt: skip
    for depth, (name, some, style) in enumerate(groups):
        if some.any():
            large = query_size * (1.7 if name in ("wrong", "no answer") else 1.0)
            handles.append(
                _points(axes, queries[some], large, f"queries: {name}", len(queries),
                        edgecolors="black", zorder=3 + depth, **style)
            )  # fmt: skip
    finish_map(axes, origin, unit)
    if title:
        axes.set_title(shortened(title, width - 1.5, TEXT))
    legend_below(figure, handles, width)
    return figure


def on_map(
    queries: NDArray[np.float64], index: NDArray[np.float64], unit: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return positions of queries [Q, 2] and index [N, 2] as they are drawn, and their origin."""
    if unit == "frames":  # side by side, so that equal frame numbers do not hide each other
        shift, scale = np.array([0.12, 0.0]), np.array([CLIP_DISTANCE, 1.0])
        return queries / scale + shift, index / scale - shift, np.zeros(2)
    both = np.concatenate([queries, index])
    origin = np.floor(both.min(axis=0)) if len(both) else np.zeros(2)
    return queries - origin, index - origin, origin


def finish_map(axes: Axes, origin: NDArray[np.float64], unit: str) -> None:
    """Style the axes of a map: the same scale on both, except for frames."""
    from matplotlib.ticker import MaxNLocator

    finish_axes(axes)
    if unit == "frames":
        axes.set_xlabel("clip")
        axes.set_ylabel("frame")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    axes.set_aspect("equal", adjustable="datalim")
    axes.ticklabel_format(style="plain")
    axes.set_xlabel(_axis_label("x", origin[0], unit))
    axes.set_ylabel(_axis_label("y", origin[1], unit))


def _axis_label(name: str, origin: float, unit: str) -> str:
    shift = f" - {origin:.0f}" if origin > 0 else f" + {-origin:.0f}" if origin < 0 else ""
    return f"{name}{shift}, {unit}"


def _positions(what: str, positions: Any) -> NDArray[np.float64]:
    points = np.asarray(positions, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] not in (1, 2, 3):
        raise DrawingError(f"{what} has shape {list(points.shape)}; needed is [images, 2]")
    bad = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if len(bad):
        raise DrawingError(f"{what}: the position of image {bad[0]} is {points[bad[0]]}")
    return np.pad(points, ((0, 0), (0, 1)))[:, :2]


def _answers(answers: Any, queries: int, index: int) -> NDArray[np.int64]:
    """Return the best answer of each query [Q], -1 for none."""
    rows = np.asarray(answers)
    if rows.ndim == 2 and rows.shape[1]:
        rows = rows[:, 0]
    if rows.shape != (queries,) or rows.dtype.kind not in "iu":
        raise DrawingError(
            f"answers have shape {list(np.shape(answers))} of {rows.dtype} for {queries} queries; "
            "give one index row per query"
        )
    rows = rows.astype(np.int64)
    if len(rows) and not (rows.min() >= -1 and rows.max() < index):
        bad = rows[(rows < -1) | (rows >= index)][0]
        raise DrawingError(f"an answer is row {bad} of an index of {index} images")
    return rows


def _pairs(positives: Any, queries: int, index: int) -> NDArray[np.int64]:
    """Return positives as pairs [p, 2] of query and index image."""
    if len(positives) != queries:
        raise DrawingError(f"positives of {len(positives)} queries for {queries} rows")
    columns = [np.asarray(row).reshape(-1) for row in positives]
    if any(column.dtype.kind not in "iu" for column in columns if len(column)):
        raise DrawingError("positives must be whole numbers, rows of index images")
    flat = np.concatenate([column.astype(np.int64) for column in columns])
    if len(flat) and not (flat.min() >= 0 and flat.max() < index):
        raise DrawingError(f"a positive is none of the {index} index images")
    return np.stack([np.repeat(np.arange(queries), [len(row) for row in columns]), flat], axis=1)


def _block_maxima(values: NDArray[Any], steps: Sequence[int]) -> NDArray[np.float32]:
    """Reduce a matrix to the maxima of its blocks; NaN counts only where there is nothing else."""
    for axis, step in enumerate(steps):
        if step > 1:
            values = np.fmax.reduceat(values, np.arange(0, values.shape[axis], step), axis=axis)
    return np.asarray(values, dtype=np.float32)


def _outlines(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the edges [e, 2, 2] (x, y) between cells that are set and others, from corner (0, 0).

    Edges that continue each other are one.
    """
    found = []
    padded = np.pad(mask, 1)
    for axis in (0, 1):
        across = padded if axis == 0 else padded.T
        # Between the rows of padded cells, without the padding at both ends of a row.
        changes = (across[1:] != across[:-1])[:, 1:-1]
        ends = np.diff(np.pad(changes, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        line, start = np.nonzero(ends == 1)
        _, stop = np.nonzero(ends == -1)
        first, last = np.stack([start, line], axis=1), np.stack([stop, line], axis=1)
        edges = np.stack([first, last], axis=1).astype(np.float64)
        found.append(edges if axis == 0 else edges[:, :, ::-1])
    return np.concatenate(found)


def _mark_answers(
    axes: Axes, best: NDArray[np.int64], right: NDArray[np.int64] | None, row: float
) -> list[Any]:
    """Mark the best answer of each query, whose row is ``row`` cm high; return legend entries."""
    given = np.flatnonzero(best >= 0)
    if right is None:
        groups = [("best answers", given, "o", NEUTRAL)]
    else:
        pairs = set(map(tuple, right.tolist()))
        hit = np.array([(q, best[q]) in pairs for q in given.tolist()], dtype=bool)
        groups = [
            ("best answers: right", given[hit], "o", RIGHT),
            ("best answers: wrong", given[~hit], "X", WRONG),
        ]
    least = 1.8 if len(best) > FEW_POINTS else 3.2
    size = float(np.clip(1.3 * row * CM * 72, least, 5)) ** 2  # pt^2
    return [
        _points(axes, np.stack([best[some], some], axis=1), size, name, len(best),
                marker=marker, color=colour, edgecolors="white", zorder=5)
        for name, some, marker, colour in groups
    ]  # fmt: skip


def _points(axes: Axes, points: NDArray[Any], size: float, name: str, of: int, **style: Any) -> Any:
    """Draw points [n, 2], without edges where there are many, and return them for a legend."""
    from matplotlib.lines import Line2D

    edge = style.pop("edgecolors", None)
    wide = 0.0 if of > FEW_POINTS else 0.4
    label = f"{name} ({len(points)})"
    axes.scatter(
        points[:, 0], points[:, 1], s=size, edgecolors=edge if wide else "none", linewidths=wide,
        rasterized=of > MANY_POINTS, label=label, **style,
    )  # fmt: skip
    return Line2D(
        [], [], linestyle="none", marker=style["marker"], markersize=min(max(size**0.5, 3.0), 6.0),
        markerfacecolor=style["color"], markeredgecolor=edge or "none", markeredgewidth=wide,
        label=label,
    )  # fmt: skip
