# SPDX-License-Identifier: MIT
"""``patchnetvlad-export``: write the network as an ONNX file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from patchnetvlad.cli._common import (
    add_config_argument,
    add_debug_argument,
    command,
    load_config,
    new_parser,
    say,
    say_weights,
)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Export as the command line says."""
    arguments = build_parser().parse_args(argv)
    config = load_config(arguments.config_path, preferred="performance")
    say_weights(config)

    from patchnetvlad.recipes.export import export

    made = export(
        config,
        arguments.output,
        matcher=arguments.matcher,
        uint8=arguments.uint8,
        resize=arguments.resize,
        int8=arguments.int8,
    )
    image = "[N, 3, H, W], normalised"
    if arguments.uint8 or arguments.resize:
        image = "[N, H, W, 3] of uint8, RGB" + (", of any size" if arguments.resize else "")
    checked = (
        ""
        if made.difference is None
        else (f"; ONNX Runtime and PyTorch differ by {made.difference:.0e} at most")
    )
    say(f"Done. The network is {made.network}: image {image}{checked}")
    if made.cosine is not None:
        say(f"Its encoder computes in int8: cosine of descriptors {made.cosine:.4f} (median)")
    if made.matcher is not None:
        say(f"The matcher of two images is {made.matcher}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Write the network as one file, for ONNX Runtime, TensorRT, OpenVINO or torch.export: from "
        "images to global descriptors, patch descriptors and key points."
    )
    add_config_argument(parser, "performance if its weights are on this machine, otherwise demo")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="file to write, .onnx or .pt2"
    )
    parser.add_argument(
        "--matcher",
        default=None,
        metavar="FILE",
        help="also write the matcher of two images: mutual nearest neighbours and rapid spatial "
        "scoring",
    )
    parser.add_argument(
        "--uint8",
        action="store_true",
        help="take images [N, H, W, 3] of uint8, RGB, instead of normalised ones [N, 3, H, W]",
    )
    parser.add_argument(
        "--resize",
        action="store_true",
        help="take such images of any size, and resize them to that of the configuration",
    )
    parser.add_argument(
        "--int8",
        default=None,
        metavar="DIR|LIST",
        help="let VGG16 compute in int8, for CPUs; ranges are taken from these images, a few dozen "
        "as the camera takes them",
    )
    add_debug_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
