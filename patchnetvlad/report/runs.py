# SPDX-License-Identifier: MIT
"""Runs that are compared: results folders, and predictions of other methods, on the same lists."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.text import shortened
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import FeatureError, ResultsError
from patchnetvlad.pipeline.record import Origin, RunRecord
from patchnetvlad.pipeline.run_record import RUN_FILE, read_run
from patchnetvlad.plots.curves import METHODS
from patchnetvlad.search.candidates import load_candidates

WAY_OUT = (
    "give a results folder of patchnetvlad-feature-match, or predictions of another method: pairs "
    "of kapture or hloc, a table (.csv) or rows (.npy)"
)


@dataclass(frozen=True, eq=False)
class Runs:
    """Several runs on the same queries and index images.

    Attributes
    ----------
    query_names, index_names : tuple of str
        Names of Q and N images.
    answers : dict of str to ndarray [Q, k] of int64
        Candidates by name of the run, best first: rows of the index list.
    truth : GroundTruth
    positives : list of Q ndarray of int64
    roots : (str, str)
        Folders that relative names of queries and of index images lie under.
    interval_block : str
        Of the first run that has a configuration, or ``auto``.
    read : tuple of Path
        Files and folders that were read.
    notes : list of str
        What is odd.
    """

    query_names: tuple[str, ...]
    index_names: tuple[str, ...]
    answers: dict[str, NDArray[np.int64]]
    truth: GroundTruth
    positives: list[NDArray[np.int64]]
    roots: tuple[str, str] = ("", "")
    interval_block: str = "auto"
    read: tuple[Path, ...] = ()
    notes: list[str] = field(default_factory=list)


def load_runs(
    runs: Mapping[str, str | Path],
    *,
    query_list: str | Path | None = None,
    index_list: str | Path | None = None,
    ground_truth: str | Path | None = None,
    threshold: float | None = None,
    dataset_root: str | Path | None = None,
    all_methods: bool = False,
) -> Runs:
    """Read runs that are to be compared.

    Parameters
    ----------
    runs : mapping of str to str or Path
        By name. A results folder gives its final answers; a single one gives those before and
        after re-ranking. A file holds candidates, see
        :func:`~patchnetvlad.search.candidates.load_candidates`.
    query_list, index_list, ground_truth, threshold, dataset_root : optional
        By default those of the first results folder that records them.
    all_methods : bool, default False
        Also compare the answers before re-ranking of several folders.

    Returns
    -------
    Runs

    Raises
    ------
    ResultsError
        A run is missing or damaged, is of other images, or lists or ground truth are unknown.
    GroundTruthError
        The ground truth cannot be read.
    ImageListError
        A list cannot be read.
    """
    if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
        raise ResultsError(f"the distance for a positive is {threshold:g}; it must be 0 or more")
    paths = {name: Path(path) for name, path in runs.items()}
    records = {name: _record(path) for name, path in paths.items()}
    known = {name: record for name, record in records.items() if record is not None}
    first = next(iter(known.values()), None)
    origin = first.origin if first is not None else None
    names = (
        _listed("query", query_list, dataset_root, None if first is None else first.query_names),
        _listed("index", index_list, dataset_root, None if first is None else first.index_names),
    )
    answers: dict[str, NDArray[np.int64]] = {}
    both = all_methods or len(runs) == 1
    for name, path in paths.items():
        found = _answers(path, records[name], names)
        for method in found if both else list(found)[-1:]:
            label = METHODS.get(method, method) if len(found) > 1 and both else ""
            answers[": ".join(filter(None, (name, label))) or path.name] = found[method]
    if len(answers) < 2:
        raise ResultsError(
            f"{next(iter(paths.values()))} has the answers of one method; give another run to "
            "compare it with"
        )
    truth, file = _truth(ground_truth, threshold, origin, names)
    read = [*paths.values(), file, *(Path(of) for of in (query_list, index_list) if of is not None)]
    return Runs(
        *names,
        answers,
        truth,
        truth.positives(),
        _roots(dataset_root, origin, query_list, index_list),
        origin.config.interval_block if origin is not None else "auto",
        tuple(read),
        _notes(known, truth),
    )


def _record(path: Path) -> RunRecord | None:
    if not os.path.exists(path):  # nor any with a name that is too long
        raise ResultsError(f"there is no {shortened(str(path), 200)}; {WAY_OUT}")
    return read_run(path) if path.is_dir() else None


def _listed(
    what: str, given: str | Path | None, root: str | Path | None, ran: tuple[str, ...] | None
) -> tuple[str, ...]:
    if given is not None:
        return ImageList.read(given, root or "").names
    if ran is None:
        raise ResultsError(
            f"the {what} list is not known, because no run has a {RUN_FILE}; give "
            f"--{what}_file_path"
        )
    return ran


def _answers(
    path: Path, record: RunRecord | None, names: tuple[tuple[str, ...], tuple[str, ...]]
) -> dict[str, NDArray[np.int64]]:
    """Return the candidates of a run by method, in order of the lists."""
    if record is not None:
        queries = _same("query", path, record.query_names, names[0])
        index = _same("index", path, record.index_names, names[1])
        rows = np.empty(len(index), dtype=np.int64)
        rows[:] = index
        order = np.argsort(queries)
        found = record.answers()
        return {method: rows[of[order]] for method, of in found.items()}
    files = {"": path}
    if path.is_dir():
        files = {method: path / f"{method}_predictions.txt" for method in METHODS}
        files = {method: file for method, file in files.items() if file.is_file()}
        if not files:
            raise ResultsError(f"{path} holds no results, such as {RUN_FILE}; {WAY_OUT}")
    try:
        return {method: load_candidates(file, *names) for method, file in files.items()}
    except FeatureError as error:
        raise ResultsError(str(error).removeprefix("pred_input_path = ")) from None


def _same(what: str, path: Path, ran: Sequence[str], wanted: Sequence[str]) -> NDArray[np.int64]:
    """Return the row in the wanted list of each image of a run; they must be the same images."""
    if tuple(ran) == tuple(wanted):
        return np.arange(len(wanted))
    where = {name: row for row, name in enumerate(wanted)}
    strange = next((name for name in ran if name not in where), None)
    if strange is None and len(ran) == len(wanted) == len(where) == len(set(ran)):
        return np.array([where[name] for name in ran])
    images = "queries" if what == "query" else "index images"
    detail = f"{strange} is none of them" if strange is not None else "some are missing or twice"
    raise ResultsError(
        f"{path} has {len(ran)} {images}, which are not the {len(wanted)} {images} of the other "
        f"runs or lists: {detail}; only runs on the same images can be compared"
    )


def _truth(
    given: str | Path | None,
    threshold: float | None,
    origin: Origin | None,
    names: tuple[tuple[str, ...], tuple[str, ...]],
) -> tuple[GroundTruth, Path]:
    ran = None if origin is None else origin.ground_truth
    source = given if given is not None else ran
    if source is None:
        raise ResultsError("no ground truth is known of these runs; give --ground_truth_path")
    if threshold is None and given is None and origin is not None:
        threshold = origin.threshold
    truth = GroundTruth.load(source, threshold, names)
    truth.check_counts(len(names[0]), len(names[1]), source)
    truth.check_unit(source)
    return truth, Path(source)


def _roots(
    given: str | Path | None,
    origin: Origin | None,
    query_list: str | Path | None,
    index_list: str | Path | None,
) -> tuple[str, str]:
    """Return the folders of relative names; a list that is a folder is its own."""
    root = str(given) if given is not None else (origin.dataset_root if origin else "")
    ran = (origin.query_list, origin.index_list) if origin else ("", "")
    lists = [str(of or was) for of, was in zip((query_list, index_list), ran, strict=True)]
    queries, index = (of if of and Path(of).is_dir() else root for of in lists)
    return queries, index


def _notes(known: Mapping[str, RunRecord], truth: GroundTruth) -> list[str]:
    """Say which runs were judged by another distance on their own."""
    notes = []
    for name, record in known.items():
        was = None if record.origin is None else record.origin.threshold
        if was is not None and truth.distance is not None and was != truth.distance:
            notes.append(
                f"{name} was judged within {was:g} when it ran, here within {truth.distance:g}."
            )
    return notes
