# SPDX-License-Identifier: MIT
"""``patchnetvlad-match-realtime``: recognise places on a camera's frames, a video or a folder."""

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
from typing import Any

from patchnetvlad.cli._common import (
    add_config_argument,
    add_debug_argument,
    add_device_arguments,
    command,
    device_from_arguments,
    say,
)

TITLE = "Patch-NetVLAD"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the words of the command line and recognise places."""
    parser = argparse.ArgumentParser(
        description="Recognise places on the frames of a camera, a video or a folder of images, "
        "in an index, or compared with one frame that is kept. Keys in the window: n keeps the "
        "present frame as the reference, q quits.",
    )
    add_config_argument(parser)
    parser.add_argument(
        "--source",
        default="0",
        metavar="CAMERA|FILE|DIR|URL",
        help="number of a camera (default: 0, the first), its device file, a video, a folder of "
        "images, or the URL of a stream",
    )
    parser.add_argument(
        "--index",
        default=None,
        metavar="DIR",
        help="a saved PlaceIndex, or features of patchnetvlad-feature-extract (default: frames are "
        "compared with the one kept last, at first the first)",
    )
    parser.add_argument(
        "--threshold",
        type=_finite,
        default=None,
        metavar="SCORE",
        help="least score of a match (default: the best place always is one)",
    )
    parser.add_argument(
        "--top_k", type=_at_least_one, default=1, metavar="N", help="places a frame (default: 1)"
    )
    parser.add_argument(
        "--rerank",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare patches (default); --no-rerank compares global descriptors alone, which is "
        "faster",
    )
    parser.add_argument(
        "--candidates",
        type=_at_least_one,
        default=100,
        metavar="N",
        help="images of the index whose patches are compared with a frame's, the nearest by global "
        "descriptor (default: 100); fewer are faster",
    )
    parser.add_argument("--matches", action="store_true", help="draw lines between matched patches")
    parser.add_argument(
        "--window",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show what is recognised (default); --no-window for machines without a screen, where "
        "Ctrl-C quits",
    )
    parser.add_argument(
        "--output", default=None, metavar="FILE", help="a video to write: .mp4, .mkv or .avi"
    )
    parser.add_argument(
        "--csv", default=None, metavar="FILE", help="a table to write, one line a frame"
    )
    parser.add_argument(
        "--every",
        type=_at_least_one,
        default=1,
        metavar="N",
        help="look at every N-th frame only (default: 1)",
    )
    parser.add_argument(
        "--max_frames", type=_at_least_one, default=None, metavar="N", help="stop after N frames"
    )
    parser.add_argument(
        "--give_up",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="end when a camera has given no frame for so long (default: 30)",
    )
    add_device_arguments(parser)
    add_debug_argument(parser)
    arguments = parser.parse_args(argv)
    device = device_from_arguments(arguments)

    # FFmpeg tells of damaged frames, a line or more each; here they are counted.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    from patchnetvlad.base.device import describe_device
    from patchnetvlad.config import Config
    from patchnetvlad.errors import FeatureError
    from patchnetvlad.features.manifest import INDEX_FILE
    from patchnetvlad.live.loop import KeptFrame, Rate, recognise
    from patchnetvlad.live.outputs import QUIT, Outputs, Table, VideoWriter, open_window
    from patchnetvlad.live.sources import open_source
    from patchnetvlad.places.index import PlaceIndex
    from patchnetvlad.places.model import load_model

    config = Config.load(arguments.config_path)
    if arguments.index is not None and not (Path(arguments.index) / INDEX_FILE).is_file():
        raise FeatureError(
            f"there is no index in {arguments.index}: PlaceIndex.save and "
            "patchnetvlad-feature-extract write one"
        )
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
        options: dict[str, Any] = {"threshold": arguments.threshold, "rerank": arguments.rerank}
        reference: KeptFrame | PlaceIndex
        if arguments.index is None:
            reference = KeptFrame(model, **options)
        else:
            reference = stack.enter_context(PlaceIndex.load(arguments.index, model))
            say(f"{len(reference)} places in {arguments.index}")
        if arguments.csv is not None:
            table = Table(arguments.csv, arguments.top_k)
            stack.callback(table.close)
        say(f"{source.name}: " + ("q quits, n keeps a frame" if window else "Ctrl-C quits"))
        loop = recognise(
            source,
            reference,
            top_k=arguments.top_k,
            candidates=arguments.candidates,
            matches=arguments.matches,
            max_frames=arguments.max_frames,
            **options,
        )
        outputs = Outputs(
            source, reference, window, video, table, matches=arguments.matches, say=say
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
    if video is not None and video.count:
        say(f"{video.count} frames of video are in {video.path}")
    # Nothing but a signal ends a camera's frames where there is no window.
    return 128 + caught[0] if caught and not source.live else 0


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that the frame at hand is finished; the second one strikes."""
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
