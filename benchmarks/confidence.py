# SPDX-License-Identifier: MIT
"""How good confidences are on runs, with each group of queries left out, and what ``auto`` saves.

    python benchmarks/confidence.py [--whole] RUN RUN ...

Each run is a results folder with ground truth, of one checkpoint and one setting, in which all
queries were re-ranked. Its queries are left out by folder (floors, days) or traverse, or by fifths
of a single traverse; with ``--whole``, single traverses as a whole.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.evaluation.calibration import area_under_risk_coverage, measure_calibration
from patchnetvlad.evaluation.confidence_fit import Answers, split_groups
from patchnetvlad.pipeline.record import RunRecord
from patchnetvlad.pipeline.run_record import read_run
from patchnetvlad.pipeline.selection import is_kept
from patchnetvlad.recipes.confidence import answers_of, joined_answers

METHODS = ("NetVLAD", "PatchNetVLAD")
SURE = (0.8, 0.9, 0.95, 0.99)


def main() -> None:
    """Print a table for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--whole", action="store_true", help="leave out single traverses whole")
    arguments = parser.parse_args()
    records = [loaded(folder) for folder in arguments.runs]
    answers = [of for _, of in records]
    held_out = {}
    for method in METHODS:
        parts = [of[method] for of in answers]
        if not arguments.whole:
            parts = [replace(part, groups=split_groups(part.groups)) for part in parts]
        joined = joined_answers(parts)
        print(method, joined.quality())
        held_out[method] = np.split(joined.held_out, np.cumsum([len(p.right) for p in parts])[:-1])
    for i, (folder, (record, of)) in enumerate(zip(arguments.runs, records, strict=True)):
        print(f"\n{folder}: {len(record.query_names)} queries")
        describe(record, of, {method: held_out[method][i] for method in METHODS})


def loaded(folder: Path) -> tuple[RunRecord, dict[str, Answers]]:
    """Read a run and its answers."""
    record = read_run(folder)
    if record is None or record.origin is None or record.origin.ground_truth is None:
        raise SystemExit(f"{folder} is not the results folder of a run with ground truth")
    names = record.query_names, record.index_names
    truth = GroundTruth.load(record.origin.ground_truth, record.origin.threshold, names)
    return record, answers_of(record, truth.positives(), folder)


def describe(
    record: RunRecord, of: dict[str, Answers], sure: dict[str, NDArray[np.float64]]
) -> None:
    """Print how good confidences of a run are, and what ``rerank = auto`` would do with them."""
    for method in METHODS:
        found = measure_calibration(sure[method], of[method].right)
        by_distance = area_under_risk_coverage(-of[method].distances, of[method].right)
        print(
            f"  {method}: R@1 {of[method].right.mean():.4f}, ECE {found.expected_error:.3f}, AURC "
            f"{found.aurc:.4f}, by distance {by_distance:.4f}; ECE of ideal confidences "
            f"{ideal_error(sure[method]):.3f}"
        )
    assert record.reranked is not None
    before, after = (sure[method] for method in METHODS)
    right = [of[method].right for method in METHODS]
    first = (record.retrieved == record.reranked[:, :1]).argmax(axis=1)
    for least in SURE:
        chosen = before < least
        stays = ~chosen | is_kept(before, after, first)
        answered = np.where(stays, right[0], right[1])
        found = measure_calibration(np.where(stays, before, after), answered)
        print(
            f"  sure = {least}: {chosen.mean():.1%} re-ranked, {(stays & chosen).sum()} kept, R@1 "
            f"{answered.mean():.4f} (always {right[1].mean():.4f}), ECE "
            f"{found.expected_error:.3f}, AURC {found.aurc:.4f}"
        )


def ideal_error(sure: NDArray[np.float64], times: int = 1000) -> float:
    """Return the mean ECE where each confidence is exact: what chance alone makes of it."""
    random = np.random.default_rng(0)
    draws = (random.random(len(sure)) < sure for _ in range(times))
    return float(np.mean([measure_calibration(sure, right).expected_error for right in draws]))


if __name__ == "__main__":
    main()
