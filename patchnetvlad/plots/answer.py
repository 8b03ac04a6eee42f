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
    method_colour,
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
_RULE = 0.12  # cm: the line below a method's name, and the space around it


@dataclass(frozen=True, eq=False)
class _Picture:
    pixels: NDArray[np.uint8] | None
    name: str = ""
    right: bool | None = None
    score: float | None = None


@dataclass(frozen=True, eq=False)
class _Details:
    """What is known of the answers, by method, query and rank."""

    names: dict[str, Any] | None
    right: dict[str, Any] | None
    scores: dict[str, Any] | None


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
    """Draw one query per row, followed by its answers, best first.

    Right answers have a solid frame and a tick, wrong ones a dashed frame and a cross. Images keep
    their aspect ratio.

    Parameters
    ----------
    queries : sequence of Q images
        A file (str or Path), pixels ([H, W, 3] or [H, W] of uint8), a PIL image, or None for a
        missing image.
    answers : sequence of Q sequences of images, or mapping of str to such
        The answers to each query, best first; their number may differ, and may be 0. A mapping
        holds the answers of several methods by name, such as ``"NetVLAD"`` and
        ``"Patch-NetVLAD"``, to show what re-ranking changed.
    right : as answers, of bool or None, optional
        Whether an answer is right; None if unknown.
    scores : as answers, of float or None, optional
        Written above the answers.
    names : as answers, of str, optional
        Written above the answers.
    query_names : sequence of Q str, optional
        Written above the queries.
    stacked : bool, default False
        Draw the methods below each other instead of side by side, for a narrow column.
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
    methods: dict[str, Any] = dict(answers) if isinstance(answers, Mapping) else {"": answers}
    _check(queries, methods, query_names)
    details = _Details(
        _by_method("names", names, methods),
        _by_method("right", right, methods),
        _by_method("scores", scores, methods),
    )
    depths = [max(1, *(len(row) for row in rows)) for rows in methods.values()]
    load = _Loader(_image_width(depths, stacked, width))
    asked = [
        _Picture(load(image, f"the image of query {q}"), query_names[q] if query_names else "")
        for q, image in enumerate(queries)
    ]
    answered = {
        method: [_answers(load, details, method, q, row) for q, row in enumerate(rows)]
        for method, rows in methods.items()
    }
    found = [one for rows in answered.values() for row in rows for one in row]
    layout = _layout([*asked, *found], depths, load.cell, width, stacked, any(methods), bool(title))
    handles = _legend(found)
    foot = legend_height(handles, width) if handles else _MARGIN - 0.1
    height = layout.top(len(queries)) + foot

    figure = new_figure(width, height, constrained=False)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)  # cm from the top left corner
    axes.set_autoscale_on(False)
    draw = _Drawer(axes, layout)
    draw.headings(title, list(methods))
    for q, query in enumerate(asked):
        draw.row(q, query, {method: rows[q] for method, rows in answered.items()})
    if handles:
        legend_below(figure, handles, width)
    return figure


@dataclass(frozen=True)
class _Layout:
    """Where queries and answers are drawn, in cm from the top left corner."""

    width: float  # of the figure
    stacked: bool  # methods below each other
    depths: list[int]  # images in the longest row of each method
    cell: float  # width of an image
    tall: float  # height of an image
    caption: float  # height of the text above it
    label: float  # height of a method's name above its answers
    step: float  # from one row of images to the next
    space: float  # between queries
    head: float  # above the first query

    @property
    def starts(self) -> list[float]:
        """The left edge of the first answers of each method."""
        x = _MARGIN + self.cell + _BETWEEN
        starts = []
        for depth in self.depths:
            starts.append(x)
            if not self.stacked:
                x += self.block(depth) + _BETWEEN
        return starts

    def block(self, depth: int) -> float:
        """Return the width of ``depth`` images side by side."""
        return depth * (self.cell + _GAP) - _GAP

    def top(self, q: int) -> float:
        """Return the upper edge of query ``q``."""
        rows = len(self.depths) if self.stacked else 1
        return self.head + q * (rows * self.step + self.space)


def _image_width(depths: Sequence[int], stacked: bool, width: float) -> float:
    """Return the width in cm of an image; DrawingError if too many are side by side."""
    columns = 1 + (max(depths) if stacked else sum(depths))
    blocks = 1 if stacked else len(depths)
    gaps = blocks * _BETWEEN + (columns - 1 - blocks) * _GAP
    cell = (width - 2 * _MARGIN - gaps) / columns
    if cell < MIN_CELL:
        raise DrawingError(
            f"{columns} images side by side do not fit into {width:g} cm; draw fewer answers per "
            "query, set stacked=True, or make the picture wider"
        )
    return cell


def _layout(
    pictures: Sequence[_Picture],
    depths: list[int],
    cell: float,
    width: float,
    stacked: bool,
    named: bool,
    titled: bool,
) -> _Layout:
    """Leave room for the images, the text above them, and the names of methods, if ``named``."""
    shapes = [one.pixels.shape for one in pictures if one.pixels is not None]
    ratio = float(np.median([shape[0] / shape[1] for shape in shapes])) if shapes else 0.75
    tall = cell * float(np.clip(ratio, 0.4, 1.5))
    lines = any(one.name for one in pictures) + any(one.score is not None for one in pictures)
    label = _LINE * (stacked and named)
    caption = lines * _LINE
    step = caption + tall + (_GAP if not lines else 0.2) + label
    space = 0.25 if stacked and len(depths) > 1 else 0.0
    head = 0.15 + 0.5 * titled + _LINE + (_LINE + _RULE) * (named and not stacked)
    return _Layout(width, stacked, depths, cell, tall, caption, label, step, space, head)


def _answers(
    load: _Loader, details: _Details, method: str, q: int, row: Sequence[Image]
) -> list[_Picture]:
    """Load a method's answers to query ``q``."""
    named, judged, scored = details.names, details.right, details.scores
    return [
        _Picture(
            load(image, f"answer {rank + 1} to query {q}"),
            named[method][q][rank] if named else "",
            judged[method][q][rank] if judged else None,
            scored[method][q][rank] if scored else None,
        )
        for rank, image in enumerate(row)
    ]


