# SPDX-License-Identifier: MIT
"""What sequences add to single images, measured on finished runs.

    python benchmarks/sequences.py results/day results/night > table.md

prints recall@1 of each run by the length of the sequence, the method, and whether it looks ahead.
Each run needs ground truth.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.evaluation.metrics import SEQUENCE
from patchnetvlad.evaluation.recall import recall_at_n
from patchnetvlad.pipeline.record import RunRecord
from patchnetvlad.pipeline.run_record import read_run
from patchnetvlad.pipeline.sequence import SequenceOptions, rank_by_sequence
from patchnetvlad.search.sequences import METHODS

LENGTHS = (3, 5, 10, 20)


def measure(record: RunRecord) -> tuple[list[list[str]], float]:
    """Return the rows of the table of a run, and the seconds of processor time a query."""
    origin = record.origin
    assert origin is not None
    assert origin.ground_truth is not None
    names = record.query_names, record.index_names
    positives = GroundTruth.load(origin.ground_truth, origin.threshold, names).positives()
    answers = {name: of for name, of in record.answers().items() if name != SEQUENCE}
    rows = []
    start, count = time.process_time(), 0
    for name, candidates in answers.items():
        single = recall_at_n(candidates, positives, [1])[0]
        for method in METHODS:
            for ahead in (0, None):
                found = []
                for length in LENGTHS:
                    options = SequenceOptions(length, ahead, method)
                    ranked = rank_by_sequence(
                        options, name, candidates, record.scores[name], *names
                    ).ranking.rows
                    found.append(recall_at_n(ranked, positives, [1])[0])
                    count += len(candidates)
                ahead_of = "half" if ahead is None else "no"
                cells = [f"{value:.3f}" for value in (single, *found)]
                rows.append([name, method, ahead_of, *cells])
    return rows, (time.process_time() - start) / count


def main() -> None:
    """Print a table for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="results folder")
    for path in parser.parse_args().runs:
        record = read_run(path)
        if record is None or record.origin is None or record.origin.ground_truth is None:
            parser.error(f"{path} is not a results folder with ground truth")
        rows, seconds = measure(record)
        counts = f"{len(record.query_names)} queries, {len(record.index_names)} index images"
        print(f"### {path.name}: {counts}, {record.retrieved.shape[1]} candidates\n")
        head = ["candidates of", "method", "looks ahead", "1 image", *map(str, LENGTHS)]
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for row in rows:
            print(f"| {' | '.join(row)} |")
        print(f"\n{1000 * np.round(seconds, 5):.2f} ms of processor time a query, on average.\n")


if __name__ == "__main__":
    main()
