# SPDX-License-Identifier: MIT
"""Output to the terminal that never makes a command fail."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

_LIBRARIES = r"(PIL|pillow_heif|cv2)\b"
# What moves the cursor, changes the terminal or the direction of text, in a name for example.
# Progress bars begin with a return, or are nothing but movements; Ray writes in colours.
_CONTROLS = re.compile(
    "(?<!^)\r(?=[^\n])|(?!\x1b\\[[0-379]?[0-79]?m)"
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
_MOVEMENTS = re.compile("(\n|\x1b\\[A)*")


def plain(text: str) -> str:
    """Return a text for a terminal, in which control characters are written as escapes.

    Examples
    --------
    >>> plain("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    if _MOVEMENTS.fullmatch(text):
        return text
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Output:
    """Stands for ``sys.stdout`` or ``sys.stderr``: gives up what cannot be written.

    Parameters
    ----------
    stream : text file or None
        None if it was closed before the process began.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream: Any = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text, with escapes for control characters and what the terminal cannot show."""
        shown = plain(text)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with self._given_up():
            self._stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Hand on what has been written."""
        with self._given_up():
            self._stream.flush()

    @contextlib.contextmanager
    def _given_up(self) -> Iterator[None]:
        try:
            yield
        except ValueError:  # it is closed
            self._stream = open(os.devnull, "w")  # noqa: SIM115
        except OSError as error:
            if self.error is None and not isinstance(error, BrokenPipeError):
                self.error = error
            # Python writes what it still holds when it ends, and would fail then.
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Let a command go on though stdout or stderr is closed, full or read by nobody.

    Neither do warnings of libraries that read images and videos appear. What cannot be written is
    lost; of a full disk, a line on the other stream tells.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else a file of features would get the number, and what is printed there
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out, err = Output(sys.stdout), Output(sys.stderr)
    sys.stdout, sys.stderr = out, err
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=_LIBRARIES)
            yield
    finally:
        out.flush()
        err.flush()
        if out.error:
            print(f"what was printed is lost: {out.error.strerror}", file=err)
        sys.stdout, sys.stderr = before


def end_after_ray(status: int) -> None:
    """End this process with a status at once, if it used Ray.

    Threads of Ray outlive its shutdown. Now and then one of them locks a mutex that the end of the
    process has destroyed already: SIGSEGV or SIGABRT instead of the status, after all was done.
    """
    if "ray" in sys.modules:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
