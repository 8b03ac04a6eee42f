# SPDX-License-Identifier: MIT
"""Sources of frames: cameras, videos, folders of images."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.retry import Retries
from patchnetvlad.datasets.formats import IMAGE_SUFFIXES, has_image_suffix, is_video, left_out
from patchnetvlad.datasets.image_list import natural_key, visible_files
from patchnetvlad.datasets.images import load_image, native_size
from patchnetvlad.errors import ImageError, SourceError

logger = logging.getLogger(__name__)

LOST_AFTER = 2.0  # s without a frame
CONNECTS = Retries(first=0.2, longest=5.0)  # attempts to connect, until it is given up
OPEN_LIMIT, READ_LIMIT = 20.0, 5.0  # s a call may take; opening does take long on some systems
CAMERA_FPS, FOLDER_FPS = 15.0, 5.0  # of videos made of frames that come at no fixed rate
MOST_DAMAGED = 100  # frames in a row, after which a video is held to have ended
MOST_STUCK = 3  # threads that hang in a dead camera's driver
_SHOWN = (1080, 1920)  # (height, width) px that are enough of a photograph of very many


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame.

    Attributes
    ----------
    number : int
        Its place in the source, from 0; frames that were skipped count.
    time : float
        s. In a video, from its beginning; of a camera, since it was first asked for a frame; of
        a folder, nan.
    image : ndarray [H, W, 3] of uint8
        RGB.
    name : str
        The image's path, or the source and the frame's number.
    arrived : float
        When it was there, by ``time.monotonic()``.
    """

    number: int
    time: float
    image: NDArray[np.uint8]
    name: str
    arrived: float


@dataclass
class Counts:
    """Numbers of frames of a source, by outcome.

    Attributes
    ----------
    seen : int
        Frames that the source had.
    skipped : int
        Of these, left out because only every n-th is wanted.
    dropped : int
        Left out because a newer one came before they could be worked on.
    broken : int
        Could not be decoded.
    """

    seen: int = 0
    skipped: int = 0
    dropped: int = 0
    broken: int = 0


class Source:
    """Frames one after the other; made by :func:`open_source`.

    Attributes
    ----------
    name : str
    live : bool
        Whether frames come when they come, and must not be waited for.
    fps : float
        Frames/s of a video that is made of its frames.
    ended : bool
        No more frames come.
    counts : Counts
    files : sequence of Path
        What is read; empty for cameras.
    """

    live = False
    files: Sequence[Path] = ()

    def __init__(self, name: str, every: int = 1) -> None:
        if every < 1:
            raise SourceError(f"every = {every} must be 1 (every frame) or more")
        self.name = name
        self.fps = CAMERA_FPS if self.live else FOLDER_FPS
        self.ended = False
        self.counts = Counts()
        self._every = every

    @property
    def lost(self) -> float:
        """Seconds for which a camera has been lost; 0 while frames come."""
        return 0.0

    def read(self, timeout: float = 0.5) -> Frame | None:
        """Return the next frame.

        Parameters
        ----------
        timeout : float, default 0.5
            s that a camera is waited for at most.

        Returns
        -------
        Frame or None
            None if the source has ended, or a camera gave no frame in time.

        Raises
        ------
        SourceError
            No more frames can be hoped for.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Release the camera or file."""
        self.ended = True

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Folder(Source):
    """Images of a folder, in natural order (2 before 10); broken ones are skipped."""

    def __init__(self, folder: Path, every: int = 1) -> None:
        super().__init__(str(folder), every)
        self.files: Sequence[Path] = [folder]
        if folder.is_dir():
            files = (f for f in folder.iterdir() if has_image_suffix(f))
            self.files = sorted(
                (f for f in files if f.is_file()), key=lambda f: natural_key(f.name)
            )
            others = "; ".join(left_out(visible_files(folder)))
            if not self.files:
                raise SourceError(
                    f"there is no image in {folder} ({' '.join(IMAGE_SUFFIXES)})"
                    f"{f'; {others}' if others else ''}"
                )
            if others:
                logger.info("%s: %s", folder, others)

    def read(self, timeout: float = 0.5) -> Frame | None:
        """Return the next frame; see :meth:`Source.read`."""
        while self.counts.seen < len(self.files):
            number = self.counts.seen
            self.counts.seen += 1
            if number % self._every:
                self.counts.skipped += 1
                continue
            file = self.files[number]
            try:
                image = np.asarray(load_image(file, _SHOWN))
            except ImageError as error:
                self.counts.broken += 1
                logger.info("skipped: %s", error)
                continue
            return Frame(number, float("nan"), image, str(file), time.monotonic())
        self.ended = True
        return None


