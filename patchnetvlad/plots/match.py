# SPDX-License-Identifier: MIT
"""A picture of the match of two images: correspondences and patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import DrawingError
from patchnetvlad.matching.pair import PatchMatches
from patchnetvlad.models.grid import PatchGrid
from patchnetvlad.plots.drawing import (
    COLOURS,
    SMALL,
    TEXT,
    drawn,
    legend_below,
    legend_height,
    new_figure,
    picture_array,
    reduced,
    shortened,
    text_width,
)
from patchnetvlad.plots.spread import MAX_LINES, spread_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure


class Side(Protocol):
    """One of two images that were matched, as a :class:`~patchnetvlad.Description`."""

    @property
    def image(self) -> Any:
        """The image, or None."""

    @property
    def aspect(self) -> float:
        """Width over height that it is drawn in; 0: those of its pixels."""

    @property
    def grids(self) -> Sequence[PatchGrid]:
        """Where its patches lie, per patch size."""

    @property
    def patches(self) -> Sequence[Any]:
        """Its patch descriptors, [n_s, P] per patch size."""


class Match(Protocol):
    """Two images and their matching patches, as a :class:`~patchnetvlad.Match`."""

    @property
    def query(self) -> Side:
        """The query."""

    @property
    def candidate(self) -> Side:
        """The image that it was compared with."""

    @property
    def matches(self) -> Sequence[PatchMatches]:
        """Matching patches, per patch size."""

    @property
    def score(self) -> float:
        """Larger is more similar."""


MAX_BOXES = 2
"""Matches per patch size whose patches are drawn, where they do not overlap."""

# One colour and marker per patch size: on paper without colour, the colours differ in brightness.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GAP = 20  # px between the images
_MARGIN = 0.15  # cm


@dataclass(frozen=True, eq=False)
class _Size:
    """What is drawn of one patch size."""

    row: int  # in the list of patch sizes
    size: int  # cells
    side: int  # px
    patches: int  # of the query
    found: int  # matches
    start: NDArray[np.floating]  # [m, 2] px, in the query
    end: NDArray[np.floating]  # [m, 2] px, in the candidate
    scores: NDArray[np.float32] | None  # [m]
    boxed: list[int] = field(default_factory=list)  # rows of start and end

    @property
    def label(self) -> str:
        return f"patch size {self.size}: {self.found} of {self.patches} agree"


@drawn
def plot_match(
    match: Match,
    *,
    colour_by: str = "size",
    boxes: bool = True,
    max_lines: int | None = MAX_LINES,
    names: Sequence[str] | None = None,
    width: float = 16.0,
) -> Figure:
    """Draw the matched patches of two images as lines between them.

    Parameters
    ----------
    match : Match
        From :func:`patchnetvlad.match`. The matches that count towards its score are drawn:
        inliers of the homographies (RANSAC), or all mutual nearest neighbours.
    colour_by : {"size", "score"}
        One colour per patch size, or colours by the cosine similarity of the two patches'
        descriptors, with a colour bar. Patch sizes differ by marker in both.
    boxes : bool, default True
        Draw the patches, that is, their cells of 16 px, for up to two of the drawn matches per
        size: the most similar ones whose patches do not overlap.
    max_lines : int or None, default 15
        Total number of lines; None draws every match. If there are more matches, those that are
        far apart are drawn, alternating between patch sizes, and the title gives their number.
    names : (str, str), optional
        Written above the images; by default their file names.
    width : float, default 16
        Width of the printed picture in cm.

    Returns
    -------
    matplotlib.figure.Figure
        The title gives the similarity score and the number of matches, and the legend the number
        of each patch size. Images have their original aspect ratio. Not attached to any window.

    Raises
    ------
    DrawingError
        There are no images or, for ``colour_by="score"``, no patch descriptors; ``colour_by``
        is unknown, ``max_lines`` is less than 1, or ``names`` does not have two items.
    """
    _check_options(colour_by, max_lines, names)
    images = [_image(side, what) for side, what in _sides(match)]
    wider = [_widening(side) for side, _ in _sides(match)]
    sizes = _sizes(match, max_lines, boxes)
    by_score = colour_by == "score"
    if by_score and any(size.scores is None for size in sizes):
        raise DrawingError(
            'colour_by="score" needs the patch descriptors of both images; use colour_by="size"'
        )
    titles = [Path(side.name).name for side, _ in _sides(match)] if names is None else names

    handles = [_handle(size, by_score) for size in sizes]
    layout = _layout(images, wider, width, legend_height(handles, width), by_score)
    figure = new_figure(width, layout.tall, constrained=False)
    axes = figure.add_axes(layout.box(layout.left, layout.total * layout.scale))
    axes.axis("off")
    _draw_images(axes, layout, images, titles)
    colours = _colour_bar(figure, layout, [size.scores for size in sizes]) if by_score else None
    # The most numerous size first, so that it does not hide the others.
    for depth, size in enumerate(sorted(sizes, key=lambda size: -size.found)):
        if size.found:
            _draw_matches(axes, layout, size, handles[size.row], colours, depth)
    axes.set_xlim(-0.5, layout.total - 0.5)
    axes.set_ylim(layout.height - 0.5, -0.5)
    figure.text(
        0.5, 1 - 0.12 / layout.tall, _title(match.score, sizes, width), ha="center", va="top",
        fontsize=TEXT + 1,
    )  # fmt: skip
    legend_below(figure, handles, width)
    return figure


@dataclass(frozen=True)
class _Layout:
    """Where the two images lie in the figure, side by side."""

    width: float  # cm, of the figure
    wider: tuple[float, float]  # how much wider the images are drawn than their pixels are
    widths: tuple[float, float]  # px, of the images as they are drawn
    offset: float  # px from the query's left edge to the candidate's
    total: float  # px, width of both images with the gap
    height: int  # px, of the taller image
    scale: float  # cm per px
    left: float  # cm, left edge of the query
    below: float  # cm, height of the legend

    @property
    def tall(self) -> float:
        """Height of the figure in cm: legend, images, names and score."""
        return self.below + self.height * self.scale + 0.95

    def box(self, left: float, width: float) -> Any:
        """Return (left, bottom, width, height) of axes beside the images, as figure fractions."""
        box = np.array([left, self.below, width, self.height * self.scale])
        return box / np.array([self.width, self.tall, self.width, self.tall])


def _title(score: float, sizes: Sequence[_Size], width: float) -> str:
    found, drawn = sum(size.found for size in sizes), sum(len(size.start) for size in sizes)
    agree = f"{score:.5f}: {found} patch{'es agree' if found != 1 else ' agrees'}"
    note = f", {drawn} drawn" if drawn < found else ""
    titles = [f"Similarity score {agree}{note}", f"Score {agree}{note}", f"Score {agree}"]
    fitting = (title for title in titles if text_width(title, TEXT + 1) <= width - 0.4)
    return next(fitting, titles[-1])


def _check_options(colour_by: str, max_lines: int | None, names: Sequence[str] | None) -> None:
    if colour_by not in ("size", "score"):
        raise DrawingError(f"colour_by = {colour_by!r}; one of size, score")
    if max_lines is not None and max_lines < 1:
        raise DrawingError(f"max_lines = {max_lines}; needed is 1 or more, or None for all")
    if names is not None and (isinstance(names, str) or len(names) != 2):
        raise DrawingError(f"names = {names!r}; needed are two, of the query and the candidate")


def _handle(size: _Size, by_score: bool) -> Any:
    """Return the legend entry of a patch size, grey where colours show scores."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color="#BBBBBB" if by_score else COLOURS[size.row % len(COLOURS)],
                  marker=_MARKERS[size.row % len(_MARKERS)], markeredgecolor="black",
                  markeredgewidth=0.4, label=size.label)  # fmt: skip


