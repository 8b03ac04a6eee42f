# SPDX-License-Identifier: MIT
"""A picture of queries and their answers, before and after re-ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import DrawingError
from patchnetvlad.plots.drawing import (
    NEUTRAL,
    RIGHT,
    SMALL,
    TEXT,
    WRONG,
    drawn,
    legend_below,
    legend_height,
    new_figure,
    picture_array,
    reduced,
    shortened,
)

if TYPE_CHECKING:
    from typing import TypeVar

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    T = TypeVar("T")
    Image = Any  # a file, pixels, a PIL image, or None
    PerAnswer = Sequence[Sequence[T]] | Mapping[str, Sequence[Sequence[T]]]

MAX_PICTURES = 300
"""Images drawn in one figure; more would neither fit on paper nor in memory."""

MIN_CELL = 0.9  # cm: an image's least width

_GAP, _BETWEEN, _MARGIN = 0.12, 0.4, 0.15  # cm: between images, between blocks, at the edges
_LINE = 0.34  # cm: of text
_BADGE = 0.28  # cm


@dataclass(frozen=True, eq=False)
class _Picture:
    pixels: NDArray[np.uint8] | None
    name: str = ""
    right: bool | None = None
    score: float | None = None


@drawn
def plot_answers(
    queries: Sequence[Image],
    answers: PerAnswer[Image],
    *,
    right: PerAnswer[bool | None] | None = None,
    scores: PerAnswer[float | None] | None = None,
    names: PerAnswer[str] | None = None,
    query_names: Sequence[str] | None = None,
    stacked: bool = False,
    title: str = "",
    width: float = 16.0,
) -> Figure:
    """Draw queries, one a row, and beside each its answers, best first.

    Right answers have a solid frame and a tick, wrong ones a dashed frame and a cross.

    Parameters
    ----------
    queries : sequence of Q images
        A file (str or Path), pixels ([H, W, 3] or [H, W] of uint8), a PIL image, or None where
        there is none.
    answers : sequence of Q sequences of images, or mapping of str to such
        The answers to each query, best first; a query may have fewer than others, or none. A
        mapping holds the answers of several methods by their names, such as ``"NetVLAD"`` and
        ``"Patch-NetVLAD"``, to show what re-ranking changed.
    right : as answers, of bool or None, optional
        Whether an answer is right; None if that is not known.
    scores : as answers, of float or None, optional
        Written below the answers.
    names : as answers, of str, optional
        Written below the answers.
    query_names : sequence of Q str, optional
        Written below the queries.
    stacked : bool, default False
        Draw the methods below each other, not side by side: better in a narrow column.
    title : str
    width : float, default 16
        Of the printed picture, cm.

    Returns
    -------
    matplotlib.figure.Figure
        It belongs to no window.

    Raises
    ------
    DrawingError
        There is nothing to draw, more than 300 images, or the numbers of queries, answers,
        scores and so on differ.
    ImageError
        A file is missing or damaged.

    Examples
    --------
    >>> import numpy as np
    >>> square = np.full((60, 80, 3), 200, np.uint8)
    >>> figure = plot_answers([square], [[square, square]], right=[[True, False]])
    """
    from matplotlib.lines import Line2D

    methods: dict[str, Any] = dict(answers) if isinstance(answers, Mapping) else {"": answers}
    _check(queries, methods, query_names)
    named = _by_method("names", names, methods)
    judged = _by_method("right", right, methods)
    scored = _by_method("scores", scores, methods)
    depths = [max(1, *(len(row) for row in rows)) for rows in methods.values()]
    titled = any(methods)
    columns = 1 + (max(depths) if stacked else sum(depths))
    blocks = 1 if stacked else len(depths)
    gaps = blocks * _BETWEEN + (columns - 1 - blocks) * _GAP
    cell = (width - 2 * _MARGIN - gaps) / columns  # cm: width of an image
    if cell < MIN_CELL:
        raise DrawingError(
            f"{columns} images side by side do not fit into {width:g} cm; draw fewer answers a "
            "query, set stacked=True, or make the picture wider"
        )

    load = _Loader(cell)
    asked = [
        _Picture(load(image, f"the image of query {q}"), query_names[q] if query_names else "")
        for q, image in enumerate(queries)
    ]
    answered = [
        [
            [
                _Picture(
                    load(image, f"answer {rank + 1} to query {q}"),
                    named[method][q][rank] if named else "",
                    judged[method][q][rank] if judged else None,
                    scored[method][q][rank] if scored else None,
                )
                for rank, image in enumerate(row)
            ]
            for q, row in enumerate(rows)
        ]
        for method, rows in methods.items()
    ]
    found = [one for rows in answered for row in rows for one in row]
    both = [*asked, *found]
    shapes = [one.pixels.shape for one in both if one.pixels is not None]
    ratio = float(np.median([shape[0] / shape[1] for shape in shapes])) if shapes else 0.75
    tall = cell * float(np.clip(ratio, 0.4, 1.5))  # cm: height of an image
    lines = any(one.name for one in both) + any(one.score is not None for one in both)
    step = tall + (lines * _LINE + 0.12 if lines else _GAP)
    label = _LINE * (stacked and titled)  # cm, for the methods' names
    step += label
    rows = len(methods) if stacked else 1  # of images, a query
    handles = [
        Line2D([], [], linestyle="none", marker="s", markersize=7, markerfacecolor="white",
               markeredgecolor=RIGHT if kind else WRONG, markeredgewidth=1.4,
               label="✓ right answer" if kind else "✗ wrong answer")
        for kind in (True, False) if any(one.right is not None and one.right == kind
                                         for one in found)
    ]  # fmt: skip
    head = 0.15 + 0.5 * bool(title) + _LINE * (1 + (titled and not stacked))
    foot = legend_height(handles, width) if handles else _MARGIN - 0.1
    space = 0.25 if rows > 1 else 0.0  # between queries
    height = head + len(queries) * (rows * step + space) + foot

    figure = new_figure(width, height, constrained=False)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)  # cm from the top left corner
    axes.set_autoscale_on(False)
    draw = _Drawer(axes, cell, tall)
    if title:
        draw.text(width / 2, 0.1, shortened(title, width - 0.4, TEXT + 1), TEXT + 1)
    line = head - _LINE - 0.05
    left = _MARGIN
    draw.text(left + cell / 2, line, "query", SMALL)
    starts = []  # x of each method's first answer
    x = left + cell + _BETWEEN
    for method, depth in zip(methods, depths, strict=True):
        starts.append(x)
        if not stacked:
            block = depth * (cell + _GAP) - _GAP
            name = shortened(method, block + _BETWEEN - 0.1, TEXT)
            draw.text(x + block / 2, line - _LINE, name, TEXT)
            x += block + _BETWEEN
    for start, depth in [(x, max(depths))] if stacked else zip(starts, depths, strict=True):
        for rank in range(depth):
            draw.text(start + rank * (cell + _GAP) + cell / 2, line, str(rank + 1), SMALL)
    for q, query in enumerate(asked):
        top = head + q * (rows * step + space)
        draw.picture(query, left, top + label)
        for m, method in enumerate(methods):
            y = top + m * step * stacked + label
            if stacked:
                name = shortened(method, width - starts[m] - _MARGIN, SMALL)
                draw.text(starts[m], y - label, name, SMALL, ha="left")
            if not answered[m][q]:
                draw.text(starts[m] + cell / 2, y + tall / 2, "no match", SMALL, va="center")
            for rank, one in enumerate(answered[m][q]):
                draw.picture(one, starts[m] + rank * (cell + _GAP), y, frame=True)
    if handles:
        legend_below(figure, handles, width)
    return figure


class _Loader:
    """Read images in the size in which they are drawn, each file once."""

    def __init__(self, cell: float) -> None:
        self.cell = cell
        self.loaded: dict[str, NDArray[np.uint8] | None] = {}

    def __call__(self, image: Image, what: str) -> NDArray[np.uint8] | None:
        key = str(image) if isinstance(image, (str, Path)) else None
        if key is not None and key in self.loaded:
            return self.loaded[key]
        pixels = picture_array(image, what)
        if pixels is not None:
            pixels = reduced(pixels, self.cell)
        if key is not None:
            self.loaded[key] = pixels
        return pixels


def _by_method(what: str, values: Any, methods: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return details of answers by method, each as long as the answers are."""
    if values is None:
        return None
    given = dict(values) if isinstance(values, Mapping) else {"": values}
    if given.keys() != methods.keys():
        raise DrawingError(
            f"{what} of methods {', '.join(map(repr, given))}; answers are of "
            f"{', '.join(map(repr, methods))}"
        )
    for method, rows in methods.items():
        ours, theirs = ([len(row) for row in one] for one in (given[method], rows))
        if ours != theirs:
            raise DrawingError(
                f"{what} of {_counts(ours)}, for {_counts(theirs)}{' of ' * bool(method)}{method}"
            )
    return given