class Video(Source):
    """Frames of a video file; those that cannot be decoded are skipped."""

    def __init__(self, path: Path, every: int = 1) -> None:
        super().__init__(str(path), every)
        self.files = [path]
        with _quiet():
            self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            empty = path.stat().st_size == 0
            raise SourceError(
                f"{path} is {'empty (0 bytes)' if empty else 'no video that OpenCV can read'}; "
                "give a video, a folder of images or the number of a camera"
            )
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        if 0 < fps < 1000:
            self.fps = fps / every
        self._expected = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)

    def read(self, timeout: float = 0.5) -> Frame | None:
        """Return the next frame; see :meth:`Source.read`."""
        while not self.ended and self._grab():
            number = self.counts.seen
            self.counts.seen += 1
            if number % self._every:
                self.counts.skipped += 1
                continue
            at = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            good, image = self._capture.retrieve()
            if not good or image is None:
                self.counts.broken += 1
                continue
            return Frame(number, at, _rgb(image), f"{self.name}#{number}", time.monotonic())
        # Containers state the number of frames roughly, where they do at all.
        if not self.ended and self.counts.seen < 0.95 * self._expected < 1e9:
            logger.info(
                "%s breaks off after %d of %.0f frames",
                self.name,
                self.counts.seen,
                self._expected,
            )
        self.ended = True
        return None

    def _grab(self) -> bool:
        """Go on to the next frame that can be decoded."""
        for damaged in range(MOST_DAMAGED + 1):  # OpenCV tells them from the end by nothing
            if self._capture.grab():
                self.counts.seen += damaged
                self.counts.broken += damaged
                return True
        return False

    def close(self) -> None:
        """Let go of it."""
        super().close()
        self._capture.release()


class Camera(Source):
    """The latest frame of a camera or stream.

    A thread reads all the time and holds one frame, so that no stale one is worked on. Where the
    camera fails, it is opened anew, at growing intervals; where its driver hangs, another thread
    takes over. Nobody is ever kept waiting for either.

    Parameters
    ----------
    camera : int or str
        Number of a camera, its device file, or a URL.
    every : int, default 1
    give_up : float, default 30
        s without a frame after which :meth:`read` raises an error.
    open_capture : callable, optional
        Opens the camera: returns what has the methods ``isOpened``, ``read`` and ``release`` of
        ``cv2.VideoCapture``.
    open_limit, read_limit : float
        s that a call of these may take before it is held to hang.
    """

    live = True

    def __init__(
        self,
        camera: int | str,
        every: int = 1,
        give_up: float = 30.0,
        *,
        open_capture: Callable[[int | str], Any] | None = None,
        open_limit: float = OPEN_LIMIT,
        read_limit: float = READ_LIMIT,
    ) -> None:
        super().__init__(f"camera {camera}" if isinstance(camera, int) else str(camera), every)
        self._camera = camera
        self._give_up = give_up
        self._open_capture = open_capture or _open_camera
        self._limits = {"open": open_limit, "read": read_limit}
        self._patience = 1.0  # factor of the limits, which grows with threads that hang
        self._condition = threading.Condition()
        # All below are guarded by the condition.
        self._newest: tuple[int, float, NDArray[np.uint8]] | None = None  # number, time, BGR
        self._failed = False
        self._error: SourceError | None = None
        self._stop = threading.Event()  # of the thread that reads at present
        self._doing: tuple[str, float] | None = None  # the call that it is in, and since when
        self._threads: list[threading.Thread] = []
        self._start = self._last = 0.0

    @property
    def lost(self) -> float:
        """Seconds for which it has been lost; 0 while frames come."""
        with self._condition:
            if not self._threads:
                return 0.0
            gap = time.monotonic() - self._last
            return gap if self._failed or gap > LOST_AFTER else 0.0

    def read(self, timeout: float = 0.5) -> Frame | None:
        """Return the next frame; see :meth:`Source.read`."""
        if (newest := self._wait(time.monotonic() + timeout)) is None:
            return None
        number, arrived, image = newest
        name = f"{self.name}#{number}"
        return Frame(number, arrived - self._start, _rgb(image), name, arrived)

    def _wait(self, end: float) -> tuple[int, float, NDArray[np.uint8]] | None:
        with self._condition:
            while not self.ended:
                now = time.monotonic()
                if not self._threads:
                    self._start = self._last = now
                    self._begin()
                if self._newest is not None:
                    newest, self._newest = self._newest, None
                    return newest
                if self._error is not None:
                    raise self._error
                if now - self._last > self._give_up:
                    raise SourceError(
                        f"{self.name} gave no frame for {self._give_up:g} s; is it still there? "
                        "(--give_up SECONDS waits longer)"
                    )
                self._replace_stuck(now)
                if now >= end:
                    break
                # Short, to notice a thread that hangs.
                self._condition.wait(min(0.1, end - now))
        return None

    def close(self) -> None:
        """Let go of it."""
        super().close()
        with self._condition:
            self._stop.set()
            self._condition.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join(0.5)  # to release the camera; one that hangs is left behind

    def _begin(self) -> None:
        self._stop = threading.Event()
        self._doing = None
        thread = threading.Thread(
            target=self._read_on, args=(self._stop,), name="camera", daemon=True
        )
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def _replace_stuck(self, now: float) -> None:
        if self._doing is None:
            return
        what, since = self._doing
        if now - since <= self._limits[what] * self._patience:
            return
        self._failed = True
        if sum(t.is_alive() for t in self._threads) > MOST_STUCK:
            return
        logger.info("%s hangs; opening it again", self.name)
        self._stop.set()
        self._patience *= 2
        self._begin()

    @contextmanager
    def _call(self, what: str, stop: threading.Event) -> Iterator[None]:
        """Note which call of the camera's may hang."""
        with self._condition:
            if not stop.is_set():
                self._doing = (what, time.monotonic())
        yield
        with self._condition:
            if not stop.is_set():
                self._doing = None

    def _read_on(self, stop: threading.Event) -> None:
        waits = CONNECTS.waits()
        while not stop.is_set():
            capture = None
            opened = False
            reason = ""
            try:
                with self._call("open", stop):
                    capture = self._open_capture(self._camera)
                opened = bool(capture.isOpened())
                while opened and not stop.is_set():
                    with self._call("read", stop):
                        good, image = capture.read()
                    if not good:
                        break
                    self._publish(image, stop)
                    waits = CONNECTS.waits()
            except Exception as error:  # a driver's; the camera is as good as lost
                reason = f": {error}"
            finally:
                if capture is not None:
                    with self._call("read", stop), suppress(Exception):
                        capture.release()
            with self._condition:
                if stop.is_set():
                    return
                self._doing = None
                if not opened and self.counts.seen == 0:
                    self._error = SourceError(
                        f"{self.name} cannot be opened{reason}; is it there, and free?{_cameras()}"
                    )
                    self._condition.notify_all()
                    return
                if not self._failed:
                    logger.info("%s is lost%s; trying again", self.name, reason)
                self._failed = True
            stop.wait(next(waits))

    def _publish(self, image: NDArray[np.uint8] | None, stop: threading.Event) -> None:
        now = time.monotonic()
        with self._condition:
            if stop.is_set():
                return
            number = self.counts.seen
            self.counts.seen += 1
            if image is None or image.size == 0:
                self.counts.broken += 1
                return
            if self._failed:
                logger.info("%s is back", self.name)
            self._last, self._failed, self._patience = now, False, 1.0
            if number % self._every:
                self.counts.skipped += 1
                return
            self.counts.dropped += self._newest is not None
            self._newest = number, now, image
            self._condition.notify_all()


