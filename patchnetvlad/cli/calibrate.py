# SPDX-License-Identifier: MIT
"""``patchnetvlad calibrate``: measure the ranges of values that ``precision = int8`` needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from patchnetvlad.cli._common import (
    add_config_argument,
    add_debug_argument,
    add_device_arguments,
    add_root_argument,
    command,
    device_from_arguments,
    load_config,
    new_parser,
    say,
    say_next,
)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate as the command line says."""
    arguments = build_parser().parse_args(argv)
    device = device_from_arguments(arguments)
    config = load_config(arguments.config_path, preferred="performance")

    from patchnetvlad.recipes.calibrate import calibrate

    made = calibrate(
        config, arguments.images, dataset_root=arguments.dataset_root_dir, device=device
    )
    say(f"Done. The ranges of values on {made.images} images are {made.file}")
    say_next(f"set precision = int8 in [global_params] of {config.source}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Measure on images which values occur in the network, for precision = int8, and write them "
        "beside the checkpoint as NAME.int8.json. The weights that come with the package need it "
        "not."
    )
    add_config_argument(parser, "performance if its weights are on this machine, otherwise demo")
    parser.add_argument(
        "--images",
        required=True,
        metavar="DIR|LIST",
        help="folder or list of images such as will be extracted, of which 100 are taken at most",
    )
    add_root_argument(parser, "list")
    add_device_arguments(parser)
    add_debug_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
