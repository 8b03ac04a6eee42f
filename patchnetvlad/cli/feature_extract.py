# SPDX-License-Identifier: MIT
"""``patchnetvlad-feature-extract``: the features of an image list."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

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
    default_output_dir,
    device_from_arguments,
    say,
)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Extract features as the command line says."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    device = device_from_arguments(arguments)
    given = arguments.dataset_file_path is not None
    if given == (arguments.protocol is not None) or given == (arguments.part is not None):
        parser.error("give --dataset_file_path, or --protocol and --part")

    from patchnetvlad.pipeline.extract import extract

    images = arguments.dataset_file_path
    if arguments.protocol is not None:
        from patchnetvlad.datasets.benchmarks import Benchmark

        images = Benchmark.load(arguments.protocol).lists()[arguments.part == "index"]
    output_dir = arguments.output_features_dir or default_output_dir("output_features")
    descriptors = extract(
        arguments.config_path,
        images,
        arguments.dataset_root_dir,
        output_dir,
        device=device,
        feature_names=arguments.feature_names,
        resume=arguments.resume,
        cluster=arguments.cluster,
        shard=arguments.shard,
    )
    _report(len(descriptors), arguments.shard, output_dir)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Extract the Patch-NetVLAD (or NetVLAD) features of a list of images."
    )
    add_config_argument(parser)
    parser.add_argument(
        "--dataset_file_path",
        default=None,
        metavar="LIST",
        help="text file with one image a line, or the name of a benchmark's list, such as "
        "pitts30k_imageNames_index.txt; needed without --protocol",
    )
    add_protocol_argument(parser, "with --part, in place of --dataset_file_path")
    parser.add_argument(
        "--part",
        choices=("query", "index"),
        default=None,
        help="with --protocol: which of its lists",
    )
    add_root_argument(parser, "list")
    parser.add_argument(
        "--output_features_dir",
        default=None,
        metavar="DIR",
        help="folder for the features (default: output_features in the package's folder)",
    )
    add_feature_names_argument(
        parser,
        "with local_features = npy: name files by the images' stems (default, as the research "
        "code does) or by their whole paths in the list",
    )
    add_resume_argument(parser, "replaces the features that are in the folder")
    parser.add_argument(
        "--shard",
        default=None,
        metavar="I/N",
        help="extract only share I, from 0, of N, to a folder of its own in DIR/shards; N jobs "
        "that differ only in I do all, and patchnetvlad-store merge DIR puts these together",
    )
    add_device_arguments(parser)
    add_cluster_argument(parser)
    add_debug_argument(parser)
    return parser


def _report(num_images: int, shard: str | None, output_dir: str | Path) -> None:
    """Print what is done, and what to do next."""
    if shard is None:
        say(f"Done. The features of {num_images} images are in {output_dir}")
    elif not num_images:
        say(f"Done with share {shard}: there was nothing to do")
    else:
        say(
            f"Done with share {shard}: {num_images} images. When all shares are "
            f"done, run patchnetvlad-store merge {output_dir}"
        )


if __name__ == "__main__":
    sys.exit(main())
