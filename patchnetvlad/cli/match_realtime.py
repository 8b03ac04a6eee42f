# SPDX-License-Identifier: MIT
"""``patchnetvlad-match-realtime``: recognise places in a camera stream, a video or a folder."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchnetvlad.cli._common import (
    add_config_argument,
    add_debug_argument,
    add_device_arguments,
    add_root_argument,
    add_sequence_arguments,
    command,
    device_from_arguments,
    new_parser,
    say,
    sequence_options,
)
from patchnetvlad.cli._names import called
from patchnetvlad.errors import FeatureError, OutputError

if TYPE_CHECKING:
    from patchnetvlad.live.loop import KeptFrame
    from patchnetvlad.live.outputs import Outputs
    from patchnetvlad.live.sources import Source
    from patchnetvlad.places.index import PlaceIndex
    from patchnetvlad.places.model import PlaceModel

TITLE = "Patch-NetVLAD"
VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Recognise places as the command line says."""
    arguments = build_parser().parse_args(argv)
    device = device_from_arguments(arguments)

    # FFmpeg prints at least a line per damaged frame; these are counted here instead.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    from patchnetvlad.config import Config

    config = Config.load(arguments.config_path)
    if sequence_options(arguments) is not None and arguments.index is None:
        raise FeatureError("--sequence needs --index: a single reference frame is no traverse")
    _check_index(arguments.index)
    if arguments.output and not arguments.output.lower().endswith(VIDEO_SUFFIXES):
        raise OutputError(f"{arguments.output} must end with {', '.join(VIDEO_SUFFIXES)}")
    if arguments.matches and not (arguments.rerank and config.uses_patches):
        say("--matches has no effect: no patches are matched without re-ranking by patches")

    from patchnetvlad.live.outputs import Outputs, Table, VideoWriter, open_window
    from patchnetvlad.live.sources import open_source
    from patchnetvlad.places.model import load_model

    with contextlib.ExitStack() as stack:
        source = stack.enter_context(
            open_source(arguments.source, arguments.every, arguments.give_up)
        )
        video = table = window = None
        if arguments.output is not None:
            video = VideoWriter(arguments.output, source.fps)
            stack.callback(video.close)
        if arguments.window:
            window = open_window(TITLE)
            stack.callback(window.close)
        model = load_model(config, device=device)
        reference = _open_reference(stack, arguments, model)
        if arguments.csv is not None:
            table = Table(arguments.csv, arguments.top_k)
            stack.callback(table.close)
        say(f"{source.name}: " + ("q quits, n keeps a frame" if window else "Ctrl-C quits"))
        outputs = Outputs(
            source, reference, window, video, table, matches=arguments.matches, say=say
        )
        caught = _watch(source, reference, outputs, arguments, model)
    if video is not None and video.count:
        say(f"{video.count} frames of video are in {video.path}")
    # A camera without a window is ended only by a signal.
    return 128 + caught[0] if caught and not source.live else 0


def _check_index(folder: str | None) -> None:
    """Raise FeatureError if a folder is given that is not an index."""
    from patchnetvlad.features.manifest import INDEX_FILE

    if folder is not None and not (Path(folder) / INDEX_FILE).is_file():
        raise FeatureError(
            f"there is no index in {folder}: PlaceIndex.save and {called('extract')} write one"
        )


def _open_reference(
    stack: contextlib.ExitStack, arguments: argparse.Namespace, model: PlaceModel
) -> KeptFrame | PlaceIndex:
    """Open the index, which the stack closes, or return a frame that is still to be kept."""
    from patchnetvlad.live.loop import KeptFrame
    from patchnetvlad.places.index import PlaceIndex

    if arguments.index is None:
        return KeptFrame(model, threshold=arguments.threshold, rerank=arguments.rerank)
    root = arguments.dataset_root_dir
    index = stack.enter_context(PlaceIndex.load(arguments.index, model, dataset_root=root))
    say(f"{len(index)} places in {arguments.index}")
    if arguments.matches and len(index):
        _warn_of_missing_images(index, root)
    return index


def _warn_of_missing_images(index: PlaceIndex, root: str) -> None:
    """Say so if the images that matched patches are drawn on are not there."""
    from patchnetvlad.errors import ImageError

    try:
        index.image(index.keys[0])
    except ImageError as error:
        say(
            f"--matches has no effect without the images of the index: {error} (names are looked "
            f"for under {root or 'the current folder'!r}: --dataset_root_dir)"
        )