def _layout(
    images: Sequence[NDArray[np.uint8]],
    wider: Sequence[float],
    width: float,
    below: float,
    by_score: bool,
) -> _Layout:
    """Put two images of one scale side by side, with room for a colour bar, if ``by_score``."""
    first, second = (image.shape[1] * by for image, by in zip(images, wider, strict=True))
    offset = first + _GAP
    height, total = max(image.shape[0] for image in images), offset + second
    bar = 1.75 if by_score else 0.0  # cm for the colour bar and its labels
    scale = min((width - bar - 2 * _MARGIN) / total, 0.8 * width / height)
    left = (width - bar - total * scale) / 2
    both = (wider[0], wider[1])
    return _Layout(width, both, (first, second), offset, total, height, scale, left, below)


def _draw_images(
    axes: Axes, layout: _Layout, images: Sequence[NDArray[np.uint8]], titles: Sequence[str]
) -> None:
    """Draw the query and the candidate, with their titles above."""
    starts = (0.0, layout.offset)
    for title, x, image, wide in zip(titles, starts, images, layout.widths, strict=True):
        extent = (x - 0.5, x + wide - 0.5, image.shape[0] - 0.5, -0.5)
        axes.imshow(reduced(image, wide * layout.scale), extent=extent)
        axes.annotate(
            shortened(title, wide * layout.scale, SMALL),
            (x + wide / 2, -0.5),
            xytext=(0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=SMALL,
            annotation_clip=False,
        )  # fmt: skip


def _colour_bar(
    figure: Figure, layout: _Layout, scores: Sequence[NDArray[np.float32] | None]
) -> ScalarMappable:
    """Draw a colour bar of similarities right of the images; return its mapping to colours."""
    from matplotlib.cm import ScalarMappable

    colours = ScalarMappable(_range(scores), "viridis")
    box = layout.box(layout.left + layout.total * layout.scale + 0.2, 0.3)
    shown = figure.colorbar(colours, cax=figure.add_axes(box))
    shown.set_label("cosine similarity", fontsize=SMALL)
    shown.ax.tick_params(labelsize=SMALL, length=2)
    return colours


def _draw_matches(
    axes: Axes,
    layout: _Layout,
    size: _Size,
    handle: Any,
    colours: ScalarMappable | None,
    depth: int,
) -> None:
    """Draw the matches of a patch size: lines, markers at both ends, and some patches."""
    from matplotlib.colors import to_rgba_array

    thin = float(np.clip(layout.width / 16, 0.55, 1.2))  # in small pictures
    paint = to_rgba_array([handle.get_color()] * len(size.start))  # [m, 4]
    if colours is not None:
        paint = colours.to_rgba(np.asarray(size.scores))
    stretch = np.array([[by, 1.0] for by in layout.wider])  # [2, 2]
    shift = np.array([layout.offset, 0])
    ends = (_stretched(size.start, stretch[0]), _stretched(size.end, stretch[1]) + shift)
    lines = np.stack(ends, axis=1)  # [m, 2, 2]
    _add_lines(axes, lines, paint, 0.8 * thin, 2 + depth, f"matches-{size.row}")
    points = lines.transpose(1, 0, 2).reshape(-1, 2)  # [2 m, 2]
    axes.scatter(
        points[:, 0], points[:, 1], s=8 * thin**2, marker=handle.get_marker(),
        c=np.concatenate([paint, paint]), edgecolors="black", linewidths=0.3,
        zorder=10 + depth,
    )  # fmt: skip
    if len(size.boxed):
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]])
        half = corners * (size.side / 2) * stretch[:, None, None]  # [2, 1, 5, 2]
        squares = (points.reshape(2, -1, 1, 2)[:, size.boxed] + half).reshape(-1, 5, 2)
        twice = np.concatenate([paint[size.boxed]] * 2)
        _add_lines(axes, squares, twice, 1.1 * thin, 20 + depth, f"patches-{size.row}")