def _legend(found: Sequence[_Picture]) -> list[Any]:
    """Return legend entries for the kinds of answers, right and wrong, that there are."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], linestyle="none", marker="s", markersize=7, markerfacecolor="white",
               markeredgecolor=RIGHT if kind else WRONG, markeredgewidth=1.4,
               label="✓ right answer" if kind else "✗ wrong answer")
        for kind in (True, False) if any(one.right is not None and one.right == kind
                                         for one in found)
    ]  # fmt: skip


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

    def __init__(self, axes: Axes, layout: _Layout) -> None:
        self.axes, self.layout = axes, layout

    def headings(self, title: str, methods: Sequence[str]) -> None:
        """Write the title, and above the columns their methods and ranks."""
        layout = self.layout
        width, cell = layout.width, layout.cell
        if title:
            self.text(width / 2, 0.1, shortened(title, width - 0.4, TEXT + 1), TEXT + 1)
        line = layout.head - _LINE - 0.05
        self.text(_MARGIN + cell / 2, line, "query", SMALL)
        columns = list(zip(layout.starts, layout.depths, strict=True))
        if layout.stacked:
            columns = [(layout.starts[0], max(layout.depths))]
        else:
            for method, (start, depth) in zip(methods, columns, strict=True):
                block = layout.block(depth)
                name = shortened(method, block + _BETWEEN - 0.1, TEXT)
                self.text(start + block / 2, line - _LINE - _RULE, name, TEXT)
                self.rule(start, line - 0.6 * _RULE, block, method)
        for start, depth in columns:
            for rank in range(depth):
                self.text(start + rank * (cell + _GAP) + cell / 2, line, str(rank + 1), SMALL)

    def row(self, q: int, query: _Picture, answers: Mapping[str, Sequence[_Picture]]) -> None:
        """Draw query ``q`` and its answers by each method."""
        layout = self.layout
        cell, label, top = layout.cell, layout.label, layout.top(q)
        self.picture(query, _MARGIN, top + label)
        for m, (start, (method, found)) in enumerate(
            zip(layout.starts, answers.items(), strict=True)
        ):
            y = top + m * layout.step * layout.stacked + label
            if layout.stacked:
                name = shortened(method, layout.width - start - _MARGIN, SMALL)
                self.text(start, y - label, name, SMALL, ha="left")
                self.rule(start, y - 0.04, layout.block(layout.depths[m]), method)
            if not found:
                middle = y + layout.caption + layout.tall / 2
                self.text(start + cell / 2, middle, "no match", SMALL, va="center")
            for rank, one in enumerate(found):
                self.picture(one, start + rank * (cell + _GAP), y, frame=True)

    def rule(self, x: float, y: float, width: float, method: str) -> None:
        """Draw a line in a method's colour."""
        colour = method_colour(method)
        if colour is not None:
            self.axes.plot([x, x + width], [y, y], color=colour, linewidth=1.5, label="method")

    def text(self, x: float, y: float, text: str, size: float, **options: Any) -> None:
        """Write a line, at the middle of its top."""
        options = {"ha": "center", "va": "top", **options}
        self.axes.text(x, y, text, fontsize=size, **options)

    def picture(self, picture: _Picture, left: float, top: float, frame: bool = False) -> None:
        """Draw an image in the middle of a cell, and what is written above it."""
        from matplotlib.patches import Rectangle

        cell, tall, image = self.layout.cell, self.layout.tall, picture.pixels
        middle = left + cell / 2
        lines: list[tuple[str, float]] = []  # of text, and their sizes
        if picture.name:
            lines.append((shortened(picture.name, cell, SMALL - 1), SMALL - 1))
        if picture.score is not None:
            lines.append((f"{picture.score:.4f}", SMALL))
        top += self.layout.caption
        for i, (text, size) in enumerate(reversed(lines)):
            self.text(middle, top - i * _LINE - 0.05, text, size, va="bottom")
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
