# SPDX-License-Identifier: MIT
"""``patchnetvlad completion``: what a shell needs to complete commands and options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from patchnetvlad.cli._common import command, new_parser, say
from patchnetvlad.cli._names import PROGRAM


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Print what lets a shell complete commands and options.",
        epilog=f'bash, zsh: eval "$({PROGRAM} completion bash)" in ~/.bashrc, or with zsh in '
        f"~/.zshrc after compinit. fish: {PROGRAM} completion fish > "
        f"~/.config/fish/completions/{PROGRAM}.fish",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the code for the shell."""
    arguments = build_parser().parse_args(argv)

    import argcomplete

    say(argcomplete.shellcode([PROGRAM], shell=arguments.shell))
    return 0
