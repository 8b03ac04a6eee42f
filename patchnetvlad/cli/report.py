# SPDX-License-Identifier: MIT
"""``patchnetvlad-report``: write the results of matching as one HTML file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from patchnetvlad.cli._common import (
    add_debug_argument,
    add_device_arguments,
    add_distance_argument,
    add_ground_truth_argument,
    command,
    device_from_arguments,
    new_parser,
    say,
    say_next,
)
from patchnetvlad.errors import ResultsError


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the report that the command line asks for."""
    arguments = build_parser().parse_args(argv)
    device = device_from_arguments(arguments)

    if not Path(arguments.results_dir).is_dir():
        raise ResultsError(
            f"there is no folder {arguments.results_dir}; give the --result_save_folder of "
            "patchnetvlad-feature-match"
        )

    from patchnetvlad.report.write import write_report

    file = write_report(
        arguments.results_dir,
        arguments.output,
        title=arguments.title,
        max_mb=arguments.max_mb,
        candidates=arguments.candidates,
        matches=arguments.matches,
        config=arguments.config_path,
        query_list=arguments.query_file_path,
        index_list=arguments.index_file_path,
        query_features=arguments.query_input_features_dir,
        index_features=arguments.index_input_features_dir,
        dataset_root=arguments.dataset_root_dir,
        ground_truth=arguments.ground_truth_path,
        threshold=arguments.posDistThr,
        device=device,
    )
    say(f"Done. The report is {file}")
    say_next(f"open {file} in a browser")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Write a single HTML file that shows the results of matching: recalls, curves, a map, and "
        "every query with its candidates, their scores and matched patches. Any browser opens it "
        "from disk; it loads nothing else.",
    )
    parser.add_argument(
        "results_dir", metavar="RESULTS_DIR", help="the --result_save_folder of patchnetvlad match"
    )
    parser.add_argument(
        "--output", metavar="HTML", help="file to write (default: report.html in RESULTS_DIR)"
    )
    parser.add_argument("--title", help="heading of the page (default: name of the folder)")
    parser.add_argument(
        "--max_mb",
        type=float,
        default=50,
        metavar="MB",
        help="maximum size of the file; pictures are reduced to fit (default: 50)",
    )
    parser.add_argument(
        "--candidates",
        type=int,
        default=5,
        metavar="K",
        help="candidates to show per query, before and after re-ranking (default: 5)",
    )
    parser.add_argument(
        "--matches",
        type=int,
        default=200,
        metavar="N",
        help="maximum number of queries with matched patches; rescued, hurt and wrong ones come "
        "first (default: 200)",
    )
    moved = parser.add_argument_group(
        "data that moved",
        "override what the run recorded, with the options of patchnetvlad match",
    )
    moved.add_argument("--config_path", metavar="FILE|NAME", help="the configuration")
    moved.add_argument("--dataset_root_dir", metavar="DIR", help="root folder of the images")
    for what in ("query", "index"):
        moved.add_argument(f"--{what}_file_path", metavar="LIST", help=f"list of the {what} images")
    for what in ("query", "index"):
        moved.add_argument(
            f"--{what}_input_features_dir", metavar="DIR", help=f"features of the {what} images"
        )
    add_ground_truth_argument(moved, "positions or right answers")
    add_distance_argument(moved, "index images within this distance of a query are right")
    add_device_arguments(parser)
    add_debug_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
