# SPDX-License-Identifier: MIT
"""Outputs of live recognition: a window, a video, a table."""

from __future__ import annotations

import contextlib
import csv
import functools
import logging
import math
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from patchnetvlad.assets.checkpoints import find_checkpoint
from patchnetvlad.base.files import check_inputs_stay, create_file, disk_errors, make_folder
from patchnetvlad.base.text import table_cell
from patchnetvlad.errors import ImageError, OutputError, PatchNetVLADError
from patchnetvlad.live.loop import KeptFrame, Recognition
from patchnetvlad.live.overlay import draw_overlay
from patchnetvlad.live.sources import Source
from patchnetvlad.places.index import PlaceIndex

logger = logging.getLogger(__name__)

CODECS = {".mp4": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
QUIT, KEEP = "q", "n"


class VideoWriter:
    """Writes pictures to a video.

    The file is called ``NAME.part.SUFFIX`` until it is closed. An ``.mkv`` or ``.avi`` can be
    played even if it never was; an ``.mp4`` cannot.

    Parameters
    ----------
    path : str or Path
        Ends with ``.mp4``, ``.mkv`` or ``.avi``.
    fps : float
        Frames/s of the video.

    Raises
    ------
    OutputError
        The ending is another, or the folder cannot be made.
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        self.path = check_video_path(path)
        self.fps = fps
        self.count = 0
        self._part = self.path.with_name(f"{self.path.stem}.part{self.path.suffix}")
        self._writer: Any = None
        self._size = (0, 0)
        make_folder(self.path.parent)

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that are overwritten."""
        return self.path, self._part

    def write(self, picture: NDArray[np.uint8], time: float | None = None) -> None:
        """Append a picture.

        Parameters
        ----------
        picture : ndarray [H, W, 3] of uint8
            RGB. All get the size of the first, with black bars where their shape differs.
        time : float, optional
            s from the beginning at which it is due: it is repeated up to then, or left out if that
            frame is there already. By default it is appended once.
        """
        if self._writer is None:
            self._open(picture.shape[1], picture.shape[0])
        frame = cv2.cvtColor(_fit(picture, self._size), cv2.COLOR_RGB2BGR)
        due = self.count + 1 if time is None else max(round(time * self.fps) + 1, 1)
        for _ in range(due - self.count):
            self._writer.write(frame)
            self.count += 1

    def close(self) -> None:
        """Complete the file and give it its name."""
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        with disk_errors(f"{self.path} cannot be written", "name another file"):
            self._part.replace(self.path)

    def _open(self, width: int, height: int) -> None:
        self._size = width, height
        with disk_errors(f"{self.path} cannot be written as a video", "name another folder"):
            create_file(self._part)
        codec = cv2.VideoWriter_fourcc(*CODECS[self.path.suffix.lower()])  # type: ignore[attr-defined]
        self._writer = cv2.VideoWriter(str(self._part), codec, self.fps, self._size)
        if not self._writer.isOpened():
            self._writer = None
            self._part.unlink(missing_ok=True)
            raise OutputError(
                f"{self.path} cannot be written as a video; name another folder, or another ending "
                f"({', '.join(CODECS)})"
            )


def check_video_path(path: str | Path) -> Path:
    """Raise OutputError unless a path has the suffix of a video format that can be written."""
    path = Path(path)
    if path.suffix.lower() not in CODECS:
        raise OutputError(
            f"{path} must end with {', '.join(CODECS)}, the kinds of video that can be written"
        )
    return path


def _fit(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Scale a picture into (width, height), with black bars beside it."""
    width, height = size
    h, w = picture.shape[:2]
    if (w, h) == size:
        return picture
    scale = min(width / w, height / h)
    w, h = max(1, round(w * scale)), max(1, round(h * scale))
    canvas = np.zeros((height, width, 3), np.uint8)
    x, y = (width - w) // 2, (height - h) // 2
    canvas[y : y + h, x : x + w] = cv2.resize(picture, (w, h), interpolation=cv2.INTER_AREA)
    return canvas


class Table:
    """Writes a CSV file with one line per frame, which is in the file when ``write`` returns.

    A file that exists is written over when :meth:`begin` is called, or the first line written.

    Parameters
    ----------
    path : str or Path
    top_k : int, default 1
        Places per line.

    Raises
    ------
    OutputError
        The file cannot be written.
    """

    def __init__(self, path: str | Path, top_k: int = 1) -> None:
        self.path = Path(path)
        self._top_k = top_k
        make_folder(self.path.parent)
        with disk_errors(f"{self.path} cannot be written", "name another file"):
            # Closed by close(); each line is flushed.
            self._file = self.path.open("a", newline="", encoding="utf-8", errors="surrogateescape")
        self._csv = csv.writer(self._file, lineterminator="\n")
        self._begun = False

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that are overwritten."""
        return (self.path,)

    def begin(self) -> None:
        """Write the header, unless it exists already; this replaces an existing file."""
        if self._begun:
            return
        self._begun = True
        with disk_errors(f"{self.path} cannot be written", "name another file"):
            if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                self._file.truncate(0)
        more = [f"{what}_{k}" for k in range(2, self._top_k + 1) for what in ("key", "score")]
        self._write(
            ["frame", "time_s", "name", "match", "key", "score", "similarity", "matched_patches",
             "position", "latency_ms", "fps", "confidence", *more]
        )  # fmt: skip

    def write(self, seen: Recognition) -> None:
        """Write what was recognised on a frame."""
        if seen.frame is None:
            return
        self.begin()
        best = seen.places[0] if seen.places else None
        row = [
            seen.frame.number,
            _number(seen.frame.time, 3),
            table_cell(seen.frame.name),
            int(seen.place is not None),
            table_cell(best.key) if best else "",
            _number(seen.score, 6),
            _number(seen.similarity, 6),
            "" if seen.inliers is None else seen.inliers,
            " ".join(f"{v:.12g}" for v in best.position) if best and best.position else "",
            _number(1000 * seen.latency, 1),
            _number(seen.fps, 2),
            _number(seen.confidence, 4),
        ]
        for k in range(1, self._top_k):
            place = seen.places[k] if k < len(seen.places) else None
            row += [table_cell(place.key), _number(place.score, 6)] if place else ["", ""]
        self._write(row)

    def _write(self, row: list[Any]) -> None:
        with disk_errors(f"{self.path} cannot be written", "name another file"):
            self._csv.writerow(row)
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


# --- windows --------------------------------------------------------------------------------------


class Window(Protocol):
    """A window that shows pictures."""

    def show(self, picture: NDArray[np.uint8]) -> str:
        """Show a picture [H, W, 3], RGB; return the keys pressed since, ``q`` when it is closed."""

    def close(self) -> None:
        """Close it."""


def open_window(title: str) -> Window:
    """Open a window, with Tk or, failing that, OpenCV.

    Raises
    ------
    PatchNetVLADError
        There is no screen, or neither can open windows here.
    """
    troubles = []
    opens: tuple[Callable[[str], Window], ...] = (_TkWindow, _OpenCVWindow)
    for kind in opens:
        try:
            return kind(title)
        except PatchNetVLADError as error:
            troubles.append(str(error))
    raise PatchNetVLADError(
        f"no window can be opened here ({'; '.join(troubles)})\n"
        "Write a video instead (--no-window --output out.mp4), or install Tk (Debian, Ubuntu: "
        "python3-tk; Homebrew: python-tk)."
    )


class _TkWindow:
    """The package's OpenCV comes without windows; Python comes with Tk."""

    def __init__(self, title: str) -> None:
        try:
            import tkinter

            self._error: type[Exception] = tkinter.TclError
            self._root = tkinter.Tk()
        except ImportError as error:
            raise PatchNetVLADError(f"Python has no Tk: {error}") from None
        except tkinter.TclError as error:
            raise PatchNetVLADError(f"Tk: {error}") from None
        self._root.title(title)
        self._label = tkinter.Label(self._root, background="black", borderwidth=0)
        self._label.pack(fill="both", expand=True)
        self._keys = ""
        self._photo: Any = None
        self._root.bind("<Key>", self._pressed)
        self._root.protocol("WM_DELETE_WINDOW", self._closed)

    def _pressed(self, event: Any) -> None:
        self._keys += event.char.lower()

    def _closed(self) -> None:
        self._keys += QUIT

    def show(self, picture: NDArray[np.uint8]) -> str:
        from PIL import ImageTk

        try:
            if self._photo is None:
                height, width = picture.shape[:2]
                share = min(
                    1.0,
                    0.9 * self._root.winfo_screenwidth() / width,
                    0.85 * self._root.winfo_screenheight() / height,
                )
                size = round(width * share), round(height * share)
                self._root.geometry(f"{size[0]}x{size[1]}")
            else:
                size = self._root.winfo_width(), self._root.winfo_height()
            photo = ImageTk.PhotoImage(Image.fromarray(_fit(picture, size)), master=self._root)
            self._label.configure(image=photo)
            self._photo = photo  # Tk itself holds no reference
            self._root.update()
        except self._error:  # the screen is gone
            return QUIT
        keys, self._keys = self._keys, ""
        return keys

    def close(self) -> None:
        self._photo = None
        with contextlib.suppress(self._error):
            self._root.destroy()


class _OpenCVWindow:
    def __init__(self, title: str) -> None:
        # Qt, which OpenCV's windows may be built on, ends the process where there is no screen.
        screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        if sys.platform.startswith("linux") and not screen:
            raise PatchNetVLADError("OpenCV: DISPLAY is not set")
        self._title = title
        try:
            cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
        except cv2.error:
            raise PatchNetVLADError("OpenCV is built without windows") from None
        self._sized = False

    def show(self, picture: NDArray[np.uint8]) -> str:
        if not self._sized:
            cv2.resizeWindow(self._title, picture.shape[1], picture.shape[0])
            self._sized = True
        cv2.imshow(self._title, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        key = cv2.waitKey(1)
        if cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) < 1:
            return QUIT
        return chr(key & 0xFF).lower() if key >= 0 else ""

    def close(self) -> None:
        with contextlib.suppress(cv2.error):
            cv2.destroyWindow(self._title)


# --- all together ---------------------------------------------------------------------------------


def check_outputs(
    source: Source,
    reference: KeptFrame | PlaceIndex,
    video: VideoWriter | None = None,
    table: Table | None = None,
) -> None:
    """Raise OutputError if a video or a table would overwrite an input.

    The parameters are those of :class:`Outputs`.
    """
    files = [*(video.files if video else ()), *(table.files if table else ())]
    if len({file.resolve() for file in files}) < len(files):
        raise OutputError(f"{files[0]} cannot be both the video and the table; name two files")
    config = reference.model.config
    read = [*source.files, config.source, find_checkpoint(config.resume_path, config.num_pcs)]
    if isinstance(reference, PlaceIndex):
        read += reference.path.iterdir()
    check_inputs_stay(files, read)


class Outputs:
    """Shows recognitions in a window, a video and a table or, without a window, as text.

    Parameters
    ----------
    source : Source
    reference : KeptFrame or PlaceIndex
        Gives thumbnails; a KeptFrame keeps the present frame when ``n`` is pressed.
    window : Window, optional
    video : VideoWriter, optional
    table : Table, optional
        They are the caller's to close. Nothing is in them yet.
    matches : bool, default False
        Draw matched patches.
    say : callable, optional
        Gets lines of text; by default the log does.

    Raises
    ------
    OutputError
        The video or the table is the other one, or is what is read.
    """

    def __init__(
        self,
        source: Source,
        reference: KeptFrame | PlaceIndex,
        window: Window | None = None,
        video: VideoWriter | None = None,
        table: Table | None = None,
        *,
        matches: bool = False,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        check_outputs(source, reference, video, table)
        if table is not None:
            table.begin()
        self._source = source
        self._reference = reference
        self._window = window
        self._video = video
        self._table = table
        self._matches = matches
        self._say = say
        self._last: Recognition | None = None  # that has a frame
        self._begin = 0.0
        self._thumbnail = functools.lru_cache(maxsize=32)(self._read_thumbnail)

    def take(self, seen: Recognition) -> str:
        """Pass on a recognition; return the keys that were pressed in the window."""
        if seen.frame is not None:
            if self._last is None:
                self._begin = seen.frame.arrived
            self._last = seen
            if self._table is not None:
                self._table.write(seen)
            if self._window is None:
                self._say(_line(seen))
        picture = self._picture(seen)
        if self._video is not None and self._last is not None:
            now = time.monotonic() - self._begin if self._source.live else None
            self._video.write(picture, now)
        keys = self._window.show(picture) if self._window is not None else ""
        if KEEP in keys and self._last is not None:
            self._keep(self._last)
        return keys

    def _picture(self, seen: Recognition) -> NDArray[np.uint8]:
        if self._window is None and self._video is None:
            return np.zeros((0, 0, 3), np.uint8)
        image = np.zeros((480, 640, 3), np.uint8)
        if self._last is not None and self._last.frame is not None:
            image = self._last.frame.image
        thumbnail = self._thumbnail(seen.places[0].key) if seen.places else None
        return draw_overlay(image, seen, thumbnail=thumbnail, matches=self._matches)

    def _keep(self, seen: Recognition) -> None:
        if isinstance(self._reference, KeptFrame):
            self._reference.keep(seen)
            self._say(f"kept {self._reference.name}")
        else:
            self._say("there is an --index: no frame is kept")

    def _read_thumbnail(self, key: str) -> NDArray[np.uint8] | None:
        try:
            return self._reference.picture(key)
        except (KeyError, ImageError):  # a file that is gone; its features are not
            return None


def _line(seen: Recognition) -> str:
    """Say what was recognised on a frame."""
    assert seen.frame is not None
    if seen.kept:
        return f"{seen.frame.name}: kept as the reference"
    best = seen.places[0].key if seen.places else "there are no places"
    what = best if seen.place is not None else f"no match ({best})"
    score = f", score {seen.score:.5f}" if seen.places else ""
    known = seen.confidence == seen.confidence  # not nan
    sure = f", confidence {100 * seen.confidence:.0f} %" if known else ""
    return f"{seen.frame.name}: {what}{score}{sure}, {1000 * seen.latency:.0f} ms"
