# SPDX-License-Identifier: MIT
"""Pictures of results."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import make_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from patchnetvlad.place_match import Match

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
MAX_LINES = 120
"""Correspondences drawn a patch size; more could not be told apart."""


def plot_match(
    match: Match, names: Sequence[str] | None = None, max_lines: int = MAX_LINES
) -> Figure:
    """Draw the matched patches of two images as lines between them.

    Parameters
    ----------
    match : Match
        From :func:`patchnetvlad.match`.
    names : (str, str), optional
        Written above the images; by default the names of their files.
    max_lines : int, default 120
        Lines drawn a patch size; of more matches an evenly spaced selection is drawn, and the
        legend says so.

    Returns
    -------
    matplotlib.figure.Figure
        One colour a patch size; the similarity score in the title. It belongs to no window.
    """
    from matplotlib.figure import Figure

    both = (match.query, match.candidate)
    images = [described.image for described in both]
    if names is None:
        names = [Path(described.name).name for described in both]
    gap = 20
    height = max(image.shape[0] for image in images)
    width = images[0].shape[1] + gap + images[1].shape[1]
    offset = images[0].shape[1] + gap
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    canvas[: images[0].shape[0], : images[0].shape[1]] = images[0]
    canvas[: images[1].shape[0], offset:] = images[1]

    inches = 13.0
    margin = 1.15  # for title, names and legend
    figure = Figure(figsize=(inches, inches * height / width + margin), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(canvas)
    axes.axis("off")
    for name, left, image in zip(names, (0, offset), images, strict=True):
        axes.text(
            left + image.shape[1] / 2,
            -8,
            name,
            ha="center",
            va="bottom",
            fontsize=11,
            parse_math=False,
        )

    lines = list(zip(match.matches, match.query.grids, match.candidate.grids, strict=True))
    # The most numerous size first, so that it does not hide the others.
    order = sorted(range(len(lines)), key=lambda s: -len(lines[s][0].query_patches))
    handles = {}
    for depth, s in enumerate(order):
        matches, query_grid, candidate_grid = lines[s]
        found = len(matches.query_patches)
        drawn = _spread(found, max_lines)
        start = query_grid.keypoints[matches.query_patches[drawn]]
        end = candidate_grid.keypoints[matches.candidate_patches[drawn]] + [offset, 0]
        colour = COLOURS[s % len(COLOURS)]
        # One polyline with gaps is much faster to draw than a line a match.
        breaks = np.full((len(drawn), 2), np.nan)
        path = np.stack([start, end, breaks], axis=1).reshape(-1, 2)
        axes.plot(*path.T, color=colour, linewidth=0.9, alpha=0.75, zorder=2 + depth)
        ends = np.concatenate([start, end])
        axes.scatter(
            ends[:, 0],
            ends[:, 1],
            s=9,
            color=colour,
            edgecolors="black",
            linewidths=0.3,
            zorder=3 + depth,
        )
        note = f", {len(drawn)} drawn" if len(drawn) < found else ""
        (handles[s],) = axes.plot(
            [], [], color=colour, marker="o", linewidth=1.5,
            label=f"patch size {query_grid.patch_size}: {found} {_kind(matches.homography, found)}"
            f"{note}",
        )  # fmt: skip
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    figure.suptitle(f"Similarity score {match.score:.5f}", fontsize=14)
    figure.legend(
        handles=[handles[s] for s in sorted(handles)],
        loc="outside lower center",
        ncols=min(len(handles), 3),
        frameon=False,
        fontsize=11,
    )
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as the picture format that the path's ending names.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    path : str or Path
        Folders that do not exist are made.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".part-{path.name}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # file names in any script
        figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def _spread(count: int, most: int) -> NDArray[np.int64]:
    """Pick up to ``most`` of ``count`` indices, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _kind(homography: NDArray[np.float64] | None, found: int) -> str:
    if homography is not None:
        return "inlier" if found == 1 else "inliers"
    return "match" if found == 1 else "matches"
