# SPDX-License-Identifier: MIT
"""Curves of several runs: recall@N, precision and recall."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os.path import commonpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.arguments import checked
from patchnetvlad.base.text import one_line, parse_json
from patchnetvlad.errors import DrawingError, ResultsError
from patchnetvlad.evaluation.metrics import Metrics, PrecisionRecall
from patchnetvlad.evaluation.metrics_file import FORMAT
from patchnetvlad.plots.drawing import (
    TEXT,
    drawn,
    finish_axes,
    legend_below,
    method_colour,
    new_figure,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RATIO = 0.72  # of height and width
METRICS_FILE = "metrics.json"
METHODS = {"NetVLAD": "NetVLAD", "PatchNetVLAD": "Patch-NetVLAD", "Sequence": "Sequence"}
"""Methods as ``metrics.json`` and as the paper call them."""
MAX_TICKS = 10
MAX_RUNS = 12
"""Runs in one figure; more could not be told apart."""

# Numbers of elements without common divisors: twelve runs differ in two ways or more.
_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black", "#7F7F7F", "#8C564B")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("solid", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2)))


@drawn
def plot_recalls(
    runs: Mapping[str, Metrics | tuple[Sequence[int], Sequence[float]]],
    *,
    title: str = "",
    width: float = 8.0,
) -> Figure:
    """Draw recall@N of several runs.

    Parameters
    ----------
    runs : mapping of str to Metrics or (n_values, recalls)
        By name. Recalls are shares from 0 to 1. ``metrics`` of a
        :class:`~patchnetvlad.pipeline.record.RunRecord` are such a mapping, and so is what
        :func:`read_runs` returns.
    title : str
    width : float, default 8
        Width of the printed picture in cm: a column of a paper.

    Returns
    -------
    matplotlib.figure.Figure
        Runs differ in colour, marker and dashes; bands are 95 % intervals of those that have them.
        Not attached to any window.

    Raises
    ------
    DrawingError
        There are no runs, or more than 12; lengths differ, or values are not recalls.

    Examples
    --------
    >>> figure = plot_recalls({"mine": ([1, 5, 10], [0.62, 0.85, 0.93])})
    """
    from matplotlib.ticker import (
        FixedLocator,
        LogLocator,
        MaxNLocator,
        NullLocator,
        StrMethodFormatter,
    )

    _check_number(runs)
    curves = {name: _recalls(name, run) for name, run in runs.items()}
    figure = new_figure(width, _RATIO * width)
    axes = figure.add_subplot()
    handles = []
    lowest = 1.0
    for (name, (n_values, recalls)), style in zip(curves.items(), _styles(curves), strict=True):
        order = np.argsort(n_values, kind="stable")
        n_values, recalls = n_values[order], recalls[order]
        found = getattr(runs[name], "intervals", None)
        if found is not None:
            lowest = min(lowest, _band(axes, n_values, found.by_n["recall"][order].T, style))
        marked = np.arange(len(n_values))
        if len(marked) > MAX_TICKS:
            marked = np.unique(np.searchsorted(n_values, np.geomspace(1, n_values[-1], MAX_TICKS)))
        handles += axes.plot(n_values, 100 * recalls, markevery=marked.tolist(), **style)
    every = np.unique(np.concatenate([n for n, _ in curves.values()]))
    finish_axes(axes)
    if every[-1] > 30 * every[0]:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    if len(every) <= MAX_TICKS:
        axes.xaxis.set_major_locator(FixedLocator(every.tolist()))
    elif axes.get_xscale() == "log":
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=MAX_TICKS))
    lowest = min(lowest, *(float(recalls.min()) for _, recalls in curves.values()))
    axes.set_ylim(max(10 * np.floor(10 * lowest - 0.2), -2), 102)
    axes.set_xlabel("N: candidates")
    axes.set_ylabel("recall@N, %")
    _finish(figure, axes, handles, title, width)
    return figure


@drawn
def plot_precision_recall(
    runs: Mapping[str, Metrics | PrecisionRecall | tuple[Sequence[float], Sequence[float]]],
    *,
    title: str = "",
    width: float = 8.0,
) -> Figure:
    """Draw precision and recall over queries, at all thresholds, of several runs.

    Parameters
    ----------
    runs : mapping of str to Metrics, PrecisionRecall or (precision, recall)
        By name. Values are shares from 0 to 1, from the strictest threshold to the most
        lenient. Runs without a curve or without answered queries are left out.
    title : str
    width : float, default 8
        Width of the printed picture in cm: a column of a paper.

    Returns
    -------
    matplotlib.figure.Figure
        Each run is labelled with its average precision (AP), the area under the step curve. Runs
        differ in colour, marker and dashes; bands are 95 % intervals of the precision at a recall.
        Not attached to any window.

    Raises
    ------
    DrawingError
        There are no curves, or more than 12; lengths differ, or values are not shares.
    """
    curves = {name: _curve(name, run) for name, run in runs.items()}
    drawable = {name: curve for name, curve in curves.items() if curve is not None}
    if runs and not drawable:
        raise DrawingError(
            "none of these runs has a precision-recall curve; it needs ground truth, and scores "
            "that are comparable between queries"
        )
    _check_number(drawable)
    figure = new_figure(width, _RATIO * width)
    axes = figure.add_subplot()
    handles = []
    lowest = 1.0
    for (name, (precision, recall)), style in zip(drawable.items(), _styles(drawable), strict=True):
        area = float(np.sum(np.diff(recall, prepend=0.0) * precision))
        found = getattr(runs[name], "intervals", None)
        if found is not None and found.band is not None and found.band.size:
            lowest = min(lowest, _band(axes, 100 * found.band[0], found.band[1:], style))
        # Markers at even distances of recall, however many thresholds there are.
        marked = np.unique(np.searchsorted(recall, np.linspace(0, recall[-1], 7)))
        handles += axes.plot(
            100 * recall, 100 * precision, markevery=marked.tolist(),
            **{**style, "label": f"{name} (AP {100 * area:.1f})"},
        )  # fmt: skip
    finish_axes(axes)
    lowest = min(lowest, *(float(precision.min()) for precision, _ in drawable.values()))
    axes.set_xlim(-2, 102)
    axes.set_ylim(max(10 * np.floor(10 * lowest - 0.2), -2), 102)
    axes.set_xlabel("recall, %")
    axes.set_ylabel("precision, %")
    _finish(figure, axes, handles, title, width)
    return figure


@checked
def read_runs(
    folders: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    *,
    methods: Sequence[str] = tuple(METHODS),
) -> dict[str, Metrics]:
    """Read the metrics of several runs, for drawing.

    Parameters
    ----------
    folders : str or Path, sequence of such, or mapping of str to such
        Results folders with ``metrics.json``, or such files. A mapping names the runs; otherwise
        they are named by the parts of their paths that differ.
    methods : sequence of str, default ("NetVLAD", "PatchNetVLAD")
        Methods to read, if available.

    Returns
    -------
    dict of str to Metrics
        By run and method, such as ``"night: Patch-NetVLAD"``; only by method for a single run
        without a name.

    Raises
    ------
    ResultsError
        A file is missing, damaged, not a ``metrics.json`` of this package, or has none of the
        methods.

    Examples
    --------
    >>> plot_recalls(read_runs(["results/day", "results/night"]))  # doctest: +SKIP
    """
    if isinstance(folders, (str, Path)):
        folders = [folders]
    named = dict(folders) if isinstance(folders, Mapping) else name_runs(folders)
    runs: dict[str, Metrics] = {}
    for name, folder in named.items():
        path = Path(folder)
        path = path / METRICS_FILE if path.is_dir() else path
        read = _read(path)
        if not read.keys() & set(methods):
            raise ResultsError(f"{path} has metrics of {', '.join(read) or 'no method'}, not of "
                               f"{', '.join(methods)}")  # fmt: skip
        for method in methods:
            if method in read:
                runs[": ".join(filter(None, (name, METHODS.get(method, method))))] = read[method]
    return runs


def name_runs(folders: Sequence[str | Path]) -> dict[str, str | Path]:
    """Name folders, or files, by the parts of their paths that differ.

    Parameters
    ----------
    folders : sequence of str or Path

    Returns
    -------
    dict of str to str or Path
        Those that were given, by name; the name of a single one is empty.

    Raises
    ------
    ResultsError
        None is given, or one twice.
    """
    paths = [Path(folder).absolute() for folder in folders]
    paths = [path.parent if path.name == METRICS_FILE else path for path in paths]
    if len(paths) == 1:
        return {"": folders[0]}
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise ResultsError(f"{twice[0]} is given twice; give each run once, or names to all")
    if not paths:
        raise ResultsError("no folders of results are given")
    common = Path(commonpath(paths))
    names = [path.relative_to(common) for path in paths]
    return {
        str(name if name.parts else path.name): folder
        for name, path, folder in zip(names, paths, folders, strict=True)
    }


def _read(path: Path) -> dict[str, Metrics]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(
            f"{path} cannot be read: {error.strerror}; feature-match writes it to its results "
            "folder where it is given ground truth"
        ) from None
    except ValueError as error:
        raise ResultsError(f"{path} is damaged: {one_line(error)}; match again") from None
    kind = content.get("format") if isinstance(content, dict) else None
    if kind != FORMAT:
        raise ResultsError(f"{path} has the format {kind!r}; needed is {FORMAT!r}")
    try:
        return {str(name): Metrics.from_dict(values) for name, values in content["methods"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResultsError(
            f"{path} is damaged: {type(error).__name__} {one_line(error)}; match again"
        ) from None


def _recalls(name: str, run: Any) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    n_values, recalls = (run.n_values, run.recalls) if isinstance(run, Metrics) else run
    counts, shares = np.asarray(n_values), _shares(name, "recalls", recalls)
    if counts.shape != shares.shape or counts.ndim != 1 or not len(counts):
        raise DrawingError(f"{name}: {counts.size} values of N for {shares.size} recalls")
    if counts.dtype.kind not in "iu":
        raise DrawingError(f"{name}: the values of N must be whole numbers")
    if counts.min() < 1:
        raise DrawingError(f"{name}: N = {counts.min()} must be 1 or more")
    return counts.astype(np.int64), shares


def _band(
    axes: Axes,
    x: NDArray[Any],
    ends: NDArray[np.float64],
    style: Mapping[str, Any],
) -> float:
    """Fill the interval [2, n] along a curve, and return its lowest end."""
    low, high = 100 * ends
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    return float(ends.min())


def _curve(name: str, run: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    run = run.curve if isinstance(run, Metrics) else run
    if run is None:
        return None
    pair = (run.precision, run.recall) if isinstance(run, PrecisionRecall) else run
    precision, recall = (
        _shares(name, what, values)
        for what, values in zip(("precision", "recall"), pair, strict=True)
    )
    if precision.shape != recall.shape or precision.ndim != 1:
        raise DrawingError(f"{name}: {precision.size} precisions for {recall.size} recalls")
    if len(recall) and (np.diff(recall) < 0).any():
        raise DrawingError(f"{name}: recall falls; give points from the strictest threshold on")
    return (precision, recall) if len(recall) else None


def _shares(name: str, what: str, values: Any) -> NDArray[np.float64]:
    shares = np.asarray(values, dtype=np.float64)
    bad = shares[~((shares >= 0) & (shares <= 1 + 1e-9))]
    if len(bad):
        raise DrawingError(f"{name}: {what} of {bad[0]:g}; needed are shares from 0 to 1")
    return shares


def _check_number(runs: Mapping[str, Any]) -> None:
    if not 1 <= len(runs) <= MAX_RUNS:
        raise DrawingError(
            f"{len(runs)} runs to be drawn; it can be 1 to {MAX_RUNS}, to be told apart"
        )


def _styles(names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield what tells runs apart, in colour and without.

    NetVLAD and Patch-NetVLAD have their colours; further runs of them have shades of these.
    """
    colours = {name: method_colour(name) for name in names}
    seen: Counter[str] = Counter()
    for i, (name, colour) in enumerate(colours.items()):
        if colour is not None:
            seen[colour] += 1
            shade = _shaded(colour, seen[colour] - 1)
        # The first of the two methods is dashed, the second is not: they are seldom alone.
        dash = i + 4 if any(colours.values()) and len(colours) > 1 else i
        yield {
            "label": name,
            "color": _COLOURS[i % len(_COLOURS)] if colour is None else shade,
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _DASHES[dash % len(_DASHES)],
            "markeredgecolor": "white",
            "markeredgewidth": 0.4,
            "clip_on": False,
        }


def _shaded(colour: str, k: int) -> Any:
    """Return the k-th shade of a colour, by turns lighter and darker; the 0-th is itself."""
    from matplotlib.colors import to_rgb

    step = (k + 1) // 2
    share = step / (step + 1.2)
    towards = 1.0 if k % 2 else 0.0
    return tuple((1 - share) * value + share * towards for value in to_rgb(colour))


def _finish(figure: Figure, axes: Axes, handles: Sequence[Any], title: str, width: float) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if title:
        axes.set_title(shortened(title, width - 1.5, TEXT))
    legend_below(figure, handles, width)
