# SPDX-License-Identifier: MIT
"""``patchnetvlad-sequence``: let the queries of a traverse help each other."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from patchnetvlad.cli._answers import answer_lines, recall_lines
from patchnetvlad.cli._common import (
    add_debug_argument,
    add_distance_argument,
    add_ground_truth_argument,
    add_interval_argument,
    add_sequence_arguments,
    command,
    new_parser,
    say,
    say_next,
    sequence_options,
)
from patchnetvlad.cli._names import called


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Score candidates again as the command line says."""
    arguments = build_parser().parse_args(argv)
    options = sequence_options(arguments)

    from patchnetvlad.recipes.sequence import sequence

    record = sequence(
        arguments.run,
        arguments.output,
        options,
        method=arguments.method,
        by_rank=arguments.by_rank,
        query_list=arguments.query_file_path,
        index_list=arguments.index_file_path,
        ground_truth=arguments.ground_truth_path,
        threshold=arguments.posDistThr,
        interval_block=arguments.interval_block,
    )
    for line in recall_lines(record) if record.recalls else answer_lines(record):
        say(line)
    say(f"Done. The results are in {arguments.output}")
    if os.path.isdir(arguments.run):
        both = f"{shlex.quote(arguments.run)} {shlex.quote(arguments.output)}"
        say_next(f"{called('compare')} {both} compares single images with sequences")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Let the queries of a traverse help each other: score the candidates of each query again, "
        "by how well those of its neighbours fit a motion through them. The results are those of a "
        "run, with the method Sequence after the others, for report and compare."
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a results folder of patchnetvlad match, or a file with the predictions of another "
        "method and their scores: pairs of kapture 1.1, or a table (.csv: query, index, score)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    add_sequence_arguments(parser, 10)
    parser.add_argument(
        "--method",
        choices=("NetVLAD", "PatchNetVLAD"),
        default=None,
        help="whose candidates of a results folder are scored (default: the final ones)",
    )
    parser.add_argument(
        "--by_rank",
        action="store_true",
        help="take only the order of the candidates, for files without scores, also pairs of hloc "
        "and rows (.npy)",
    )
    given = parser.add_argument_group(
        "data", "what was matched; by default what the results folder recorded"
    )
    for what in ("query", "index"):
        given.add_argument(f"--{what}_file_path", metavar="LIST", help=f"list of the {what} images")
    add_ground_truth_argument(given, "positions or right answers")
    add_distance_argument(given, "index images within this distance of a query are right")
    add_interval_argument(parser)
    add_debug_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
