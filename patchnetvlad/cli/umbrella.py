# SPDX-License-Identifier: MIT
"""``patchnetvlad``: all commands under one name."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from patchnetvlad.cli._names import COMMANDS, PROGRAM
from patchnetvlad.cli._output import end_after_ray
from patchnetvlad.version import __version__


def main(argv: Sequence[str] | None = None, *, prog: str = PROGRAM) -> int:
    """Run the command that the first word names.

    Parameters
    ----------
    argv : sequence of str, optional
        By default those of this process.
    prog : str
        How the user called the program, for its messages.

    Returns
    -------
    int
        The command's exit status.
    """
    if "_ARGCOMPLETE" in os.environ:
        _complete(prog)
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in COMMANDS:
        status: int = _module(words[0]).main(words[1:], prog=f"{prog} {words[0]}")
        if argv is None:
            end_after_ray(status)
        return status
    parser = _parser(prog)
    if words and not words[0].startswith("-"):
        near = difflib.get_close_matches(words[0], COMMANDS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(COMMANDS)}"
        parser.error(f"there is no command {words[0]!r}; {hint}")
    parser.parse_args(words or ["--help"])
    return 0


def _module(name: str) -> Any:
    return importlib.import_module(f"patchnetvlad.cli.{COMMANDS[name].module}")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Visual place recognition: find the images that show the same place.",
        epilog=f"Start with: {prog} run --index FOLDER --queries FOLDER. "
        f"{prog} COMMAND --help describes each command.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    return parser


def _complete(prog: str) -> None:
    """Answer a shell that asks how a line goes on, and end."""
    import argcomplete

    words = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split(" ")
    skipped = int(os.environ["_ARGCOMPLETE"])  # of `python -m patchnetvlad`, say
    inside = len(words) > skipped + 1 and words[skipped] in COMMANDS
    if inside:
        os.environ["_ARGCOMPLETE"] = str(skipped + 1)
    argcomplete.autocomplete(_module(words[skipped]).build_parser() if inside else _parser(prog))


if __name__ == "__main__":
    sys.exit(main())
