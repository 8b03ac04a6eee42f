# SPDX-License-Identifier: MIT
"""Outputs of matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.base.files import check_inputs_stay, make_folder, replace_text
from patchnetvlad.base.names import is_remote
from patchnetvlad.engines.journal import Journal, open_journal
from patchnetvlad.evaluation.exports import (
    EXPORTS,
    candidate_distances,
    check_exports,
    export_path,
    write_exports,
)
from patchnetvlad.evaluation.metrics import METHODS, SEQUENCE
from patchnetvlad.evaluation.metrics_file import provenance, write_metrics
from patchnetvlad.evaluation.pairs import write_pairs
from patchnetvlad.evaluation.poses import Pose, read_reference_poses
from patchnetvlad.evaluation.recall import format_recalls
from patchnetvlad.features.manifest import GLOBAL_FILE, INDEX_FILE, MANIFEST_FILE
from patchnetvlad.pipeline.inputs import MatchInputs
from patchnetvlad.pipeline.record import Ranking, RunRecord
from patchnetvlad.pipeline.run_record import RUN_FILES, write_run
from patchnetvlad.search.index_file import SIDECAR


@dataclass(eq=False)
class Outputs:
    """The results folder of a run, and writing to it; writes nothing without a folder.

    Attributes
    ----------
    inputs : MatchInputs
    folder : Path or None
    exports : sequence of str
        Keys of :data:`~patchnetvlad.evaluation.exports.EXPORTS`.
    poses : mapping of str to Pose or None
        Of index images, for the exports that need them.
    journal : Journal or None
        Of the queries that are re-ranked.
    """

    inputs: MatchInputs
    folder: Path | None
    exports: Sequence[str]
    poses: Mapping[str, Pose] | None
    journal: Journal | None = field(default=None, init=False)

    def remove_earlier(self) -> None:
        """Delete results of an earlier run, which must not be mistaken for this one's."""
        for file in _left_by_earlier(self.folder) if self.folder is not None else ():
            file.unlink(missing_ok=True)

    def open_journal(
        self, retrieved: NDArray[np.int64], device: torch.device, resume: bool
    ) -> Journal | None:
        """Open the journal of re-ranking the candidates [Q, k] ``retrieved``."""
        if self.folder is not None:
            given = self.inputs
            self.journal = open_journal(
                self.folder, given.config, retrieved, given.readers, given.names, device, resume
            )
        return self.journal

    def write_predictions(self, ranking: Ranking) -> None:
        """Write the candidates of a method as pairs, and in the formats of the exports."""
        if self.folder is None:
            return
        names, truth, positives = self.inputs.names, self.inputs.truth, self.inputs.positives
        write_pairs(self.folder / f"{ranking.method}_predictions.txt", *names, ranking.rows)
        away = right = None
        if truth is not None and positives is not None and "csv" in self.exports:
            if truth.distance is not None:
                away = candidate_distances(truth.utm_queries, truth.utm_index, ranking.rows)
            pairs = zip(ranking.rows, positives, strict=True)
            right = np.array([np.isin(*both) for both in pairs])
        for export in dict.fromkeys(self.exports):
            write_exports(
                self.folder,
                ranking.method,
                [export],
                *names,
                ranking.rows,
                scores=ranking.ordering if export == "kapture11" else ranking.scores,
                distances=away,
                right=right,
                confidences=ranking.confidences,
                poses=self.poses,
            )

    def write_record(self, record: RunRecord) -> None:
        """Write recalls, metrics and, last, the record of the run; then delete the journal."""
        if self.folder is None:
            return
        given = self.inputs
        if given.truth is not None:
            about = provenance(
                replace(given.config, predictions_path=given.candidates_file),  # what it comes to
                *given.images,
                ground_truth=given.ground_truth,
                threshold=given.threshold,
                checkpoint=given.checkpoint or None,
                extra={
                    "protocol": given.protocol,
                    "citation": record.citation or None,
                    "candidates": given.candidates_file,
                    **({} if record.selection is None else {"reranking": asdict(record.selection)}),
                },
            )
            write_evaluation(self.folder, record, about)
        write_run(self.folder, record)
        if self.journal is not None:
            self.journal.remove()


def write_evaluation(folder: Path, record: RunRecord, about: Mapping[str, Any]) -> None:
    """Write ``recalls.txt`` and ``metrics.json``.

    Parameters
    ----------
    folder : Path
        Must exist.
    record : RunRecord
        With metrics.
    about : mapping
        From :func:`~patchnetvlad.evaluation.metrics_file.provenance`.

    Raises
    ------
    OutputError
        A file cannot be written.
    """
    lines = [
        f"{line}\n"
        for method, values in record.recalls.items()
        for line in format_recalls(method, record.n_values, values)
    ]
    replace_text(folder / "recalls.txt", lines)
    write_metrics(folder / "metrics.json", record.metrics, about)


def result_files(folder: Path) -> list[Path]:
    """Return the files that a run with this folder of results may write or delete."""
    predictions = [folder / f"{method}_predictions.txt" for method in METHODS]
    return [*_left_by_earlier(folder), *predictions]


def _left_by_earlier(folder: Path) -> list[Path]:
    """Return the files that not every run writes, of all that a run may write."""
    files = [folder / name for name in ("recalls.txt", "metrics.json", "report.html", *RUN_FILES)]
    files.append(folder / f"{SEQUENCE}_predictions.txt")
    return files + [export_path(folder, method, name) for method in METHODS for name in EXPORTS]


def _check_inputs_stay(
    inputs: MatchInputs, folder: Path | None, more: Sequence[str | Path]
) -> None:
    """Raise OutputError if one of the results is what the run reads."""
    config = inputs.config
    written = [] if folder is None else result_files(folder)
    if config.faiss_index_path is not None:
        file = Path(config.faiss_index_path)
        written += [file, file.with_name(file.name + SIDECAR)]
    read: list[str | Path | None] = [config.source, inputs.ground_truth, inputs.candidates_file]
    read += [] if config.confidence in ("auto", "none") else [config.confidence]
    read += [*more, *(images.path for images in inputs.images)]
    read += [feature for of in inputs.features if not is_remote(of) for feature in _files_of(of)]
    way_out = "name another folder for the results, or copy it elsewhere"
    check_inputs_stay(written, read, way_out)


def _files_of(folder: str | Path) -> list[Path]:
    """List the files of features that concern all images."""
    return [Path(folder, name) for name in (GLOBAL_FILE, INDEX_FILE, MANIFEST_FILE)]


def open_outputs(
    inputs: MatchInputs,
    results_dir: str | Path | None,
    exports: Sequence[str],
    reference_poses: Sequence[str | Path],
    traverses: str | Path | None = None,
) -> Outputs:
    """Check that the exports can be written, and prepare the results folder.

    Parameters
    ----------
    inputs : MatchInputs
    results_dir, exports, reference_poses
        As for :func:`~patchnetvlad.pipeline.match.rerank`.
    traverses : str or Path, optional
        Read for sequences.

    Returns
    -------
    Outputs
        From whose folder the results of an earlier run are gone.

    Raises
    ------
    PatchNetVLADError
        An export cannot be written, poses cannot be read, the folder cannot be made, or what would
        be written or deleted there is read.
    """
    poses = read_reference_poses(reference_poses) if reference_poses else None
    check_exports(exports, *inputs.names, poses)
    folder = make_folder(results_dir) if results_dir is not None else None
    more = reference_poses if traverses is None else [*reference_poses, traverses]
    _check_inputs_stay(inputs, folder, more)
    outputs = Outputs(inputs, folder, exports, poses)
    outputs.remove_earlier()
    return outputs
