# SPDX-License-Identifier: MIT
"""Code shared by pictures: colours, print sizes, images, fitted text, files.

Figures have their printed size, with text of 7 and 8 pt, whatever the settings of the notebook or
script around them. They are not attached to any window.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from patchnetvlad.base.arguments import argument_errors, check_arguments, checked
from patchnetvlad.base.files import make_folder, replacing
from patchnetvlad.datasets.images import load_image
from patchnetvlad.errors import DrawingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#F0E442", "#56B4E9", "#CC79A7", "#E69F00", "#009E73", "#D55E00", "#0072B2")
"""Of patch sizes, in pictures, reports and live; those of the methods come last."""
METHODS = {"NetVLAD": "#D55E00", "Patch-NetVLAD": "#0072B2"}
"""One colour each, on every curve, map, answer and page."""
SEQUENCE = "#B8569A"
"""Colour of answers of sequences."""
RIGHT, WRONG, NEUTRAL = "#009E73", "#A31545", "#7F7F7F"
"""Colours of right and wrong answers, and of answers that are not judged."""
INDEX_POINTS = "#6B737C"
"""Index images on maps."""

CM = 1 / 2.54  # in inches
TEXT, SMALL = 8.0, 7.0  # pt
PICTURE_DPI = 300  # to which images are reduced in figures
SCREEN_DPI = 150  # in notebooks
SAVE_DPI = 200  # of files, where none is asked for
ENDINGS = ("png", "jpg", "jpeg", "pdf", "svg")
MIN_WIDTH, MAX_WIDTH = 4.0, 200.0  # cm

_STYLE = {
    "font.size": TEXT,
    "axes.labelsize": TEXT,
    "axes.titlesize": TEXT,
    "figure.titlesize": TEXT + 1,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.0,
    "text.parse_math": False,  # names may hold dollar signs
    "axes.formatter.useoffset": False,
}
# TrueType fonts in PDF, as publishers ask; text in SVG stays text.
_FILES = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "patchnetvlad"}
# Without dates and versions, equal pictures are equal files.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}

P = ParamSpec("P")
R = TypeVar("R")


# matplotlib's settings, and Python's of warnings, are the whole process's.
_one_at_a_time = threading.RLock()


def drawn(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function draw in the style of this package, not in the current one."""

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib.style

        problem = f"{function.__name__} cannot draw these values"
        check_arguments(function, args, kwargs, DrawingError, f"{problem}: ")
        with (
            _one_at_a_time,
            matplotlib.style.context(_STYLE, after_reset=True),
            argument_errors(problem, DrawingError),
        ):
            return function(*args, **kwargs)

    return inner


def new_figure(width: float, height: float, constrained: bool = True) -> Figure:
    """Return an empty figure of ``width`` x ``height`` cm, which may lay out its axes itself.

    Raises
    ------
    DrawingError
        The width is less than 4 or more than 200 cm.
    """
    if not MIN_WIDTH <= width <= MAX_WIDTH:
        raise DrawingError(
            f"width = {width:g} cm; pictures are from {MIN_WIDTH:g} to {MAX_WIDTH:g} cm wide "
            "(a column of a paper is about 8, a page 17)"
        )
    layout: Any = "constrained" if constrained else None
    size = (width * CM, height * CM)
    return _figure_class()(figsize=size, dpi=SAVE_DPI, layout=layout)