def _counts(lengths: Sequence[int]) -> str:
    return f"{sum(lengths)} answers to {len(lengths)} queries"


def _check(
    queries: Sequence[Image], methods: Mapping[str, Any], query_names: Sequence[str] | None
) -> None:
    if not len(queries) or not methods:
        raise DrawingError("there are no queries, or no answers, to be drawn")
    if query_names is not None and len(query_names) != len(queries):
        raise DrawingError(f"{len(query_names)} query_names for {len(queries)} queries")
    for method, rows in methods.items():
        if len(rows) != len(queries):
            raise DrawingError(
                f"answers{' of ' * bool(method)}{method} to {len(rows)} queries, of {len(queries)}"
            )
    count = len(queries) + sum(len(row) for rows in methods.values() for row in rows)
    if count > MAX_PICTURES:
        raise DrawingError(
            f"{count} images are too many for one picture of at most {MAX_PICTURES}; "
            "choose some queries, or draw fewer answers of each"
        )


class _Drawer:
    """Draw images and lines of text, in cm."""

    def __init__(self, axes: Axes, cell: float, tall: float) -> None:
        self.axes, self.cell, self.tall = axes, cell, tall

    def text(self, x: float, y: float, text: str, size: float, **options: Any) -> None:
        """Write a line, at the middle of its top."""
        options = {"ha": "center", "va": "top", **options}
        self.axes.text(x, y, text, fontsize=size, **options)

    def picture(self, picture: _Picture, left: float, top: float, frame: bool = False) -> None:
        """Draw an image in the middle of a cell, and what is written below."""
        from matplotlib.patches import Rectangle

        cell, tall, image = self.cell, self.tall, picture.pixels
        middle = left + cell / 2
        x, y, width, height = left, top, cell, tall
        if image is None:
            self.axes.add_patch(Rectangle((x, y), width, height, facecolor="#EEEEEE"))
            self.text(middle, top + tall / 2, "no image", SMALL, va="center")
        else:
            scale = min(cell / image.shape[1], tall / image.shape[0])
            width, height = image.shape[1] * scale, image.shape[0] * scale
            x, y = middle - width / 2, top + (tall - height) / 2
            self.axes.imshow(image, extent=(x, x + width, y + height, y), aspect="auto")
        if frame and picture.right is None:
            self.axes.add_patch(
                Rectangle((x, y), width, height, fill=False, edgecolor=NEUTRAL, linewidth=0.8)
            )
        elif frame:
            self.mark(x, y, width, height, bool(picture.right))
        below = top + tall + 0.08
        if picture.score is not None:
            self.text(middle, below, f"{picture.score:.4f}", SMALL)
            below += _LINE
        if picture.name:
            name = shortened(picture.name, cell, SMALL - 1)
            self.text(middle, below, name, SMALL - 1, color="#444444")

    def mark(self, x: float, y: float, width: float, height: float, right: bool) -> None:
        """Draw a frame, and a tick or a cross on a square in its corner."""
        from matplotlib.patches import Rectangle

        colour = RIGHT if right else WRONG
        dashes: Any = "solid" if right else (0, (3, 1.2))
        self.axes.add_patch(
            Rectangle(
                (x, y), width, height, fill=False, edgecolor=colour, linewidth=1.8,
                linestyle=dashes, zorder=4,
            )
        )  # fmt: skip
        self.axes.add_patch(Rectangle((x, y), _BADGE, _BADGE, facecolor=colour, zorder=5))
        tick = np.array([[-0.6, 0.0], [-0.15, 0.5], [0.6, -0.5]])
        cross = np.array([[-0.5, -0.5], [0.5, 0.5], [np.nan, np.nan], [-0.5, 0.5], [0.5, -0.5]])
        points = np.array([x, y]) + _BADGE / 2 * (1 + (tick if right else cross))
        self.axes.plot(
            *points.T, color="white", linewidth=1.4, solid_capstyle="round", zorder=6,
            label="tick" if right else "cross",
        )  # fmt: skip
