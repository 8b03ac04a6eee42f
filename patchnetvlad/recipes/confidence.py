# SPDX-License-Identifier: MIT
"""Fitting confidences: from runs with ground truth to a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.arguments import checked, shown
from patchnetvlad.base.files import check_inputs_stay
from patchnetvlad.config import Config
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.errors import ArgumentError, ResultsError
from patchnetvlad.evaluation.confidence import Confidence, settings_of, weights_name
from patchnetvlad.evaluation.confidence_fit import (
    Answers,
    fit_logistic,
    groups_of,
    split_groups,
)
from patchnetvlad.evaluation.metrics import by_method
from patchnetvlad.evaluation.recall import first_right
from patchnetvlad.evaluation.signals import reranking_signals, retrieval_signals
from patchnetvlad.matching.fusion import raw_scores
from patchnetvlad.pipeline.record import Origin, RunRecord
from patchnetvlad.pipeline.run_record import RUN_FILES, read_run

LEAST = 10
"""Queries that a fit needs."""


@checked
def calibrate_confidence(
    runs: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    names: Sequence[str] | None = None,
) -> Confidence:
    """Fit how likely the first answers to queries are right, before and after re-ranking.

    Parameters
    ----------
    runs : str or Path, or sequence of such
        Results folders of ``feature_match`` with ground truth, of one checkpoint and one setting of
        matching. Queries without a right answer in the index teach what "I do not know" looks like.
    output : str or Path, optional
        File to write, which ``confidence`` of a configuration may name.
    names : sequence of str, optional
        Of the data, one per run, for the file; by default the names of the folders.

    Returns
    -------
    Confidence
        Its ``fitted_on`` has, per method, the quality in cross-validation: of each group of queries
        (folders or traverses of the lists, or five parts of a single one) when it is left out.

    Raises
    ------
    ResultsError
        A run is missing, damaged, without ground truth or distances, of other weights or settings
        than the first, or all answers are right, or all wrong.
    GroundTruthError
        The ground truth of a run is gone, or has changed.
    OutputError
        The file cannot be written, or is one that is read.

    Examples
    --------
    >>> found = calibrate_confidence(["run/day", "run/night"], "mine.json")  # doctest: +SKIP
    >>> found.fitted_on["methods"]["PatchNetVLAD"]["expected_calibration_error"]  # doctest: +SKIP
    0.03
    """
    if isinstance(runs, bytes):  # a sequence, if not of paths
        raise ArgumentError(f"runs = {shown(runs)} are not paths")
    folders = [Path(run) for run in ([runs] if isinstance(runs, (str, Path)) else runs)]
    if not folders:
        raise ArgumentError("no runs are given")
    if names is not None and len(names) != len(folders):
        raise ArgumentError(f"{len(names)} names for {len(folders)} runs")
    read = [_read(folder) for folder in folders]
    first = read[0]
    for folder, run in zip(folders[1:], read[1:], strict=True):
        _check_same(folders[0], first.origin, folder, run.origin)
    check_inputs_stay(
        [] if output is None else [Path(output)],
        [
            *(folder / name for folder in folders for name in RUN_FILES),
            *(run.origin.ground_truth for run in read),
        ],
        "name another file for the confidences",
    )
    methods = [name for name in first.answers if all(name in run.answers for run in read)]
    joined = {name: joined_answers([run.answers[name] for run in read]) for name in methods}
    for name, of in joined.items():
        if of.right.all() or not of.right.any() or len(of.right) < LEAST:
            raise ResultsError(
                f"{folders[0]}: {int(of.right.sum())} of {len(of.right)} answers of {name} are "
                f"right; a fit needs {LEAST} queries, right and wrong ones: give more runs"
            )
    found = Confidence(
        {name: fit_logistic(of.signals, of.right) for name, of in joined.items()},
        {"name": weights_name(first.config), "sha256": first.origin.checkpoint or ""},
        settings_of(first.config),
        {
            "data": [
                _about(name, run)
                for name, run in zip(
                    [folder.resolve().name for folder in folders] if names is None else names,
                    read,
                    strict=True,
                )
            ],
            "methods": {name: of.quality() for name, of in joined.items()},
        },
        "the confidences" if output is None else str(output),
    )
    if output is not None:
        found.save(output)
    return found


@dataclass(frozen=True, eq=False)
class _Run:
    """A run that is fitted to, and its answers by method."""

    origin: Origin
    answers: dict[str, Answers]

    @property
    def config(self) -> Config:
        return self.origin.config


def _read(folder: Path) -> _Run:
    if not folder.is_dir():
        raise ResultsError(f"there is no folder {folder}; give a results folder of feature_match")
    record = read_run(folder)
    if record is None or record.origin is None:
        raise ResultsError(
            f"{folder} has no run.json; give a results folder of feature_match whose run has ended"
        )
    origin = record.origin
    if origin.ground_truth is None:
        raise ResultsError(
            f"{folder} was run without ground truth, so right and wrong are not known; run "
            "feature_match again with --ground_truth_path"
        )
    truth = GroundTruth.load(
        origin.ground_truth, origin.threshold, (record.query_names, record.index_names)
    )
    truth.check_counts(len(record.query_names), len(record.index_names), origin.ground_truth)
    return _Run(origin, answers_of(record, truth.positives(), folder))


def answers_of(
    record: RunRecord, positives: Sequence[NDArray[np.int64]], source: str | Path = "the run"
) -> dict[str, Answers]:
    """Return the first answers of a run, with their signals, by method.

    Parameters
    ----------
    record : RunRecord
    positives : sequence of Q ndarray of int64
        Rows of the right index images.
    source : str or Path
        Named in messages.

    Returns
    -------
    dict of str to Answers

    Raises
    ------
    ResultsError
        The run has no distances, or did not re-rank all queries.
    """
    if "NetVLAD" not in record.scores:
        raise ResultsError(
            f"{source} has the candidates of another method, and no distances; run feature_match "
            "without --candidates"
        )
    if record.was_reranked is not None and not record.was_reranked.all():
        raise ResultsError(
            f"{source} did not re-rank all queries; run feature_match with rerank = always"
        )
    distances = -record.scores["NetVLAD"]
    signals = {"NetVLAD": retrieval_signals(distances)}
    if record.reranked is not None and record.patch_scores is not None and record.origin:
        raw = raw_scores(record.patch_scores, record.origin.config.patch_weights)
        first = (record.retrieved == record.reranked[:, :1]).argmax(axis=1)
        signals["PatchNetVLAD"] = reranking_signals(raw, first)
    lists = "" if record.origin is None else record.origin.query_list
    groups = [f"{lists} {group}" for group in groups_of(record.query_names)]
    answerable = np.array([len(right) > 0 for right in positives], dtype=bool)
    answers = by_method(record.retrieved, record.reranked)
    return {
        name: Answers(
            of, first_right(answers[name], positives) == 0, answerable, distances[:, 0], groups
        )
        for name, of in signals.items()
    }


def joined_answers(parts: Sequence[Answers]) -> Answers:
    """Join the answers of runs; a single traverse is split, see :func:`split_groups`."""
    signals, right, answerable, distances = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("signals", "right", "answerable", "distances")
    )
    groups = split_groups([group for part in parts for group in part.groups])
    return Answers(signals, right, answerable, distances, groups)


def _check_same(ours: Path, first: Origin, theirs: Path, other: Origin) -> None:
    if first.checkpoint != other.checkpoint:
        raise ResultsError(
            f"{ours} and {theirs} are of different weights ({first.checkpoint} and "
            f"{other.checkpoint}); fit each alone"
        )
    mine, yours = settings_of(first.config), settings_of(other.config)
    for name, value in mine.items():
        if yours[name] != value:
            raise ResultsError(
                f"{ours} and {theirs} differ in {name} ({value} and {yours[name]}); fit each alone"
            )


def _about(name: str, run: _Run) -> dict[str, Any]:
    """Say what a run was of, without folders."""
    of = run.answers["NetVLAD"]
    return {
        "name": name,
        "queries": len(of.right),
        "without_right_answer": int((~of.answerable).sum()),
        "right_by_method": {method: int(a.right.sum()) for method, a in run.answers.items()},
        "threshold": run.origin.threshold,
        "ransac": run.config.ransac,
        "date": run.origin.date,
    }