def _add_lines(
    axes: Axes,
    lines: NDArray[np.floating],
    paint: NDArray[np.floating],
    thick: float,
    zorder: float,
    name: str,
) -> None:
    """Add polylines [m, points, 2], with edges that make them stand out from any image."""
    from matplotlib.collections import LineCollection
    from matplotlib.patheffects import withStroke

    bright = paint[:, :3] @ (0.299, 0.587, 0.114) > 0.55
    for edge, some in (("black", bright), ("white", ~bright)):
        if some.any():
            axes.add_collection(
                LineCollection(
                    list(lines[some]), colors=paint[some], linewidths=thick, zorder=zorder,
                    path_effects=[withStroke(linewidth=thick + 0.6, foreground=edge, alpha=0.6)],
                    gid=f"{name}-{edge}",
                ),
                autolim=False,
            )  # fmt: skip


def _stretched(points: NDArray[np.floating], stretch: NDArray[Any]) -> NDArray[np.floating]:
    """Stretch points [m, 2] whose pixels' upper left corner is (-0.5, -0.5)."""
    return (points + 0.5) * stretch - 0.5


def _widening(side: Any) -> float:
    """Return how much wider than its pixels an image is to be drawn, to have its own shape."""
    height, width = np.shape(side.image)[:2] if side.aspect else (1, 1)
    return float(side.aspect * height / width) if side.aspect else 1.0


