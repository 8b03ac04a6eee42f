# SPDX-License-Identifier: MIT
"""``patchnetvlad-compare``: compare runs on the same queries."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from patchnetvlad.cli._answers import columns
from patchnetvlad.cli._common import (
    add_debug_argument,
    add_distance_argument,
    add_ground_truth_argument,
    add_interval_argument,
    command,
    new_parser,
    say,
    say_next,
)
from patchnetvlad.errors import ResultsError


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Compare runs as the command line says."""
    arguments = build_parser().parse_args(argv)
    named = _named(arguments.runs)

    from patchnetvlad.recipes.compare import compare

    result = compare(
        named,
        arguments.output,
        query_list=arguments.query_file_path,
        index_list=arguments.index_file_path,
        ground_truth=arguments.ground_truth_path,
        threshold=arguments.posDistThr,
        dataset_root=arguments.dataset_root_dir,
        n_values=arguments.n_values,
        all_methods=arguments.all_methods,
        interval_block=arguments.interval_block,
        title=arguments.title or "",
        max_mb=arguments.max_mb,
    )
    from patchnetvlad.evaluation.comparison_files import about_comparison, comparison_table

    for line in columns(comparison_table(result)):
        say(line)
    for line in (about_comparison(result), *result.sentences()):
        say(line)
    if arguments.output is not None:
        say(f"Done. Tables and page are in {arguments.output}")
        say_next(f"open {Path(arguments.output) / 'comparison.html'} in a browser")
    return 0


def _named(runs: Sequence[str]) -> dict[str, str] | list[str]:
    """Return the runs by the names that the user gave, or as they are."""
    named = {}
    for run in runs:
        name, equals, path = run.partition("=")
        if equals and name and not os.path.exists(run):
            if name in named:
                raise ResultsError(f"two runs are called {name}; give each its own name")
            named[name] = path
    if named and len(named) < len(runs):
        raise ResultsError("only some runs have a name; give NAME=RUN for all of them, or for none")
    return named or list(runs)


def _whole_numbers(text: str) -> tuple[int, ...]:
    values = tuple(int(word) for word in text.split(","))
    if min(values) < 1:
        raise ValueError(text)
    return values


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Compare runs on the same queries: recalls with 95 % intervals, differences to the first "
        "run with intervals and McNemar's exact test, and queries won and lost. The queries of "
        "several runs may be in any order, but must be the same.".replace("%", "%%")
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="a results folder of patchnetvlad match, or a file with the predictions of another "
        "method: pairs of kapture or hloc, a table (.csv: query, index, rank or score), or rows "
        "(.npy). A single folder is compared before and after re-ranking",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for the table as CSV, Markdown and LaTeX, for the answers to each query, and "
        "for an HTML page to step through the queries on which the runs differ",
    )
    parser.add_argument(
        "--all_methods",
        action="store_true",
        help="also compare the answers before re-ranking of each folder",
    )
    parser.add_argument(
        "--n_values",
        type=_whole_numbers,
        default=(1, 5, 10),
        metavar="N,N,...",
        help="values of N for recall@N; tests are of the first (default: 1,5,10)",
    )
    add_interval_argument(parser)
    parser.add_argument("--title", help="heading of the page (default: names of the runs)")
    parser.add_argument(
        "--max_mb",
        type=float,
        default=50,
        metavar="MB",
        help="maximum size of the page; pictures are reduced to fit (default: 50)",
    )
    given = parser.add_argument_group(
        "data", "what was matched; by default what the first results folder recorded"
    )
    given.add_argument("--dataset_root_dir", metavar="DIR", help="root folder of the images")
    for what in ("query", "index"):
        given.add_argument(f"--{what}_file_path", metavar="LIST", help=f"list of the {what} images")
    add_ground_truth_argument(given, "positions or right answers")
    add_distance_argument(given, "index images within this distance of a query are right")
    add_debug_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
