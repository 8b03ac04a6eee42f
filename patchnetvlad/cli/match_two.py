# SPDX-License-Identifier: MIT
"""``patchnetvlad-match-two``: compare two images and draw their matches."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from patchnetvlad.cli._common import (
    add_config_argument,
    add_debug_argument,
    add_device_arguments,
    command,
    device_from_arguments,
    load_config,
    new_parser,
    say,
    say_next,
    say_weights,
)
from patchnetvlad.cli._names import called
from patchnetvlad.errors import ImageError

PLOT_FILE = "patchMatchings.png"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Match two images as the command line says."""
    arguments = build_parser().parse_args(argv)
    device = device_from_arguments(arguments)

    from patchnetvlad.assets.data_files import example_image
    from patchnetvlad.base.files import check_inputs_stay, make_folder

    config = load_config(arguments.config_path, preferred="performance")
    first = arguments.first_im_path or example_image("tokyo_db.png")
    second = arguments.second_im_path or example_image("tokyo_query.jpg")
    for path in (first, second):
        if not Path(path).exists():
            raise ImageError(f"{path} is missing")
    plot = make_folder(arguments.plot_save_path) / PLOT_FILE
    check_inputs_stay([plot], [first, second, config.source])

    from patchnetvlad.datasets.images import native_size
    from patchnetvlad.places.match import match
    from patchnetvlad.places.model import load_model
    from patchnetvlad.places.usual import agreement
    from patchnetvlad.plots.drawing import save_figure
    from patchnetvlad.plots.spread import MAX_LINES

    for path in (first, second):
        native_size(path)  # can it be read? Before a model is loaded
    say_weights(config)
    model = load_model(replace(config, image_size=config.match_image_size), device=device)
    found = match(*model.describe([first, second]), device=model.device)
    say(
        f"Similarity score between the two images is: {found.score:.5f}. "
        "Larger scores indicate better matches."
    )
    say(agreement(found))
    save_figure(found.plot(max_lines=None if arguments.all_lines else MAX_LINES), plot)
    say(f"The matches are drawn in {plot}")
    say_next(f"{called('run')} --index FOLDER --queries FOLDER looks for many images among many")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Match the patches of two images, print their similarity, and draw the matches."
    )
    add_config_argument(parser, "performance if its weights are on this machine, otherwise demo")
    for what, example in (("first", "tokyo_db.png"), ("second", "tokyo_query.jpg")):
        parser.add_argument(
            f"--{what}_im_path",
            default=None,
            metavar="IMAGE",
            help=f"the {what} image (default: the example {example}, downloaded on first use)",
        )
    parser.add_argument(
        "--plot_save_path",
        default="results",
        metavar="DIR",
        help=f"folder for {PLOT_FILE} (default: results)",
    )
    parser.add_argument(
        "--all_lines",
        action="store_true",
        help="draw every match (default: 15 that are far apart)",
    )
    add_device_arguments(parser)
    add_debug_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
