# SPDX-License-Identifier: MIT
"""``patchnetvlad-report``: one HTML file to look at the results of matching."""

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
        "Write one HTML file that shows the results of matching: "
        "recalls, curves, a map, and every query with its candidates, their scores and the patches "
        "that matched. It opens in a browser from the disk and loads nothing.",
    )
    parser.add_argument(
        "results_dir", metavar="RESULTS_DIR", help="the --result_save_folder of patchnetvlad match"
    )
    parser.add_argument(
        "--output", metavar="HTML", help="file to write (default: report.html in RESULTS_DIR)"
    )
    parser.add_argument("--title", help="heading of the page (default: the folder's name)")
    parser.add_argument(
        "--max_mb",
        type=float,
        default=50,
        metavar="MB",
        help="largest size of the file; pictures are made to fit (default: 50)",
    )
    parser.add_argument(
        "--candidates",
        type=int,
        default=5,
        metavar="K",
        help="candidates shown of each query, before and after re-ranking (default: 5)",
    )
    parser.add_argument(
        "--matches",
        type=int,
        default=200,
        metavar="N",
        help="queries whose matched patches are drawn, rescued, hurt and wrong ones first "
        "(default: 200)",
    )
    moved = parser.add_argument_group(
        "data that moved",
        "in place of what the run wrote down, with the names of patchnetvlad match",
    )
    moved.add_argument("--config_path", metavar="FILE|NAME", help="the configuration")
    moved.add_argument("--dataset_root_dir", metavar="DIR", help="folder of the images")
    for what in ("query", "index"):
        moved.add_argument(f"--{what}_file_path", metavar="LIST", help=f"list of the {what} images")
    for what in ("query", "index"):
        moved.add_argument(
            f"--{what}_input_features_dir", metavar="DIR", help=f"features of the {what} images"
        )
    add_ground_truth_argument(moved, "positions")
    add_distance_argument(moved, "images this near are right")
    add_device_arguments(parser)
    add_debug_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
