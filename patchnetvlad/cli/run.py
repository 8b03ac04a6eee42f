# SPDX-License-Identifier: MIT
"""``patchnetvlad run``: from two folders of images to answers and a report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from patchnetvlad.cli._answers import answer_lines, recall_lines, selection_lines
from patchnetvlad.cli._common import (
    add_config_argument,
    add_debug_argument,
    add_device_arguments,
    add_distance_argument,
    add_resume_argument,
    add_root_argument,
    add_sequence_arguments,
    command,
    device_from_arguments,
    load_config,
    new_parser,
    say,
    say_next,
    say_weights,
    sequence_options,
)

OUTPUT_DIR = "patchnetvlad_run"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages as the command line says."""
    arguments = build_parser().parse_args(argv)
    device = device_from_arguments(arguments)

    from patchnetvlad.assets.data_files import resolve_ground_truth
    from patchnetvlad.datasets.image_list import ImageList

    config = load_config(arguments.config_path, preferred="speed")
    config.check_matching()
    sequence = sequence_options(arguments)
    root = arguments.dataset_root_dir
    index, queries = (ImageList.read(of, root) for of in (arguments.index, arguments.queries))
    truth = arguments.ground_truth
    truth = None if truth is None else resolve_ground_truth(truth)

    from patchnetvlad.recipes.run import run

    say(
        f"{len(index)} index images, {len(queries)} queries; configuration "
        f"{Path(config.source).stem}"
    )
    say_weights(config)
    found = run(
        config,
        index,
        queries,
        arguments.output,
        dataset_root=root,
        ground_truth=truth,
        positions=arguments.positions,
        threshold=arguments.posDistThr,
        sequence=sequence,
        device=device,
        resume=arguments.resume,
    )
    for line in ("", *answer_lines(found.record, found.positives), ""):
        say(line)
    for line in (*recall_lines(found.record), *selection_lines(found.record)):
        say(line)
    say(f"Done. All answers are in {found.folder}")
    say_next(f"open {found.report} in a browser")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Find the index images that show the same places as the queries. Lists the images, "
        "extracts features, retrieves and re-ranks candidates, computes recalls if positions are "
        "known, and writes a report. If you run the command again, it does only what is new."
    )
    for option, what in (("index", "index images"), ("queries", "queries")):
        parser.add_argument(
            f"--{option}",
            required=True,
            metavar="DIR|LIST",
            help=f"the {what}: a folder with its subfolders, or a text file with one image per "
            "line",
        )
    parser.add_argument(
        "--output",
        default=OUTPUT_DIR,
        metavar="DIR",
        help=f"folder for answers, report and features (default: {OUTPUT_DIR})",
    )
    add_config_argument(parser, "speed if its weights are on this machine, otherwise demo")
    add_root_argument(parser)
    parser.add_argument(
        "--ground_truth",
        default=None,
        metavar="FILE",
        help="right answers: positions (.npz), pairs by name (.csv: query, right image) or lists "
        "of rows (.npy)",
    )
    parser.add_argument(
        "--positions",
        default="auto",
        metavar="SOURCE|FILE",
        help="without --ground_truth: source of the positions, as in patchnetvlad dataset create "
        "(default: auto, that is, file names, otherwise EXIF)",
    )
    add_distance_argument(
        parser,
        "index images within this distance of a query are right (default: 25 m, or 2 frames)",
    )
    add_sequence_arguments(parser)
    add_resume_argument(parser, "starts from scratch")
    add_device_arguments(parser)
    add_debug_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
