# SPDX-License-Identifier: MIT
"""``patchnetvlad completion``: shell completion of commands and options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from patchnetvlad.cli._common import command, new_parser, say
from patchnetvlad.cli._names import PROGRAM


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Print shell code that completes commands and options.",
        epilog=f'bash: put eval "$({PROGRAM} completion bash)" into ~/.bashrc. zsh: put the same '
        f"with zsh into ~/.zshrc, after compinit. fish: run {PROGRAM} completion fish > "
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