def _watch(
    source: Source,
    reference: KeptFrame | PlaceIndex,
    outputs: Outputs,
    arguments: argparse.Namespace,
    model: PlaceModel,
) -> list[int]:
    """Recognise places until the source, the user or a signal ends it; return the signals.

    Whatever ends it, the speed is printed.
    """
    from patchnetvlad.base.device import describe_device
    from patchnetvlad.live.loop import Rate, recognise
    from patchnetvlad.live.outputs import QUIT

    loop = recognise(
        source,
        reference,
        threshold=arguments.threshold,
        top_k=arguments.top_k,
        rerank=arguments.rerank,
        candidates=arguments.candidates,
        matches=arguments.matches,
        sequence=_sequence(arguments),
        max_frames=arguments.max_frames,
        min_confidence=arguments.min_confidence,
        budget_ms=arguments.budget_ms,
    )
    rate = Rate()
    try:
        with _signals() as caught:
            for seen in loop:
                keys = outputs.take(seen)
                rate.add(seen)
                if QUIT in keys or caught:
                    break
    finally:
        say(
            f"{rate.report(source.counts)}\n"
            f"on {describe_device(model.device)}, precision = {model.precision}"
        )
    return caught


def _sequence(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return the arguments of a sequence of frames; None without one."""
    if arguments.sequence is None:
        return None
    return {
        "length": arguments.sequence,
        "method": arguments.sequence_method,
        "speed": 1.0 if arguments.speed is None else arguments.speed,
        "traverses": arguments.traverses,
        "gap": arguments.gap,
    }


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Recognise places in the frames of a camera, a video or a folder of images, using an index "
        "or a single reference frame. Keys in the window: n makes the current frame the reference, "
        "q quits.",
    )
    add_config_argument(parser)
    parser.add_argument(
        "--source",
        default="0",
        metavar="CAMERA|FILE|DIR|URL",
        help="number or device file of a camera (default: 0, the first camera), a video, a folder "
        "of images, or the URL of a stream",
    )
    _add_search(parser)
    add_root_argument(parser, "list from which the features of --index were extracted")
    add_sequence_arguments(parser, live=True)
    _add_outputs(parser)
    _add_limits(parser)
    add_device_arguments(parser)
    add_debug_argument(parser)
    return parser


def _add_search(parser: argparse.ArgumentParser) -> None:
    """Add options for the search."""
    parser.add_argument(
        "--index",
        default=None,
        metavar="DIR",
        help="a saved PlaceIndex, or features from patchnetvlad extract (default: compare frames "
        "with the reference frame, at first the first frame)",
    )
    parser.add_argument(
        "--threshold",
        type=_finite,
        default=None,
        metavar="SCORE",
        help="lowest score that counts as a match (default: the best place always counts)",
    )
    parser.add_argument(
        "--min_confidence",
        type=_finite,
        default=None,
        metavar="P",
        help="lowest confidence, 0 to 1, that counts as a match, where the configuration has "
        "confidences and there is an --index",
    )
    parser.add_argument(
        "--top_k", type=_at_least_one, default=1, metavar="N", help="places per frame (default: 1)"
    )
    parser.add_argument(
        "--rerank",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare patches (default); --no-rerank compares only global descriptors, which is "
        "faster",
    )
    parser.add_argument(
        "--candidates",
        type=_at_least_one,
        default=100,
        metavar="N",
        help="number of index images to re-rank per frame, the nearest by global descriptor "
        "(default: 100); fewer are faster",
    )
    parser.add_argument(
        "--budget_ms",
        type=_finite,
        default=None,
        metavar="MS",
        help="time for a frame, after which no more of the --candidates are re-ranked; the nearest "
        "come first",
    )
    parser.add_argument("--matches", action="store_true", help="draw lines between matched patches")


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add options for the output."""
    parser.add_argument(
        "--window",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show the results in a window (default); use --no-window on machines without a "
        "screen, and quit with Ctrl-C",
    )
    parser.add_argument(
        "--output",
        default=None,
        metavar="FILE",
        help=f"video file to write: {', '.join(VIDEO_SUFFIXES)}",
    )
    parser.add_argument(
        "--csv", default=None, metavar="FILE", help="table to write, with one line per frame"
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Add options for which frames to process, and for how long."""
    parser.add_argument(
        "--every",
        type=_at_least_one,
        default=1,
        metavar="N",
        help="process only every N-th frame (default: 1)",
    )
    parser.add_argument(
        "--max_frames", type=_at_least_one, default=None, metavar="N", help="stop after N frames"
    )
    parser.add_argument(
        "--give_up",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="stop if a camera delivers no frame for this long (default: 30)",
    )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that the frame is finished; a second one acts at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # where handlers cannot be set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} must be a number")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} must be more than 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
