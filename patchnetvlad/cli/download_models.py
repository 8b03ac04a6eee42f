# SPDX-License-Identifier: MIT
"""``patchnetvlad-download-models``: download the released checkpoints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from patchnetvlad.assets.catalog import CHECKPOINTS, RELEASED_CHECKPOINTS
from patchnetvlad.assets.checkpoints import DownloadDeclined, ask, download_checkpoint
from patchnetvlad.assets.folders import find_asset
from patchnetvlad.cli._common import add_debug_argument, command, new_parser, say_next
from patchnetvlad.cli._names import called


def download_models(
    models: Sequence[str] | None = None, ask_for_permission: bool = False
) -> list[Path]:
    """Download the released checkpoints that are not on this machine yet.

    Parameters
    ----------
    models : sequence of str, optional
        Names such as ``"mapillary_WPCA512"``; all six by default.
    ask_for_permission : bool, default False
        Whether to ask before each download, naming its size.

    Returns
    -------
    list of Path
        The checkpoints on this machine, without those that were declined.
    """
    paths = []
    for model in models or RELEASED_CHECKPOINTS:
        name = model.removesuffix(".pth.tar") + ".pth.tar"
        there = find_asset(f"{CHECKPOINTS}/{name}") is not None
        try:
            paths.append(download_checkpoint(name, confirm=ask if ask_for_permission else None))
        except DownloadDeclined:
            print(f"{name}: not downloaded")
        else:
            print(f"{name}: {'already there' if there else 'downloaded'}, {paths[-1]}")
    return paths


def download_all_models(ask_for_permission: bool = False) -> list[Path]:
    """Download all released checkpoints, as :func:`download_models` does."""
    return download_models(ask_for_permission=ask_for_permission)


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = build_parser().parse_args(argv)
    download_models(arguments.names + arguments.models, arguments.ask_for_permission)
    words = "--index FOLDER --queries FOLDER --config_path performance"
    say_next(f"{called('run')} {words}", sys.stderr)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Download the released checkpoints that are not on this machine yet.",
        epilog=f"Names: {', '.join(RELEASED_CHECKPOINTS)} (.pth.tar is optional).",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="checkpoints (default: all)")
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="NAME", help="the same, as an option"
    )
    parser.add_argument(
        "--ask_for_permission", action="store_true", help="ask before each download"
    )
    add_debug_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