def open_source(
    source: int | str | os.PathLike[str], every: int = 1, give_up: float = 30
) -> Source:
    """Open a source of frames.

    Parameters
    ----------
    source : int or str or Path
        A camera: its number, its device file or a URL, whose newest frame is given; or a video
        file, a folder of images or an image, whose frames are all given.
    every : int, default 1
        Give every n-th frame only.
    give_up : float, default 30
        s without a frame after which a camera is given up.

    Returns
    -------
    Source

    Raises
    ------
    SourceError
        There is no such thing, or it cannot be read. Cameras are opened later, when they are
        first read.
    """
    text = os.fspath(source) if not isinstance(source, int) else str(source)
    if text.isdecimal():
        return Camera(int(text), every, give_up)
    if "://" in text:
        return Camera(text, every, give_up)
    path = Path(text).expanduser()
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = "there is no" if isinstance(error, FileNotFoundError) else "cannot read"
        raise SourceError(
            f"{reason} {text!r}; give the number of a camera (0 is the first), a video, a folder "
            f"of images or a URL{_cameras()}"
        ) from None
    if stat.S_ISCHR(mode):
        return Camera(str(path), every, give_up)
    if stat.S_ISDIR(mode):
        return Folder(path, every)
    try:
        with path.open("rb") as file:
            head = file.read(400)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None
    # What is no video is an image, or refused by name: OpenCV would try all that it knows.
    if is_video(head) or path.suffix.lower() in (".mjpg", ".mjpeg"):
        return Video(path, every)
    try:
        native_size(path)
    except ImageError as error:
        raise SourceError(
            f"{path} is not a video, and {error}; give a video, a folder of images or the number "
            "of a camera"
        ) from None
    return Folder(path, every)


def _open_camera(camera: int | str) -> Any:
    with _quiet():
        if isinstance(camera, str) and "://" in camera:
            limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, int(1000 * OPEN_LIMIT)]
            limits += [cv2.CAP_PROP_READ_TIMEOUT_MSEC, int(1000 * READ_LIMIT)]
            return cv2.VideoCapture(camera, cv2.CAP_FFMPEG, limits)
        capture = cv2.VideoCapture(camera)
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
    return capture


def _cameras() -> str:
    """Name the cameras of a Linux machine."""
    devices = sorted(Path("/dev").glob("video[0-9]*"), key=lambda file: natural_key(file.name))
    return f" Cameras here: {', '.join(map(str, devices))}." if devices else ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep OpenCV from printing what is reported by an error anyway."""
    log: Any = getattr(cv2.utils, "logging", cv2)  # the module since OpenCV 5
    level = log.getLogLevel()
    log.setLogLevel(0)
    try:
        yield
    finally:
        log.setLogLevel(level)


def _rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2)
    return np.ascontiguousarray(image[..., 2::-1])
