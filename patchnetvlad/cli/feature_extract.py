# SPDX-License-Identifier: MIT
"""``patchnetvlad-feature-extract``: extract the features of an image list."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from patchnetvlad.cli._common import (
    add_cluster_argument,
    add_config_argument,
    add_debug_argument,
    add_device_arguments,
    add_feature_names_argument,
    add_protocol_argument,
    add_resume_argument,
    add_root_argument,
    command,
    device_from_arguments,
    new_parser,
    say,
    say_next,
    say_weights,
)
from patchnetvlad.cli._names import called

OUTPUT_DIR = "output_features"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Extract features as the command line says."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    device = device_from_arguments(arguments)
    given = arguments.dataset_file_path is not None
    if given == (arguments.protocol is not None) or given == (arguments.part is not None):
        parser.error("give --dataset_file_path, or --protocol and --part")
    if arguments.shard is not None:
        from patchnetvlad.features.store.share import Share

        Share.parse(arguments.shard)  # before a list is read

    from patchnetvlad.config import Config
    from patchnetvlad.datasets.image_list import ImageList

    config = Config.load(arguments.config_path)
    if arguments.protocol is not None:
        from patchnetvlad.datasets.benchmarks import Benchmark

        images = Benchmark.load(arguments.protocol).lists()[arguments.part == "index"]
    else:
        images = ImageList.read(arguments.dataset_file_path, arguments.dataset_root_dir)

    from patchnetvlad.pipeline.extract import extract

    say_weights(config)
    descriptors = extract(
        config,
        images,
        arguments.dataset_root_dir,
        arguments.output_features_dir,
        device=device,
        feature_names=arguments.feature_names,
        resume=arguments.resume,
        skip_broken=arguments.skip_broken,
        cluster=arguments.cluster,
        shard=arguments.shard,
    )
    _report(len(descriptors), arguments)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Extract the Patch-NetVLAD (or NetVLAD) features of a list or a folder of images."
    )
    add_config_argument(parser)
    parser.add_argument(
        "--dataset_file_path",
        default=None,
        metavar="LIST|DIR",
        help="text file with one image per line, a folder of images, or the name of a benchmark "
        "list, such as pitts30k_imageNames_index.txt; required without --protocol",
    )
    add_protocol_argument(parser, "with --part, instead of --dataset_file_path")
    parser.add_argument(
        "--part",
        choices=("query", "index"),
        default=None,
        help="with --protocol: which of its two lists",
    )
    add_root_argument(parser, "list")
    parser.add_argument(
        "--output_features_dir",
        default=OUTPUT_DIR,
        metavar="DIR",
        help=f"folder for the features (default: {OUTPUT_DIR})",
    )
    add_feature_names_argument(
        parser,
        "with local_features = npy: name files after the stems of the images (default, as in the "
        "research code) or after their full paths in the list",
    )
    add_resume_argument(parser, "replaces the features in the folder")
    parser.add_argument(
        "--skip_broken",
        action="store_true",
        help="finish without the images that cannot be decoded; they are listed, and no query "
        "finds them",
    )
    parser.add_argument(
        "--shard",
        default=None,
        metavar="I/N",
        help="extract only share I of N (I counts from 0), into a subfolder of DIR/shards; run one "
        "job for each I, then merge the shares with patchnetvlad store merge DIR",
    )
    add_device_arguments(parser)
    add_cluster_argument(parser)
    add_debug_argument(parser)
    return parser


def _report(num_images: int, arguments: argparse.Namespace) -> None:
    """Print what was done, and what to do next."""
    shard, output_dir = arguments.shard, arguments.output_features_dir
    if shard is not None:
        done = f"{num_images} images" if num_images else "there was nothing to do"
        say(f"Done with share {shard}: {done}. When all shares are done, run "
            f"{called('store')} merge {shlex.quote(output_dir)}")  # fmt: skip
        return
    say(f"Done. The features of {num_images} images are in {output_dir}")
    say_next(
        f"{called('match')}, when the features of queries and index images are there: "
        "--query_input_features_dir and --index_input_features_dir"
    )


if __name__ == "__main__":
    sys.exit(main())
