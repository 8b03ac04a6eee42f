# SPDX-License-Identifier: MIT
"""The commands by name, and the name under which the user called them."""

from __future__ import annotations

import re
from dataclasses import dataclass

PROGRAM = "patchnetvlad"


@dataclass(frozen=True)
class Command:
    """A command of the program.

    Attributes
    ----------
    module : str
        In ``patchnetvlad.cli``; it has ``build_parser()`` and ``main(argv, prog=...)``.
    help : str
        One line.
    alone : str
        What follows ``patchnetvlad-`` in its name as a program of its own; empty for none.
    """

    module: str
    help: str
    alone: str = ""


COMMANDS = {
    "run": Command("run", "from two folders of images to answers and a report, in one step"),
    "extract": Command(
        "feature_extract", "extract the features of a list or folder", "feature-extract"
    ),
    "match": Command("feature_match", "retrieve, re-rank, evaluate", "feature-match"),
    "match-two": Command("match_two", "compare two images and draw their matches", "match-two"),
    "report": Command("report", "write the results as an HTML page", "report"),
    "compare": Command("compare", "compare runs on the same queries, with error bars", "compare"),
    "sequence": Command(
        "sequence", "let the queries of a traverse help each other, after a run", "sequence"
    ),
    "calibrate-confidence": Command(
        "calibrate_confidence", "fit how likely answers are right", "calibrate-confidence"
    ),
    "live": Command(
        "match_realtime",
        "recognise places in a camera stream, a video or a folder",
        "match-realtime",
    ),
    "dataset": Command("dataset", "make lists and ground truth from your own images", "dataset"),
    "store": Command("store", "inspect, check, convert and merge features", "store"),
    "fit": Command("fit", "make weights from your own images, without training", "fit"),
    "train": Command("train", "train on Mapillary SLS or on your own images", "train"),
    "add-pca": Command("add_pca", "add a whitening layer to a trained checkpoint", "add-pca"),
    "export": Command("export", "write the network as an ONNX file", "export"),
    "calibrate": Command("calibrate", "measure the ranges of values that precision = int8 needs"),
    "demo": Command("demo", "recognise five places among ten images", "demo"),
    "download-models": Command(
        "download_models", "download the released weights", "download-models"
    ),
    "download-data": Command(
        "download_data", "download benchmark lists and examples", "download-data"
    ),
    "completion": Command("completion", "turn on completion in bash, zsh or fish"),
}

_ALONE = {command.alone: name for name, command in COMMANDS.items() if command.alone}
_typed = ""


def set_typed(name: str) -> str:
    """Note the name that the user called a command by, empty for none; return the one before."""
    global _typed
    before, _typed = _typed, name
    return before


def typed() -> str:
    """Return the name that the user called the command by; empty where a program called it."""
    return _typed


def called(name: str) -> str:
    """Return how to call a command, in the way in which the user called this one.

    Parameters
    ----------
    name : str
        A key of ``COMMANDS``.

    Returns
    -------
    str
        Such as ``patchnetvlad extract`` or ``patchnetvlad-feature-extract``.
    """
    alone = COMMANDS[name].alone
    if alone and _typed.startswith(f"{PROGRAM}-"):
        return f"{PROGRAM}-{alone}"
    program, space, _ = _typed.rpartition(" ")
    return f"{program if space else PROGRAM} {name}"


def as_typed(text: str) -> str:
    """Name commands in a message as the user calls them; they stay as they are for programs."""
    if not (_typed.startswith(f"{PROGRAM}-") or " " in _typed):
        return text

    def replace(found: re.Match[str]) -> str:
        name = _ALONE[(found[1] or found[2]).replace("_", "-")]
        in_one = _typed.endswith(" run") and name in ("extract", "match")
        return called("run" if in_one else name)

    return _NAMED.sub(replace, text)


# Not in paths, nor as a section of a configuration.
_NAMED = re.compile(
    rf"(?<![\w/\\.\[-])(?:{PROGRAM}-({'|'.join(_ALONE)})|(feature_(?:extract|match)))"
    r"(?![\w/\\.\]-])"
)
