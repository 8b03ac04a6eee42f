# SPDX-License-Identifier: MIT
"""A picture of how two images match: correspondences and patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import DrawingError
from patchnetvlad.matching.pair import PatchMatches
from patchnetvlad.models.grid import STRIDE, PatchGrid
from patchnetvlad.plots.drawing import (
    SMALL,
    TEXT,
    drawn,
    legend_below,
    legend_height,
    new_figure,
    picture_array,
    reduced,
    shortened,
)

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


MAX_LINES = 60
"""Correspondences drawn per patch size; many more could not be told apart."""
MAX_BOXES = 3
"""Matches per patch size whose patches are drawn, where they do not overlap."""

# One colour and marker per patch size: on paper without colour, the colours differ in brightness.
_SIZES = ("#E69F00", "#0072B2", "#F0E442", "#D55E00", "#56B4E9", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GAP = 20  # px between the images
_MARGIN = 0.15  # cm


@dataclass(frozen=True, eq=False)
class _Size:
    """What is drawn of one patch size."""

    row: int  # in the list of patch sizes
    size: int  # cells
    found: int  # matches
    inliers: bool  # whether the matches are inliers
    start: NDArray[np.floating]  # [m, 2] px, in the query
    end: NDArray[np.floating]  # [m, 2] px, in the candidate
    scores: NDArray[np.float32] | None  # [m]
    boxed: list[int] = field(default_factory=list)  # rows of start and end

    @property
    def label(self) -> str:
        one, many = ("inlier", "inliers") if self.inliers else ("match", "matches")
        note = f", {len(self.start)} drawn" if len(self.start) < self.found else ""
        return f"patch size {self.size}: {self.found} {one if self.found == 1 else many}{note}"


@drawn
def plot_match(
    match: Match,
    *,
    colour_by: str = "size",
    boxes: bool = True,
    max_lines: int = MAX_LINES,
    names: Sequence[str] | None = None,
    width: float = 16.0,
) -> Figure:
    """Draw the matched patches of two images as lines between them.

    Parameters
    ----------
    match : Match
        From :func:`patchnetvlad.match`. The matches that count for its score are drawn: inliers
        of the homographies (RANSAC), or all mutual nearest neighbours.
    colour_by : {"size", "score"}
        One colour per patch size, or colours by the cosine similarity of the two patches'
        descriptors, with a colour bar. Patch sizes differ by marker in both.
    boxes : bool, default True
        Draw the patches themselves, that is their cells of 16 px, for up to three of the drawn
        matches per size: the most similar ones whose patches do not overlap.
    max_lines : int, default 60
        Lines drawn per patch size. If there are more matches, an evenly spaced selection is
        drawn, and the legend says so.
    names : (str, str), optional
        Written above the images; by default their file names.
    width : float, default 16
        Width of the printed picture in cm.

    Returns
    -------
    matplotlib.figure.Figure
        Its title is the similarity score. Not attached to any window.

    Raises
    ------
    DrawingError
        There are no images or, for ``colour_by="score"``, no patch descriptors; ``colour_by``
        is unknown, ``max_lines`` is less than 1, or ``names`` does not have two items.
    """
    _check_options(colour_by, max_lines, names)
    left, right = (_image(side, what) for side, what in _sides(match))
    sizes = _sizes(match, max_lines, boxes)
    by_score = colour_by == "score"
    if by_score and any(size.scores is None for size in sizes):
        raise DrawingError(
            'colour_by="score" needs the patch descriptors of both images; use colour_by="size"'
        )
    titles = [Path(side.name).name for side, _ in _sides(match)] if names is None else names

    handles = [_handle(size, by_score) for size in sizes]
    layout = _layout(left, right, width, legend_height(handles, width), by_score)
    figure = new_figure(width, layout.tall, constrained=False)
    axes = figure.add_axes(layout.box(layout.left, layout.total * layout.scale))
    axes.axis("off")
    _draw_images(axes, layout, (left, right), titles)
    colours = _colour_bar(figure, layout, [size.scores for size in sizes]) if by_score else None
    # The most numerous size first, so that it does not hide the others.
    for depth, size in enumerate(sorted(sizes, key=lambda size: -size.found)):
        if size.found:
            _draw_matches(axes, layout, size, handles[size.row], colours, depth)
    axes.set_xlim(-0.5, layout.total - 0.5)
    axes.set_ylim(layout.height - 0.5, -0.5)
    figure.text(
        0.5, 1 - 0.12 / layout.tall, f"Similarity score {match.score:.5f}", ha="center", va="top",
        fontsize=TEXT + 1,
    )  # fmt: skip
    legend_below(figure, handles, width)
    return figure


@dataclass(frozen=True)
class _Layout:
    """Where the two images lie in the figure, side by side."""

    width: float  # cm, of the figure
    offset: int  # px from the query's left edge to the candidate's
    total: int  # px, width of both images with the gap
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


def _check_options(colour_by: str, max_lines: int, names: Sequence[str] | None) -> None:
    if colour_by not in ("size", "score"):
        raise DrawingError(f"colour_by = {colour_by!r}; one of size, score")
    if max_lines < 1:
        raise DrawingError(f"max_lines = {max_lines}; needed is 1 or more")
    if names is not None and (isinstance(names, str) or len(names) != 2):
        raise DrawingError(f"names = {names!r}; needed are two, of the query and the candidate")


def _handle(size: _Size, by_score: bool) -> Any:
    """Return the legend entry of a patch size, grey where colours show scores."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color="#BBBBBB" if by_score else _SIZES[size.row % len(_SIZES)],
                  marker=_MARKERS[size.row % len(_MARKERS)], markeredgecolor="black",
                  markeredgewidth=0.4, label=size.label)  # fmt: skip