@functools.cache
def _figure_class() -> type[Figure]:
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure that a notebook shows when it is the last value of a cell."""

        def savefig(self, fname: Any, **options: Any) -> None:
            """Write it as :func:`save_figure` does, in the style of this package."""
            with _saving():
                super().savefig(fname, **options)

        def _repr_png_(self) -> bytes:
            content = BytesIO()
            self.savefig(content, format="png", dpi=SCREEN_DPI)
            return content.getvalue()

    return Picture


@contextlib.contextmanager
def _saving() -> Iterator[None]:
    import matplotlib.style

    style = {**_STYLE, **_FILES}
    with (
        _one_at_a_time,
        warnings.catch_warnings(),
        matplotlib.style.context(style, after_reset=True),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # file names in any script
        yield


@checked
def save_figure(figure: Figure, path: str | Path, *, dpi: float = SAVE_DPI) -> None:
    """Write a figure as PNG, JPEG, PDF or SVG, according to the suffix of the path.

    PDF and SVG are for papers: lines and text stay lines and text (PDF with embedded TrueType
    fonts). Files hold no date, so equal figures give equal files.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    path : str or Path
        Ends in ``.png``, ``.jpg``, ``.jpeg``, ``.pdf`` or ``.svg``. Missing folders are created;
        the file is replaced atomically.
    dpi : float, default 200
        Pixels per inch of PNG and JPEG, and of pixel images within PDF and SVG.

    Raises
    ------
    DrawingError
        Unknown suffix, or ``dpi`` is less than 1.
    OutputError
        The file cannot be written.
    """
    if not hasattr(figure, "savefig"):
        raise DrawingError(f"a {type(figure).__name__} is not a figure of matplotlib")
    path = Path(path)
    kind = path.suffix[1:].lower()
    if not (math.isfinite(dpi) and dpi >= 1):
        raise DrawingError(f"dpi = {dpi:g} must be 1 or more")
    if kind not in ENDINGS:
        raise DrawingError(
            f"{path}: the ending of a picture's name says what is written; "
            f"it can be .{', .'.join(ENDINGS[:-1])} or .{ENDINGS[-1]}"
        )
    make_folder(path.parent)
    options: dict[str, Any] = {"metadata": _METADATA.get(kind)}
    if kind in ("jpg", "jpeg"):
        options = {"pil_kwargs": {"quality": 88, "optimize": True}}
    with _saving(), replacing(path) as file:
        figure.savefig(file, format=kind, dpi=dpi, **options)


def picture_array(image: Any, what: str = "the image") -> NDArray[np.uint8] | None:
    """Return an image's pixels.

    Parameters
    ----------
    image : str, Path, PIL.Image.Image, ndarray or None
        A file, or pixels: [H, W, 3] or [H, W] (grey) of uint8.
    what : str
        Name of the image in errors.

    Returns
    -------
    ndarray [H, W, 3] of uint8 or None
        None if there is no image: None, or an array without pixels.

    Raises
    ------
    ImageError
        The file is missing or damaged.
    DrawingError
        The array has another shape or type.
    """
    if image is None:
        return None
    if isinstance(image, (str, Path)):
        return np.asarray(load_image(image))
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    array = np.asarray(image)
    if array.size == 0:
        return None
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise DrawingError(
            f"{what} is an array {list(array.shape)} of {array.dtype}; "
            "needed is [height, width, 3] or [height, width] of uint8"
        )
    return array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2)


def reduced(image: NDArray[np.uint8], width: float) -> NDArray[np.uint8]:
    """Reduce an image to the resolution visible when it is printed ``width`` cm wide."""
    pixels = max(1, round(width * CM * PICTURE_DPI))
    if image.shape[1] <= pixels:
        return image
    height = max(1, round(image.shape[0] * pixels / image.shape[1]))
    size = (pixels, height)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def text_width(text: str, size: float) -> float:
    """Return the width in cm of a line of text of ``size`` pt."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        points, *_ = text_to_path.get_text_width_height_descent(
            text, FontProperties(size=size), ismath=False
        )
    return 1.05 * float(points) / 72 / CM  # letters are moved to whole pixels


def shortened(text: str, width: float, size: float = SMALL) -> str:
    """Return text on one line of at most ``width`` cm, with "…" for its middle if too long.

    The ends of names differ more often than their middles.
    """
    text = "".join("�" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
    if text_width(text, size) <= width:
        return text
    fewest, most = 0, len(text) - 1  # characters kept
    while fewest < most:
        keep = (fewest + most + 1) // 2
        if text_width(_without_middle(text, keep), size) <= width:
            fewest = keep
        else:
            most = keep - 1
    return _without_middle(text, fewest)


def legend_below(figure: Figure, handles: Sequence[Any], width: float) -> None:
    """Put a legend at the bottom of a figure ``width`` cm wide, in as many columns as fit.

    A figure that lays out its axes itself grows by the legend's height.
    """
    from matplotlib.font_manager import FontProperties

    labels, columns = _legend(handles, width)
    constrained = figure.get_layout_engine() is not None
    if constrained:
        height = figure.get_figheight() + legend_height(handles, width) * CM
        figure.set_size_inches(width * CM, height)
    figure.legend(
        handles=list(handles),
        labels=labels,
        loc="outside lower center" if constrained else "lower center",
        ncols=columns,
        frameon=False,
        prop=FontProperties(size=SMALL),
        **_LEGEND,
    )


def legend_height(handles: Sequence[Any], width: float) -> float:
    """Return the height in cm of the legend that :func:`legend_below` puts there."""
    labels, columns = _legend(handles, width)
    return 0.38 * -(-len(labels) // columns) + 0.25


_LEGEND = {"handlelength": 2.2, "columnspacing": 1.2, "handletextpad": 0.6}  # of the text's size


def _legend(handles: Sequence[Any], width: float) -> tuple[list[str], int]:
    """Return labels that fit, and the number of columns; columns are filled one by one."""
    em = SMALL / 72 / CM
    handle = (_LEGEND["handlelength"] + _LEGEND["handletextpad"]) * em
    room = width - 0.5
    labels = [shortened(str(one.get_label()), room - handle, SMALL) for one in handles]
    # matplotlib leaves out labels that begin with an underscore.
    labels = [f" {label}" if label.startswith("_") else label for label in labels]
    widths = [text_width(label, SMALL) + handle for label in labels]
    for columns in range(max(len(labels), 1), 1, -1):
        # The first columns have one more, where labels cannot be shared evenly.
        parts = np.array_split(np.array(widths), columns)
        total = sum(part.max() for part in parts) + (columns - 1) * _LEGEND["columnspacing"] * em
        if total <= room:
            return labels, columns
    return labels, 1


def method_colour(name: str) -> str | None:
    """Return the colour of a method, by a name such as "night: PatchNetVLAD"; None if unknown."""
    method = name.rpartition(": ")[2].replace("PatchNetVLAD", "Patch-NetVLAD")
    return SEQUENCE if method == "Sequence" else METHODS.get(method)


def finish_axes(axes: Axes) -> None:
    """Style the axes of curves and maps."""
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.set_axisbelow(True)
    # Ticks are made when a figure is drawn, maybe in another style.
    axes.tick_params(labelsize=SMALL, width=0.6, length=2.5)


def _without_middle(text: str, keep: int) -> str:
    head = keep // 2
    return f"{text[:head]}…{text[len(text) - (keep - head) :]}"