def _sides(match: Any) -> tuple[tuple[Any, str], tuple[Any, str]]:
    return (match.query, "the query's image"), (match.candidate, "the candidate's image")


def _image(side: Any, what: str) -> NDArray[np.uint8]:
    image = picture_array(side.image, what)
    if image is None:
        raise DrawingError(
            f"{what} is empty ({side.name or 'of no name'}): only its features were kept, or its "
            "file is gone; describe the image again"
        )
    return image


def _sizes(match: Any, max_lines: int | None, boxes: bool) -> list[_Size]:
    """Choose what is drawn of each patch size."""
    sizes = []
    every = [
        np.hstack([
            match.query.grids[s].keypoints[matches.query_patches],
            match.candidate.grids[s].keypoints[matches.candidate_patches],
        ])
        for s, matches in enumerate(match.matches)
    ]  # fmt: skip
    most = sum(map(len, every)) if max_lines is None else max_lines
    for s, (matches, chosen) in enumerate(zip(match.matches, spread_out(every, most), strict=True)):
        grids = match.query.grids[s], match.candidate.grids[s]
        found = len(matches.query_patches)
        rows = matches.query_patches[chosen], matches.candidate_patches[chosen]
        start, end = (grid.centres[row] for grid, row in zip(grids, rows, strict=True))
        scores = None
        if min(len(match.query.patches), len(match.candidate.patches)) > s:
            ours, theirs = (
                np.asarray(side.patches[s], dtype=np.float32)[row]
                for side, row in zip((match.query, match.candidate), rows, strict=True)
            )
            scores = np.einsum("mp,mp->m", ours, theirs)
        patches, cells = len(grids[0]), grids[0].patch_size
        side = cells * grids[0].geometry.cell
        sizes.append(_Size(s, cells, side, patches, found, start, end, scores))
    if boxes:
        _choose_boxes(sizes)
    return sizes


def _choose_boxes(sizes: list[_Size]) -> None:
    """Choose matches whose patches do not overlap those of another chosen match."""
    taken: tuple[list[NDArray[np.floating]], ...] = ([], [])
    left = {}  # rows that are still to be tried, the most similar first
    for size in sorted(sizes, key=lambda size: -size.size):
        order = np.arange(len(size.start))
        if size.scores is not None:
            order = np.argsort(-size.scores, kind="stable")
        left[size.row] = (size, list(order))
    # In turns, so that every size has its boxes, and large patches find room first.
    for _ in range(MAX_BOXES):
        for size, rows in left.values():
            half = size.side / 2 + 2
            while rows:
                m = rows.pop(0)
                squares = [
                    np.concatenate([p[m] - half, p[m] + half]) for p in (size.start, size.end)
                ]
                if not any(map(_overlaps, squares, taken)):
                    for square, others in zip(squares, taken, strict=True):
                        others.append(square)
                    size.boxed.append(int(m))
                    break


def _overlaps(square: NDArray[np.floating], others: list[NDArray[np.floating]]) -> bool:
    return any(
        (square[:2] < other[2:]).all() and (other[:2] < square[2:]).all() for other in others
    )


def _range(scores: Sequence[NDArray[np.float32] | None]) -> Any:
    from matplotlib.colors import Normalize

    values = np.concatenate([*(one for one in scores if one is not None), []])
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    return Normalize(low - 0.01, high + 0.01) if high - low < 1e-6 else Normalize(low, high)
