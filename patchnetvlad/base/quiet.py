# SPDX-License-Identifier: MIT
"""Silencing messages that C libraries print directly and that users cannot act on."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from typing import IO

_STDERR = 2
_LIBTIFF = re.compile(
    rb"(tempfile\.tif|TIFF\w*|\w+(Decode|Encode|Setup|Predictor)\w*|[A-Za-z]:?\S*\.tiff?): "
)
_MOST = 2**20  # bytes that are given back to stderr


class _Diversion:
    """Diverts stderr to a file while at least one thread asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._stderr = -1  # a copy of it
        self._file: IO[bytes] | None = None

    def begin(self) -> None:
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            with contextlib.suppress(OSError):  # stderr is closed, or no file can be made
                self._stderr = os.dup(_STDERR)
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by end)
                os.dup2(self._file.fileno(), _STDERR)

    def end(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            if self._stderr >= 0:
                os.dup2(self._stderr, _STDERR)
            if self._file is not None:
                with self._file as file, contextlib.suppress(OSError):
                    file.seek(0)
                    lines = file.read(_MOST).splitlines(keepends=True)
                    kept = b"".join(line for line in lines if not _LIBTIFF.match(line))
                    if kept:
                        os.write(_STDERR, kept)
            if self._stderr >= 0:
                os.close(self._stderr)
            self._stderr, self._file = -1, None


_diversion = _Diversion()


@contextlib.contextmanager
def without_libtiff() -> Iterator[None]:
    """Hide what libtiff prints to stderr; all other output appears at the end.

    A file that it cannot read leads to an exception in any case.
    """
    _diversion.begin()
    try:
        yield
    finally:
        _diversion.end()
