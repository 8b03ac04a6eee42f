# SPDX-License-Identifier: MIT
"""``patchnetvlad-feature-match``: retrieve, re-rank, compute recalls."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchnetvlad.cli._answers import answer_lines, recall_lines, selection_lines
from patchnetvlad.cli._common import (
    add_cluster_argument,
    add_config_argument,
    add_debug_argument,
    add_device_arguments,
    add_distance_argument,
    add_features_arguments,
    add_ground_truth_argument,
    add_interval_argument,
    add_list_arguments,
    add_protocol_argument,
    add_resume_argument,
    add_root_argument,
    add_sequence_arguments,
    command,
    device_from_arguments,
    new_parser,
    say,
    say_next,
    say_weights,
    sequence_options,
    with_interval_block,
)
from patchnetvlad.cli._names import called

if TYPE_CHECKING:
    from patchnetvlad.pipeline.result import RerankResult

EXPORT_NAMES = ("kapture10", "kapture11", "hloc", "msls", "robotcar", "cmu", "csv")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Match features as the command line says."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    device = device_from_arguments(arguments)
    if arguments.protocol is None:
        for what in ("query", "index"):
            if getattr(arguments, f"{what}_file_path") is None:
                parser.error(f"--{what}_file_path is needed, or --protocol")

    from patchnetvlad.assets.data_files import resolve_ground_truth
    from patchnetvlad.config import Config
    from patchnetvlad.datasets.image_list import ImageList

    config = with_interval_block(Config.load(arguments.config_path), arguments.interval_block)
    config.check_matching()
    sequence = sequence_options(arguments)
    queries, index = (
        None if given is None else ImageList.read(given, arguments.dataset_root_dir)
        for given in (arguments.query_file_path, arguments.index_file_path)
    )
    if arguments.ground_truth_path is not None:
        resolve_ground_truth(arguments.ground_truth_path)

    from patchnetvlad.pipeline.match import rerank

    say_weights(config)
    result = rerank(
        config,
        queries,
        index,
        arguments.query_input_features_dir,
        arguments.index_input_features_dir,
        dataset_root=arguments.dataset_root_dir,
        ground_truth=arguments.ground_truth_path,
        threshold=arguments.posDistThr,
        results_dir=arguments.result_save_folder,
        protocol=arguments.protocol,
        candidates=arguments.candidates,
        sequence=sequence,
        exports=arguments.export,
        reference_poses=arguments.reference_poses,
        device=device,
        resume=arguments.resume,
        cluster=arguments.cluster,
    )
    _report(result)
    folder = arguments.result_save_folder
    say(f"Done. The results are in {folder}")
    say_next(f"{called('report')} {shlex.quote(folder)} makes a page of them, with matched patches")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Find the index images that show the same place as each query: retrieve candidates by "
        "global descriptors, re-rank them by patches, and compute recalls if there is ground truth."
    )
    add_config_argument(parser)
    add_root_argument(parser)
    add_list_arguments(parser, "; required without --protocol")
    add_features_arguments(parser, required=True)
    add_ground_truth_argument(
        parser,
        "positions of queries and index images (.npz with utmQ, utmDb, posDistThr), right answers "
        "by name (.csv: query, right image) or row (.npy), or the name of a benchmark file; "
        "without it, no recalls are computed",
    )
    parser.add_argument(
        "--result_save_folder",
        default="results",
        metavar="DIR",
        help="folder for predictions and recalls (default: results)",
    )
    add_distance_argument(
        parser,
        "index images within this distance of a query are right; overrides the ground truth",
    )
    add_protocol_argument(
        parser,
        "sets the lists, the ground truth, the distance and what is searched together, and checks "
        "the counts",
    )
    add_interval_argument(parser)
    add_sequence_arguments(parser)
    _add_exchange(parser)
    add_resume_argument(parser, "re-ranks every query again")
    add_device_arguments(parser)
    add_cluster_argument(parser)
    add_debug_argument(parser)
    return parser


def _add_exchange(parser: argparse.ArgumentParser) -> None:
    """Add options to exchange files with other programs."""
    parser.add_argument(
        "--candidates",
        default=None,
        metavar="FILE",
        help="re-rank the candidates of another method: hloc or kapture pairs, or .npy; overrides "
        "pred_input_path",
    )
    parser.add_argument(
        "--export",
        action="append",
        choices=EXPORT_NAMES,
        default=[],
        metavar="FORMAT",
        help=f"also write the predictions in this format: {', '.join(EXPORT_NAMES)}; can be given "
        "several times",
    )
    parser.add_argument(
        "--reference_poses",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files with poses of the index images, for --export robotcar and cmu",
    )


def _report(result: RerankResult) -> None:
    """Print the recalls or, without ground truth, the first answers."""
    lines = recall_lines(result) if result.recalls else answer_lines(result)
    for line in (*lines, *selection_lines(result)):
        say(line)
    if result.citation:
        say(result.citation)


if __name__ == "__main__":
    sys.exit(main())
