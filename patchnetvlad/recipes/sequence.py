# SPDX-License-Identifier: MIT
"""Sequences after the fact: from a finished run, or a file of predictions, to a run with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.assets.data_files import resolve_ground_truth
from patchnetvlad.base.arguments import checked
from patchnetvlad.base.files import check_inputs_stay, make_folder
from patchnetvlad.base.names import absolute
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import FeatureError, ResultsError
from patchnetvlad.evaluation.exports import write_csv
from patchnetvlad.evaluation.metrics import SEQUENCE, evaluate_methods
from patchnetvlad.evaluation.metrics_file import provenance
from patchnetvlad.evaluation.pairs import write_pairs
from patchnetvlad.evaluation.recall import queries_without_positives
from patchnetvlad.pipeline.outputs import result_files, write_evaluation
from patchnetvlad.pipeline.record import Origin, RunRecord
from patchnetvlad.pipeline.run_record import RUN_FILE, read_run, write_run
from patchnetvlad.pipeline.sequence import SequenceOptions, rank_by_sequence
from patchnetvlad.search.candidates import load_candidates, load_scored
from patchnetvlad.version import __version__

N_VALUES = (1, 5, 10, 20, 50, 100)
"""Of recall@N, where no run says which."""

IMPORTED = "Candidates"
"""Name of the method whose predictions a file holds."""


@checked
def sequence(
    run: str | Path,
    output: str | Path,
    options: SequenceOptions | None = None,
    *,
    method: str | None = None,
    by_rank: bool = False,
    query_list: str | Path | None = None,
    index_list: str | Path | None = None,
    ground_truth: str | Path | None = None,
    threshold: float | None = None,
    interval_block: str | None = None,
) -> RunRecord:
    """Score the candidates of a finished run again, along the traverses of its queries.

    Parameters
    ----------
    run : str or Path
        Results folder, or a file with predictions and their scores: pairs of kapture 1.1, or a
        table (.csv: query, index, score).
    output : str or Path
        Folder for the same results with those of sequences, as of a run, but for features: of a
        file, ``Sequence_predictions.txt``, ``Sequence_candidates.csv`` and, with ground truth,
        ``recalls.txt`` and ``metrics.json``.
    options : SequenceOptions, optional
        By default sequences of 10 queries.
    method : {"NetVLAD", "PatchNetVLAD"}, optional
        Whose candidates of a results folder are scored; by default its final ones.
    by_rank : bool, default False
        Take only the order of candidates, as minus the logarithm of their rank; for files without
        scores, also hloc's pairs and ``.npy``.
    query_list, index_list, ground_truth, threshold : optional
        By default those of the run; needed for a file, ground truth for recalls.
    interval_block : str, optional
        What intervals draw, see :func:`~patchnetvlad.evaluation.intervals.choose_bootstrap`; by
        default that of the run's configuration.

    Returns
    -------
    RunRecord

    Raises
    ------
    PatchNetVLADError
        The run is missing, damaged or has no scores, it does not fit the lists, traverses are not
        known, or the folder cannot be written.

    Examples
    --------
    >>> found = sequence("results/night", "results/night_10")  # doctest: +SKIP
    >>> found.recalls["Sequence"]  # doctest: +SKIP
    """
    path = Path(run)
    options = SequenceOptions() if options is None else options
    before = _read(path, query_list, index_list, by_rank)
    base, answers = _answers(path, before, method)
    rows, scores = answers[base], before.scores.get(base)
    if by_rank:
        scores = np.broadcast_to(-np.log1p(np.arange(rows.shape[1])), rows.shape)
    names = before.query_names, before.index_names
    given = _Given(ground_truth, threshold, interval_block).of_run(before.origin)
    read = [*result_files(path), path, given.ground_truth, query_list, index_list]
    check_inputs_stay(_files(Path(output)), [*read, options.traverses], "name another --output")
    found = rank_by_sequence(options, base, rows, scores, *names)
    assert found.ranking.scores is not None
    record = replace(
        before,
        sequenced=found.ranking.rows,
        scores={**before.scores, SEQUENCE: found.ranking.scores},
        sequence={**found.about, "by_rank": by_rank},
    )
    record = given.judge(record, {**answers, SEQUENCE: found.ranking.rows})
    _write(make_folder(output), path, record, given)
    return record


def _read(
    path: Path, query_list: str | Path | None, index_list: str | Path | None, by_rank: bool
) -> RunRecord:
    """Read a run, or a file as one without origin."""
    if path.is_dir():
        record = read_run(path)
        if record is None:
            raise ResultsError(
                f"{path} has no {RUN_FILE}, which says what was matched; give a results folder of "
                "patchnetvlad-feature-match, or a file of predictions"
            )
        for what, given, ran in (
            ("query", query_list, record.query_names),
            ("index", index_list, record.index_names),
        ):
            if given is not None and ImageList.read(given).names != ran:
                raise ResultsError(f"the {what} list {given} is not the one of {path}")
        return record
    if not path.exists():
        raise ResultsError(
            f"there is no {path}; give a results folder of patchnetvlad-feature-match, or a file "
            "of predictions"
        )
    if query_list is None or index_list is None:
        raise ResultsError(f"{path} is a file; give --query_file_path and --index_file_path")
    names = ImageList.read(query_list).names, ImageList.read(index_list).names
    try:
        if by_rank:
            rows, scores = load_candidates(path, *names), {}
        else:
            rows, found = load_scored(path, *names)
            scores = {IMPORTED: found}
    except FeatureError as error:
        raise ResultsError(str(error).removeprefix("pred_input_path = ")) from None
    n_values = tuple(n for n in N_VALUES if n <= rows.shape[1])
    return RunRecord(*names, rows, None, None, n_values, {}, 0, scores)


def _answers(
    path: Path, record: RunRecord, given: str | None
) -> tuple[str, dict[str, NDArray[np.int64]]]:
    """Return the method whose candidates are scored, and those of all methods before."""
    if record.origin is None:
        answers = {IMPORTED: record.retrieved}
    else:
        answers = {name: of for name, of in record.answers().items() if name != SEQUENCE}
    if given is not None and given not in answers:
        raise ResultsError(f"{path} has no answers of {given!r}, but of {', '.join(answers)}")
    return given or list(answers)[-1], answers


@dataclass(frozen=True)
class _Given:
    """How answers are evaluated."""

    ground_truth: str | Path | None
    threshold: float | None
    interval_block: str | None

    def of_run(self, origin: Origin | None) -> _Given:
        """Return this with what a run says in place of what the user left open."""
        if origin is None:
            return self
        block = self.interval_block or origin.config.interval_block
        if self.ground_truth is not None:
            return replace(self, interval_block=block)
        threshold = origin.threshold if self.threshold is None else self.threshold
        return _Given(origin.ground_truth, threshold, block)

    def judge(self, record: RunRecord, answers: dict[str, NDArray[np.int64]]) -> RunRecord:
        """Return the record with metrics, if there is ground truth."""
        if self.ground_truth is None:
            return record
        names = record.query_names, record.index_names
        truth = GroundTruth.load(self.ground_truth, self.threshold, names)
        truth.check_counts(len(names[0]), len(names[1]), self.ground_truth)
        truth.check_unit(self.ground_truth)
        positives = truth.positives()
        metrics = evaluate_methods(
            answers,
            positives,
            record.n_values,
            record.scores,
            interval_block=self.interval_block or "auto",
            query_names=names[0],
        )
        origin = record.origin
        if origin is not None:
            file = absolute(resolve_ground_truth(self.ground_truth))
            origin = replace(origin, ground_truth=file, threshold=truth.distance)
        return replace(
            record,
            metrics=metrics,
            recalls={name: of.recalls for name, of in metrics.items()},
            num_without_positives=queries_without_positives(positives),
            origin=origin,
        )


def _files(folder: Path) -> list[Path]:
    return [*result_files(folder), folder / f"{SEQUENCE}_candidates.csv"]


def _write(folder: Path, path: Path, record: RunRecord, given: _Given) -> None:
    """Write the results, ``run.json`` last; those of an earlier call go."""
    for file in _files(folder):
        file.unlink(missing_ok=True)
    names = record.query_names, record.index_names
    origin = record.origin
    of_run = record.answers() if origin is not None else {SEQUENCE: record.final}
    for method, rows in of_run.items():
        write_pairs(folder / f"{method}_predictions.txt", *names, rows)
    scores = record.scores[SEQUENCE]
    write_csv(folder / f"{SEQUENCE}_candidates.csv", *names, record.final, scores=scores)
    if record.metrics:
        about = _of_file(path, record, given) if origin is None else _of_run(record, origin)
        write_evaluation(folder, record, {**about, "sequence": record.sequence})
    if origin is not None:
        write_run(folder, record)


def _of_run(record: RunRecord, origin: Origin) -> dict[str, Any]:
    """Return the provenance of the metrics of a run."""
    lists = [
        ImageList(Path(file), names, tuple(range(1, len(names) + 1)))
        for file, names in (
            (origin.query_list, record.query_names),
            (origin.index_list, record.index_names),
        )
    ]
    return provenance(
        replace(origin.config, predictions_path=origin.candidates),
        *lists,
        ground_truth=origin.ground_truth,
        threshold=origin.threshold,
        checkpoint=origin.checkpoint,
        extra={
            "protocol": origin.protocol,
            "citation": record.citation or None,
            "candidates": origin.candidates,
        },
    )


def _of_file(path: Path, record: RunRecord, given: _Given) -> dict[str, Any]:
    """Return the provenance of the metrics of a file of predictions."""
    return {
        "version": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "candidates": path.name,
        "queries": {"images": len(record.query_names)},
        "index": {"images": len(record.index_names)},
        "ground_truth": {"file": Path(str(given.ground_truth)).name, "threshold": given.threshold},
    }
