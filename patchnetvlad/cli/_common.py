# SPDX-License-Identifier: MIT
"""What all commands share: error reporting, exit status, and the device option."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from patchnetvlad.errors import DeviceError, PatchNetVLADError

Main = Callable[..., int]


def command(main: Main) -> Main:
    """Turn the package's errors into a short message on stderr and exit status 2.

    Parameters
    ----------
    main : callable
        ``main(argv=None) -> int``. With ``--debug`` among its arguments the exception is
        raised as it is, with its traceback.

    Returns
    -------
    callable
        The same function, which returns 2 after an error of the user's, 130 when interrupted.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> int:
        words = sys.argv[1:] if argv is None else list(argv)
        log = logging.getLogger("patchnetvlad")
        handler = None
        if not any(isinstance(other, _Reporter) for other in log.handlers):
            handler = _Reporter()  # not for a command within a command
            log.addHandler(handler)
            log.setLevel(logging.INFO)
        try:
            return main(words)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except (PatchNetVLADError, OSError) as error:
            if "--debug" in words:
                raise
            print(f"error: {error}", file=sys.stderr)
            return 2
        finally:
            if handler is not None:
                log.removeHandler(handler)

    return wrapper


class _Reporter(logging.Handler):
    """Shows what the library reports in passing, between the lines of a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        # Commands that fetch print the paths of what they fetched, and nothing else.
        file = sys.stderr if record.name.startswith("patchnetvlad.assets.") else sys.stdout
        with tqdm.external_write_mode(file=file):
            say(self.format(record), file)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line of output at once; the work goes on when nobody reads it any more."""
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True, file=file)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def default_output_dir(name: str) -> Path:
    """Return a folder in the package's own, as originally, or one here if that is read-only."""
    from patchnetvlad.assets.folders import PACKAGE_DIR

    return PACKAGE_DIR / name if os.access(PACKAGE_DIR, os.W_OK) else Path(name)


def add_debug_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--debug``, which shows the traceback of an error."""
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback when something fails"
    )


def add_resume_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--resume``, the default, and ``--no-resume``."""
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"go on where an interrupted run stopped (default); --no-resume {what}",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and the original ``--nocuda``."""
    parser.add_argument(
        "--nocuda", action="store_true", help="compute on the CPU; the same as --device cpu"
    )
    parser.add_argument(
        "--device",
        default=None,
        metavar="auto|cpu|cuda|cuda:N|mps",
        help="where to compute (default: auto, the best that is there)",
    )


def add_cluster_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--cluster``, which lets Ray do the work."""
    parser.add_argument(
        "--cluster",
        default=None,
        metavar="auto|local|ADDRESS",
        help="do the work on a Ray cluster: the one that this machine belongs to (auto), this "
        "machine alone (local), or that at host:port or ray://host:port; needs "
        "patchnetvlad[ray]",
    )


def add_protocol_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--protocol``, the name of a benchmark."""
    parser.add_argument(
        "--protocol",
        default=None,
        metavar="NAME",
        help=f"a benchmark: pitts30k, tokyo247, nordland, msls-val, robotcar-v2, extended-cmu; "
        f"{what}",
    )


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--config_path``, a file or the name of a shipped configuration."""
    parser.add_argument(
        "--config_path",
        default="performance",
        metavar="FILE|NAME",
        help="an INI file, or the name of a shipped one: performance (default), speed, storage, "
        "netvlad_extract, demo",
    )


def device_from_arguments(arguments: argparse.Namespace) -> str:
    """Return the device that ``--nocuda`` and ``--device`` ask for together."""
    if arguments.nocuda and arguments.device not in (None, "cpu"):
        raise DeviceError(
            f"--nocuda and --device {arguments.device} contradict each other: give one of them"
        )
    return "cpu" if arguments.nocuda else (arguments.device or "auto")
