# SPDX-License-Identifier: MIT
"""``patchnetvlad-feature-match``: retrieval, re-ranking, recalls."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from patchnetvlad.cli._common import (
    add_config_argument,
    add_debug_argument,
    add_device_arguments,
    add_resume_argument,
    command,
    device_from_arguments,
    say,
)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the words of the command line and match features."""
    parser = argparse.ArgumentParser(
        description="Find the index images that show the place of each query: retrieval by global "
        "descriptors, re-ranking by patches, recalls where there is ground truth."
    )
    add_config_argument(parser)
    parser.add_argument(
        "--dataset_root_dir",
        default="",
        metavar="DIR",
        help="folder that relative names in the lists lie under",
    )
    for what in ("query", "index"):
        parser.add_argument(
            f"--{what}_file_path",
            required=True,
            metavar="LIST",
            help=f"text file with one {what} image a line, or the name of a benchmark's list",
        )
    for what in ("query", "index"):
        parser.add_argument(
            f"--{what}_input_features_dir",
            required=True,
            metavar="DIR",
            help=f"folder with the features of the {what} images",
        )
    parser.add_argument(
        "--ground_truth_path",
        default=None,
        metavar="NPZ",
        help="positions of queries and index images (utmQ, utmDb, posDistThr), or the name of a "
        "benchmark's file; without it no recalls are computed",
    )
    parser.add_argument(
        "--result_save_folder",
        default="results",
        metavar="DIR",
        help="folder for predictions and recalls (default: results)",
    )
    parser.add_argument(
        "--posDistThr",
        type=float,
        default=None,
        metavar="DISTANCE",
        help="index images within this distance of a query are right, in place of the ground "
        "truth's own",
    )
    add_resume_argument(parser, "re-ranks every query again")
    add_device_arguments(parser)
    add_debug_argument(parser)
    arguments = parser.parse_args(argv)
    device = device_from_arguments(arguments)

    from patchnetvlad.evaluation.recall import format_recalls
    from patchnetvlad.pipeline import match_features

    result = match_features(
        arguments.config_path,
        arguments.query_file_path,
        arguments.index_file_path,
        arguments.query_input_features_dir,
        arguments.index_input_features_dir,
        dataset_root=arguments.dataset_root_dir,
        ground_truth=arguments.ground_truth_path,
        threshold=arguments.posDistThr,
        results_dir=arguments.result_save_folder,
        device=device,
        resume=arguments.resume,
    )
    for method, recalls in result.recalls.items():
        for line in format_recalls(method, result.n_values, recalls):
            say(f"====> {line}")
    if result.recalls:
        say(
            f"{result.num_without_positives} of {len(result.query_names)} queries have no right "
            "answer in the index; they count as missed"
        )
    else:
        say("No recalls, because no --ground_truth_path was given")
    say(f"Done. The results are in {arguments.result_save_folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
