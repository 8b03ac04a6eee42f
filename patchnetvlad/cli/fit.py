# SPDX-License-Identifier: MIT
"""``patchnetvlad-fit``: compute a vocabulary and whitening from images, without training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from patchnetvlad.cli._common import (
    add_config_argument,
    add_debug_argument,
    add_device_arguments,
    add_root_argument,
    command,
    device_from_arguments,
    new_parser,
    say,
    say_next,
)
from patchnetvlad.encoders import DEFAULT, ENCODERS


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Make the checkpoint that the command line asks for."""
    arguments = build_parser().parse_args(argv)

    from patchnetvlad.training.fit import fit

    made = fit(
        arguments.images,
        arguments.output,
        encoder=arguments.encoder,
        num_clusters=arguments.num_clusters,
        num_pcs=arguments.num_pcs,
        config=arguments.config_path,
        dataset_root=arguments.dataset_root_dir,
        num_images=arguments.num_images,
        vladv2=arguments.vladv2,
        half=arguments.half,
        random=arguments.random,
        validation=_validation(arguments),
        distance=arguments.valdistthr,
        device=device_from_arguments(arguments),
        seed=arguments.seed,
    )
    if made.num_broken:
        say(f"{made.num_broken} images could not be read, and were passed over")
    if made.recalls:
        shown = ", ".join(f"{n}: {recall:.4f}" for n, recall in made.recalls.items())
        say(f"NetVLAD recall@N of these images among each other: {shown}")
    say(f"Done. The checkpoint is {made.checkpoint}, its model card {made.card}")
    more = [", with vladv2 = True"] if arguments.vladv2 else []
    more += [] if made.encoder == DEFAULT else [f", with encoder = {made.encoder}"]
    say_next(
        f"set resumePath = {made.checkpoint} and num_pcs = {arguments.num_pcs} in [global_params] "
        f"of a configuration{''.join(more)}"
    )
    return 0


def _validation(arguments: argparse.Namespace) -> list[Any]:
    """Return what recalls are computed of: the images among each other, if their place is known."""
    if arguments.positions is None:
        return []
    from patchnetvlad.own_data.areas import read_own_images

    return [read_own_images(arguments.images, arguments.positions, arguments.dataset_root_dir)]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Make a checkpoint from the weights of an encoder and a set of images: compute a "
        "vocabulary by k-means and a whitening layer by PCA, without training.",
    )
    parser.add_argument(
        "--images",
        required=True,
        metavar="DIR|LIST",
        help="a folder of images, or a text file with one image per line",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="checkpoint to write, .pth.tar or .safetensors; its model card is written next to it",
    )
    parser.add_argument(
        "--encoder",
        default=None,
        metavar="NAME|FILE",
        help=f"encoder to use, with its published weights, which are downloaded "
        f"({', '.join(name for name in ENCODERS if name != DEFAULT)}); or a checkpoint, or a file "
        "of such weights or torchvision's of VGG16 (default: the bundled checkpoint)",
    )
    for name, default, text in (
        ("num_clusters", 64, "clusters of the vocabulary; 0 keeps the vocabulary of --encoder"),
        ("num_pcs", 128, "principal components, fewer than there are images; 0: no whitening"),
        ("num_images", 10_000, "maximum number of images for whitening"),
        ("seed", 0, "seed for the choice of images and cells"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--positions",
        default=None,
        metavar="SOURCE",
        help="positions of the images, as for patchnetvlad train: also compute the recalls of the "
        "images among each other",
    )
    parser.add_argument(
        "--valdistthr",
        type=float,
        default=25.0,
        metavar="DISTANCE",
        help="with --positions, images within this distance are right (default: 25)",
    )
    parser.add_argument("--vladv2", action="store_true", help="give the soft assignment a bias")
    parser.add_argument("--half", action="store_true", help="store float16, in half the space")
    parser.add_argument(
        "--random",
        action="store_true",
        help="give the encoder random weights, to try things where none can be downloaded; the "
        "checkpoint recognises nothing",
    )
    add_config_argument(parser)
    add_root_argument(parser, "list")
    add_device_arguments(parser)
    add_debug_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
