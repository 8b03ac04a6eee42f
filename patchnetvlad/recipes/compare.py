# SPDX-License-Identifier: MIT
"""Comparing runs: from results folders and prediction files to tables and a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path

from patchnetvlad.base.arguments import checked, shown
from patchnetvlad.base.files import check_inputs_stay, make_folder
from patchnetvlad.config_ini import INTERVAL_BLOCKS, is_interval_block
from patchnetvlad.errors import ArgumentError, ResultsError
from patchnetvlad.evaluation.comparison import Comparison, compare_methods
from patchnetvlad.evaluation.comparison_files import (
    CSV_FILE,
    LATEX_FILE,
    MARKDOWN_FILE,
    QUERIES_FILE,
    write_comparison,
    write_queries,
)
from patchnetvlad.plots.curves import name_runs
from patchnetvlad.report.comparison import write_comparison_page
from patchnetvlad.report.runs import Runs, load_runs

PAGE_FILE = "comparison.html"


@checked
def compare(
    runs: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    output: str | Path | None = None,
    *,
    query_list: str | Path | None = None,
    index_list: str | Path | None = None,
    ground_truth: str | Path | None = None,
    threshold: float | None = None,
    dataset_root: str | Path | None = None,
    n_values: Sequence[int] = (1, 5, 10),
    all_methods: bool = False,
    interval_block: str | None = None,
    title: str = "",
    max_mb: float = 50,
    progress: bool = True,
) -> Comparison:
    """Compare runs on the same queries.

    Parameters
    ----------
    runs : str or Path, sequence of such, or mapping of str to such
        Results folders, or files with predictions of other methods, see
        :func:`~patchnetvlad.search.candidates.load_candidates`. A mapping names the runs; otherwise
        they are named by the parts of their paths that differ. A single folder is compared before
        and after re-ranking.
    output : str or Path, optional
        Folder for ``comparison.csv``, ``.md``, ``.tex`` and ``.html``, and ``queries.csv``.
    query_list, index_list, ground_truth, threshold, dataset_root : optional
        By default those of the first results folder that records them.
    n_values : sequence of int, default (1, 5, 10)
        The N of recall@N, of which those remain that all runs have candidates for; tests and
        sentences are of the first.
    all_methods : bool, default False
        Also compare the answers before re-ranking of several folders.
    interval_block : str, optional
        What intervals draw, see :func:`~patchnetvlad.evaluation.intervals.choose_bootstrap`; by
        default that of the first run's configuration.
    title : str
        Of the page; by default the names of the runs.
    max_mb : float, default 50
        Maximum size of the page in MB (10^6 bytes).
    progress : bool, default True
        Show progress bars on stderr.

    Returns
    -------
    Comparison

    Raises
    ------
    PatchNetVLADError
        A run is missing, damaged or of other images, lists or ground truth are unknown, an
        argument does not fit, or a file cannot be written.

    Examples
    --------
    >>> compared = compare({"day": "results/day", "XFeat": "xfeat.txt"}, "out")  # doctest: +SKIP
    >>> print(*compared.sentences(), sep="\\n")  # doctest: +SKIP
    """
    if interval_block is not None and not is_interval_block(interval_block):
        raise ResultsError(f"interval_block {shown(interval_block)} is not {INTERVAL_BLOCKS}")
    if not all(isinstance(n, Integral) for n in n_values):
        raise ArgumentError(f"n_values = {shown(n_values)} are not whole numbers")
    if min(n_values, default=0) < 1 or not (math.isfinite(max_mb) and max_mb > 0):
        raise ResultsError(
            f"n_values {list(n_values)} must be whole numbers from 1, and max_mb = {max_mb:g} "
            "more than 0"
        )
    if isinstance(runs, (str, Path)):
        runs = [runs]
    elif isinstance(runs, bytes):  # a sequence, if not of paths
        raise ArgumentError(f"runs = {shown(runs)} are not paths")
    named = dict(runs) if isinstance(runs, Mapping) else name_runs(runs)
    found = load_runs(
        named,
        query_list=query_list,
        index_list=index_list,
        ground_truth=ground_truth,
        threshold=threshold,
        dataset_root=dataset_root,
        all_methods=all_methods,
    )
    folder = None if output is None else _folder(Path(output), found)
    most = min(of.shape[1] for of in found.answers.values())
    compared = compare_methods(
        found.answers,
        found.positives,
        [n for n in dict.fromkeys(n_values) if n <= most] or [most],
        interval_block=interval_block or found.interval_block,
        query_names=found.query_names,
    )
    if folder is not None:
        write_comparison(folder, compared)
        answers = [[found.index_names[row[0]] for row in of] for of in found.answers.values()]
        write_queries(folder / QUERIES_FILE, compared, found.query_names, answers)
        write_comparison_page(
            folder / PAGE_FILE, found, compared, title=title, max_mb=max_mb, progress=progress
        )
    return compared


def _folder(folder: Path, found: Runs) -> Path:
    """Make the folder of the results, which replace nothing that is read."""
    names = (CSV_FILE, MARKDOWN_FILE, LATEX_FILE, QUERIES_FILE, PAGE_FILE)
    files = [folder / name for name in names]
    check_inputs_stay(files, found.read, "name another folder for the results")
    return make_folder(folder)
