# SPDX-License-Identifier: MIT
"""``patchnetvlad-add-pca``: add a whitening layer to a trained checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from patchnetvlad.cli._common import (
    add_debug_argument,
    add_device_arguments,
    add_root_argument,
    command,
    device_from_arguments,
    new_parser,
    say,
    say_next,
)
from patchnetvlad.encoders import DEFAULT
from patchnetvlad.errors import ConfigError

_PITTSBURGH = "pitts30k_imageNames_index.txt"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Add the layer that the command line asks for."""
    arguments = build_parser().parse_args(argv)
    device = device_from_arguments(arguments)
    if not arguments.resume_path:
        raise ConfigError("give --resume_path, the checkpoint that is to be whitened")

    from patchnetvlad.config_train import TrainConfig
    from patchnetvlad.training.fit import add_pca, find_images

    config = TrainConfig.load(arguments.config_path)
    root = arguments.dataset_root_dir
    if arguments.images:
        paths = find_images(arguments.images, root)
    elif arguments.dataset_choice == "pitts":
        paths = find_images(_PITTSBURGH, root)
    else:
        from patchnetvlad.own_data.msls import read_areas

        areas = read_areas(root, panoramas=config.panoramas)
        paths = [path for area in areas for path in area.index]
    num_pcs = config.num_pcs if arguments.num_pcs is None else arguments.num_pcs
    made = add_pca(
        arguments.resume_path,
        paths,
        config.for_images(arguments.threads),
        num_pcs,
        device=device,
        seed=config.seed,
    )
    if made.num_broken:
        say(f"{made.num_broken} images could not be read, and were passed over")
    say(f"Done. The checkpoint is {made.checkpoint}, its model card {made.card}")
    say_next(
        f"set resumePath = {Path(made.checkpoint)} and num_pcs = {num_pcs} in [global_params] of a "
        f"configuration{'' if made.encoder == DEFAULT else f', with encoder = {made.encoder}'}"
    )
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Compute a whitening layer by principal component analysis of up to 10,000 images, and "
        "write it with the checkpoint as NAME_WPCA{P}.pth.tar, next to NAME.pth.tar.",
    )
    parser.add_argument(
        "--config_path",
        default="train",
        metavar="FILE|NAME",
        help="the INI file of the training; its num_pcs is the number of components (default: "
        "train)",
    )
    parser.add_argument(
        "--resume_path", default="", metavar="FILE", help="checkpoint to whiten; it is not changed"
    )
    add_root_argument(parser, "list, or folder of Mapillary SLS that holds train_val")
    parser.add_argument(
        "--dataset_choice",
        choices=("mapillary", "pitts"),
        default="mapillary",
        help="data set whose index images are used (default: mapillary)",
    )
    parser.add_argument(
        "--images",
        default=None,
        metavar="DIR|LIST",
        help="images to use instead of --dataset_choice",
    )
    parser.add_argument(
        "--num_pcs",
        type=int,
        default=None,
        metavar="P",
        help="number of components; overrides the configuration",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="threads that decode images; 0 chooses the number (default)",
    )
    add_device_arguments(parser)
    add_debug_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
