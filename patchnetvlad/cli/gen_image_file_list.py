# SPDX-License-Identifier: MIT
"""``python -m patchnetvlad.tools.gen_image_file_list``: write an image list of a folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from patchnetvlad.cli._common import add_debug_argument, command, say


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the list that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m patchnetvlad.tools.gen_image_file_list",
        description="List the images of a folder, in natural order (2 before 10).",
    )
    parser.add_argument("--dataset_root_dir", required=True, metavar="DIR", help="folder of images")
    parser.add_argument("--out_file", required=True, metavar="LIST", help="text file to write")
    parser.add_argument("--recursive", action="store_true", help="include subfolders")
    add_debug_argument(parser)
    arguments = parser.parse_args(argv)

    from patchnetvlad.datasets.image_list import write_image_list

    names = write_image_list(arguments.dataset_root_dir, arguments.out_file, arguments.recursive)
    say(f"{arguments.out_file}: {len(names)} images")
    return 0
