# SPDX-License-Identifier: MIT
"""Code shared by all commands: error reporting, exit status, names, and options."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from patchnetvlad.cli._names import as_typed, set_typed, typed
from patchnetvlad.cli._output import end_after_ray, safe_output
from patchnetvlad.config_ini import INTERVAL_BLOCKS, is_interval_block
from patchnetvlad.errors import ConfigError, DeviceError, PatchNetVLADError

if TYPE_CHECKING:
    from patchnetvlad.config import Config
    from patchnetvlad.pipeline.sequence import SequenceOptions

Main = Callable[..., int]


class Arguments(Protocol):
    """A parser, or a group of its options."""

    def add_argument(self, *names: str, **options: Any) -> Any:
        """Add an option."""


def command(main: Main) -> Main:
    """Turn errors of this package into a short message on stderr and exit status 2.

    Parameters
    ----------
    main : callable
        ``main(argv=None) -> int``. With ``--debug`` among its arguments, the exception is
        raised with its traceback.

    Returns
    -------
    callable
        The same function, which returns 2 after a user error and 130 when interrupted, and takes
        ``prog``, the name that the user called it by.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None, *, prog: str = "") -> int:
        words = sys.argv[1:] if argv is None else list(argv)
        name = prog or (os.path.basename(sys.argv[0]) if argv is None else typed())
        before = set_typed(name)
        try:
            with safe_output():
                status = run(words)
        finally:
            set_typed(before)
        if argv is None:
            end_after_ray(status)
        return status

    def run(words: list[str]) -> int:
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
            print(f"error: {as_typed(str(error))}", file=sys.stderr)
            return 2
        finally:
            if handler is not None:
                log.removeHandler(handler)

    return wrapper


class _Reporter(logging.Handler):
    """Prints log messages of the library between the lines of a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        # Commands that fetch print the paths of what they fetched, and nothing else.
        file = sys.stderr if record.name.startswith("patchnetvlad.assets.") else sys.stdout
        with tqdm.external_write_mode(file=file):
            say(as_typed(self.format(record)), file)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line of output immediately."""
    print(text, flush=True, file=file)


def say_next(text: str, file: TextIO | None = None) -> None:
    """Print the suggested next step."""
    say(f"next: {text}", file)


def new_parser(description: str, **options: Any) -> argparse.ArgumentParser:
    """Return a parser with the name under which the user called the command."""
    return argparse.ArgumentParser(prog=typed() or None, description=description, **options)