def _layout(
    left: NDArray[np.uint8], right: NDArray[np.uint8], width: float, below: float, by_score: bool
) -> _Layout:
    """Put two images of one scale side by side, with room for a colour bar, if ``by_score``."""
    offset = left.shape[1] + _GAP
    height, total = max(left.shape[0], right.shape[0]), offset + right.shape[1]
    bar = 1.75 if by_score else 0.0  # cm for the colour bar and its labels
    scale = min((width - bar - 2 * _MARGIN) / total, 0.8 * width / height)
    return _Layout(width, offset, total, height, scale, (width - bar - total * scale) / 2, below)


def _draw_images(
    axes: Axes, layout: _Layout, images: Sequence[NDArray[np.uint8]], titles: Sequence[str]
) -> None:
    """Draw the query and the candidate, with their titles above."""
    for image, x in zip(images, (0, layout.offset), strict=True):
        extent = (x - 0.5, x + image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
        axes.imshow(reduced(image, image.shape[1] * layout.scale), extent=extent)
    for title, x, image in zip(titles, (0, layout.offset), images, strict=True):
        axes.annotate(
            shortened(title, image.shape[1] * layout.scale, SMALL),
            (x + image.shape[1] / 2, -0.5),
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
    shift = np.array([layout.offset, 0])
    lines = np.stack([size.start, size.end + shift], axis=1)  # [m, 2, 2]
    _add_lines(axes, lines, paint, 0.8 * thin, 2 + depth, f"matches-{size.row}")
    points = lines.transpose(1, 0, 2).reshape(-1, 2)  # [2 m, 2]
    axes.scatter(
        points[:, 0], points[:, 1], s=8 * thin**2, marker=handle.get_marker(),
        c=np.concatenate([paint, paint]), edgecolors="black", linewidths=0.3,
        zorder=10 + depth,
    )  # fmt: skip
    if len(size.boxed):
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]])
        squares = points.reshape(2, -1, 2)[:, size.boxed].reshape(-1, 1, 2)
        squares = squares + corners * (size.size * STRIDE / 2)  # [2 b, 5, 2]
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
    """Add polylines [m, points, 2], with edges that make them stand out from any photograph."""
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


def _sizes(match: Any, max_lines: int, boxes: bool) -> list[_Size]:
    """Choose what is drawn of each patch size."""
    sizes = []
    for s, matches in enumerate(match.matches):
        grids = match.query.grids[s], match.candidate.grids[s]
        found = len(matches.query_patches)
        chosen = _spread(found, max_lines)
        rows = matches.query_patches[chosen], matches.candidate_patches[chosen]
        start, end = (_middles(grid, row) for grid, row in zip(grids, rows, strict=True))
        scores = None
        if min(len(match.query.patches), len(match.candidate.patches)) > s:
            ours, theirs = (
                np.asarray(side.patches[s], dtype=np.float32)[row]
                for side, row in zip((match.query, match.candidate), rows, strict=True)
            )
            scores = np.einsum("mp,mp->m", ours, theirs)
        inliers = matches.homography is not None
        sizes.append(_Size(s, grids[0].patch_size, found, inliers, start, end, scores))
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
            half = size.size * STRIDE / 2 + 2
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


def _middles(grid: PatchGrid, rows: NDArray[np.int64]) -> NDArray[np.floating]:
    """Return the middles [m, 2] of the cells of patches, px; key points are these, truncated."""
    return (grid.indices[rows] * grid.stride + grid.patch_size / 2) * STRIDE - 0.5


def _overlaps(square: NDArray[np.floating], others: list[NDArray[np.floating]]) -> bool:
    return any(
        (square[:2] < other[2:]).all() and (other[:2] < square[2:]).all() for other in others
    )


def _spread(count: int, most: int) -> NDArray[np.int64]:
    """Pick up to ``most`` of ``count`` indices, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _range(scores: Sequence[NDArray[np.float32] | None]) -> Any:
    from matplotlib.colors import Normalize

    values = np.concatenate([*(one for one in scores if one is not None), []])
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    return Normalize(low - 0.01, high + 0.01) if high - low < 1e-6 else Normalize(low, high)
