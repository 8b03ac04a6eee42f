# SPDX-License-Identifier: MIT
"""``patchnetvlad-calibrate-confidence``: fit how likely answers are right."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from patchnetvlad.cli._answers import columns
from patchnetvlad.cli._common import add_debug_argument, command, new_parser, say, say_next
from patchnetvlad.errors import ResultsError


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Fit confidences as the command line says."""
    arguments = build_parser().parse_args(argv)
    named = [_named(run) for run in arguments.runs]

    from patchnetvlad.recipes.confidence import calibrate_confidence

    found = calibrate_confidence(
        [path for _, path in named],
        arguments.output,
        names=[name for name, _ in named],
    )
    quality = found.fitted_on["methods"]
    groups = next(iter(quality.values()))["groups_left_out"]
    say(f"In cross-validation, which leaves out each of {groups} groups of queries in turn:")
    table = [
        ["", "queries", "right", "ECE", "AURC", "AURC by distance", "recall at 100 % precision"]
    ]
    for method, of in quality.items():
        numbers = ("expected_calibration_error", "aurc", "aurc_of_distance",
                   "recall_at_full_precision")  # fmt: skip
        table.append([method, str(of["queries"]), str(of["right"])])
        table[-1] += [f"{of[name]:.3f}" for name in numbers]
    for line in columns(table):
        say(line)
    say(f"Done. The confidences are in {arguments.output}")
    say_next(f"confidence = {arguments.output} in [feature_match] uses them")
    return 0


def _named(run: str) -> tuple[str, str]:
    """Return the name and the folder of a run."""
    name, equals, path = run.partition("=")
    if equals and name and not os.path.exists(run):
        return name, path
    base = os.path.basename(os.path.abspath(run))
    if not base:
        raise ResultsError(f"{run} is no folder of results")
    return base, run


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Fit how likely the first answer to a query is right, before and after re-ranking, to runs "
        "with ground truth, and say how good these confidences are in cross-validation."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="results folders of patchnetvlad match with ground truth, all of the same weights and "
        "settings; names are kept in the file",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="file to write (.json), which the key confidence of a configuration may name",
    )
    add_debug_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