def add_debug_argument(parser: Arguments) -> None:
    """Add ``--debug``, which shows the traceback of an error."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_resume_argument(parser: Arguments, what: str) -> None:
    """Add ``--resume``, the default, and ``--no-resume``."""
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"resume an interrupted run (default); --no-resume {what}",
    )


def add_root_argument(parser: Arguments, lists: str = "lists") -> None:
    """Add ``--dataset_root_dir``, the folder of the images that ``lists`` name."""
    parser.add_argument(
        "--dataset_root_dir",
        default="",
        metavar="DIR",
        help=f"root folder of relative names in the {lists}",
    )


def add_list_arguments(parser: Arguments, more: str = "", *, required: bool = False) -> None:
    """Add ``--query_file_path`` and ``--index_file_path``, the image lists."""
    for what in ("query", "index"):
        parser.add_argument(
            f"--{what}_file_path",
            required=required,
            metavar="LIST",
            help=f"text file with one {what} image per line, a folder of images, or the name of a "
            f"benchmark list{more}",
        )


def add_features_arguments(parser: Arguments, *, required: bool = False) -> None:
    """Add ``--query_input_features_dir`` and ``--index_input_features_dir``."""
    for what in ("query", "index"):
        parser.add_argument(
            f"--{what}_input_features_dir",
            required=required,
            metavar="DIR",
            help=f"folder with the features of the {what} images",
        )


def add_ground_truth_argument(parser: Arguments, what: str) -> None:
    """Add ``--ground_truth_path``, positions or right answers."""
    parser.add_argument("--ground_truth_path", metavar="FILE", help=what)


def add_distance_argument(parser: Arguments, what: str) -> None:
    """Add ``--posDistThr``, the distance within which an index image is right."""
    parser.add_argument("--posDistThr", type=float, metavar="DISTANCE", help=what)


def add_interval_argument(parser: Arguments) -> None:
    """Add ``--interval_block``, what the intervals of recalls draw."""
    parser.add_argument(
        "--interval_block",
        default=None,
        metavar="auto|traverse|N",
        help="what the 95 %% intervals of recalls draw: blocks of consecutive queries, as long as "
        "neighbours are alike (auto, the default), whole traverses, or blocks of N queries; 1 "
        "takes queries as independent",
    )


def with_interval_block(config: Config, interval_block: str | None) -> Config:
    """Return the configuration with ``--interval_block``, if it was given."""
    if interval_block is None:
        return config
    if not is_interval_block(interval_block):
        raise ConfigError(f"--interval_block {interval_block} is not {INTERVAL_BLOCKS}")
    return replace(config, interval_block=interval_block)


def add_sequence_arguments(
    parser: argparse.ArgumentParser, default: int | None = None, *, live: bool = False
) -> None:
    """Add ``--sequence`` and its settings.

    ``default`` is its number of queries; ``live`` frames know neither those ahead nor a list.
    """
    given = parser.add_argument_group(
        "sequences", "neighbouring queries of a traverse help each other (docs/sequences.md)"
    )
    given.add_argument(
        "--sequence",
        type=int,
        default=default,
        metavar="N",
        help="queries that help each other, the one that is answered included "
        + ("(default: no sequences)" if default is None else f"(default: {default})"),
    )
    given.add_argument(
        "--sequence_method",
        choices=("viterbi", "posterior", "lines"),
        default="viterbi",
        help="best path of a hidden Markov model (viterbi, the default), probabilities of its "
        "states (posterior), or a constant speed, as SeqSLAM (lines)",
    )
    if not live:
        given.add_argument(
            "--ahead",
            type=int,
            default=None,
            metavar="N",
            help="how many of these queries come after the one that is answered; 0 does not look "
            "ahead (default: half of them)",
        )
    given.add_argument(
        "--speed",
        type=float,
        default=None,
        metavar="V",
        help="expected motion from one query to the next, in index images (default: "
        + ("1)" if live else "from the lists)"),
    )
    given.add_argument(
        "--traverses",
        default="auto",
        metavar="auto|names|list|FILE",
        help="traverses and order of the images: the numbers in their names, the order of the "
        "lists with a traverse a folder, a table (.csv: name, traverse, order), or "
        "records_camera.txt of kapture (default: auto, that is, names, otherwise list)",
    )
    given.add_argument(
        "--gap",
        type=float,
        default=None,
        metavar="G",
        help="cut a traverse where neighbours are further apart than this: frames, rows of the "
        "list, or the unit of time stamps",
    )


def sequence_options(arguments: argparse.Namespace) -> SequenceOptions | None:
    """Return what :func:`add_sequence_arguments` asks for; None without ``--sequence``."""
    if arguments.sequence is None:
        return None
    from patchnetvlad.pipeline.sequence import SequenceOptions

    return SequenceOptions(
        arguments.sequence,
        getattr(arguments, "ahead", 0),  # which is no option of live frames
        arguments.sequence_method,
        arguments.speed,
        arguments.traverses,
        arguments.gap,
    )


def add_feature_names_argument(parser: Arguments, what: str) -> None:
    """Add ``--feature_names``, how ``.npy`` files are named."""
    parser.add_argument("--feature_names", choices=("stem", "path"), default="stem", help=what)


def add_device_arguments(parser: Arguments) -> None:
    """Add ``--device`` and the original ``--nocuda``."""
    parser.add_argument(
        "--nocuda", action="store_true", help="compute on the CPU; the same as --device cpu"
    )
    parser.add_argument(
        "--device",
        default=None,
        metavar="auto|cpu|cuda|cuda:N|mps",
        help="device to compute on (default: auto, the fastest available)",
    )


def add_cluster_argument(parser: Arguments) -> None:
    """Add ``--cluster``, which runs the work on Ray."""
    parser.add_argument(
        "--cluster",
        default=None,
        metavar="auto|local|ADDRESS",
        help="use a Ray cluster: the one that this machine belongs to (auto), one on this machine "
        "only (local), or the one at host:port or ray://host:port; needs patchnetvlad[ray]",
    )


def add_protocol_argument(parser: Arguments, what: str) -> None:
    """Add ``--protocol``, the name of a benchmark."""
    parser.add_argument(
        "--protocol",
        default=None,
        metavar="NAME",
        help=f"a benchmark: pitts30k, tokyo247, nordland, msls-val, robotcar-v2, extended-cmu; "
        f"{what}",
    )


def add_config_argument(parser: Arguments, chosen: str = "") -> None:
    """Add ``--config_path``, a file or the name of a built-in configuration.

    ``chosen`` describes the default; if it is empty, the default is ``performance``.
    """
    parser.add_argument(
        "--config_path",
        default=None if chosen else "performance",
        metavar="FILE|NAME",
        help="an INI file, or the name of a built-in configuration: performance, speed, storage, "
        f"netvlad_extract, demo (default: {chosen or 'performance'})",
    )


def device_from_arguments(arguments: argparse.Namespace) -> str:
    """Return the device given by ``--nocuda`` and ``--device``."""
    if arguments.nocuda and arguments.device not in (None, "cpu"):
        raise DeviceError(
            f"--nocuda and --device {arguments.device} contradict each other: give one of them"
        )
    device = "cpu" if arguments.nocuda else (arguments.device or "auto")
    if not re.fullmatch("auto|cpu|mps|cuda(:[0-9]+)?", device):  # before PyTorch is loaded
        raise DeviceError(f"unknown device {device!r}; give auto, cpu, cuda, cuda:N or mps")
    return device


def load_config(path_or_name: str | None, preferred: str = "") -> Config:
    """Read a configuration; if none is given, choose one whose weights are available.

    Parameters
    ----------
    path_or_name : str or None
        As the user gave it.
    preferred : str
        Name of the built-in configuration to use for None if its weights are on this machine;
        otherwise ``demo`` is used, whose weights come with the package.

    Returns
    -------
    Config

    Raises
    ------
    ConfigError
        The configuration cannot be used.
    """
    from patchnetvlad.assets.checkpoints import find_checkpoint
    from patchnetvlad.config import Config

    if path_or_name is not None:
        return Config.load(path_or_name)
    config = Config.load(preferred)
    there = find_checkpoint(config.resume_path, config.num_pcs) is not None
    return config if there else Config.load("demo")


def say_weights(config: Config) -> None:
    """Warn if the weights were never trained for place recognition."""
    from patchnetvlad.assets.checkpoints import is_trained_for_places

    if not is_trained_for_places(config.resume_path):
        say(
            f"The weights {Path(config.resume_path).name}{config.num_pcs or ''} come with the "
            "package and were never trained for places: --config_path speed (or performance) "
            "fetches some that were, for real results"
        )
