# SPDX-License-Identifier: MIT
"""``patchnetvlad-download-data``: download image lists, ground truth and example images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from patchnetvlad.assets.data_files import demo_images, fetch_data
from patchnetvlad.cli._common import add_debug_argument, command, new_parser


def download_data(demo: bool = False) -> list[Path]:
    """Download the published image lists, the ground truth and the example pair.

    Parameters
    ----------
    demo : bool, default False
        Whether to download the images of the demo too.

    Returns
    -------
    list of Path
        All of these files on this machine.
    """
    paths = fetch_data()
    if demo:
        paths += [path for path in demo_images().values() if path not in paths]
    return paths


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    for path in download_data(build_parser().parse_args(argv).demo):
        print(path)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Download the published image lists, the ground truth and the example pair.",
    )
    parser.add_argument("--demo", action="store_true", help="also download the images of the demo")
    add_debug_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
