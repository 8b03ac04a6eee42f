# SPDX-License-Identifier: MIT
"""``patchnetvlad-feature-match``: retrieval, re-ranking, recalls."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchnetvlad.cli._common import (
    add_cluster_argument,
    add_config_argument,
    add_debug_argument,
    add_device_arguments,
    add_distance_argument,
    add_features_arguments,
    add_ground_truth_argument,
    add_list_arguments,
    add_protocol_argument,
    add_resume_argument,
    add_root_argument,
    command,
    device_from_arguments,
    say,
)

if TYPE_CHECKING:
    from patchnetvlad.pipeline.result import RerankResult

EXPORT_NAMES = ("kapture10", "kapture11", "hloc", "msls", "robotcar", "cmu", "csv")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Match features as the command line says."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    device = device_from_arguments(arguments)
    if arguments.protocol is None:
        for what in ("query", "index"):
            if getattr(arguments, f"{what}_file_path") is None:
                parser.error(f"--{what}_file_path is needed, or --protocol")

    from patchnetvlad.pipeline.match import rerank

    result = rerank(
        arguments.config_path,
        arguments.query_file_path,
        arguments.index_file_path,
        arguments.query_input_features_dir,
        arguments.index_input_features_dir,
        dataset_root=arguments.dataset_root_dir,
        ground_truth=arguments.ground_truth_path,
        threshold=arguments.posDistThr,
        results_dir=arguments.result_save_folder,
        protocol=arguments.protocol,
        candidates=arguments.candidates,
        exports=arguments.export,
        reference_poses=arguments.reference_poses,
        device=device,
        resume=arguments.resume,
        cluster=arguments.cluster,
    )
    _report(result, arguments.protocol)
    say(f"Done. The results are in {arguments.result_save_folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Find the index images that show the place of each query: retrieval by global "
        "descriptors, re-ranking by patches, recalls where there is ground truth."
    )
    add_config_argument(parser)
    add_root_argument(parser)
    add_list_arguments(parser, "; needed without --protocol")
    add_features_arguments(parser, required=True)
    add_ground_truth_argument(
        parser,
        "positions of queries and index images (utmQ, utmDb, posDistThr), or the name of a "
        "benchmark's file; without it no recalls are computed",
    )
    parser.add_argument(
        "--result_save_folder",
        default="results",
        metavar="DIR",
        help="folder for predictions and recalls (default: results)",
    )
    add_distance_argument(
        parser,
        "index images within this distance of a query are right, in place of the ground "
        "truth's own",
    )
    add_protocol_argument(
        parser,
        "lists, ground truth, distance, and what is searched together are the benchmark's, and "
        "its counts are asserted",
    )
    _add_exchange(parser)
    add_resume_argument(parser, "re-ranks every query again")
    add_device_arguments(parser)
    add_cluster_argument(parser)
    add_debug_argument(parser)
    return parser


def _add_exchange(parser: argparse.ArgumentParser) -> None:
    """Add what is read from, and written for, other programs."""
    parser.add_argument(
        "--candidates",
        default=None,
        metavar="FILE",
        help="re-rank the candidates of another method: pairs of hloc or kapture, or .npy; in "
        "place of pred_input_path",
    )
    parser.add_argument(
        "--export",
        action="append",
        choices=EXPORT_NAMES,
        default=[],
        metavar="FORMAT",
        help=f"write the predictions in another format, too: {', '.join(EXPORT_NAMES)}; can be "
        "given several times",
    )
    parser.add_argument(
        "--reference_poses",
        nargs="+",
        default=[],
        metavar="FILE",
        help="poses of the index images, for --export robotcar and cmu",
    )


def _report(result: RerankResult, protocol: str | None) -> None:
    """Print the recalls, or why there are none."""
    from patchnetvlad.evaluation.recall import format_recalls

    for method, recalls in result.recalls.items():
        for line in format_recalls(method, result.n_values, recalls):
            say(f"====> {line}")
    if result.recalls:
        say(
            f"{result.num_without_positives} of {len(result.query_names)} queries have no right "
            "answer in the index; they count as missed"
        )
    elif protocol is None:
        say("No recalls, because no --ground_truth_path was given")
    if result.citation:
        say(result.citation)


if __name__ == "__main__":
    sys.exit(main())
