# SPDX-License-Identifier: MIT
"""Many readers or one writer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class ReadWriteLock:
    """Lets in any number of readers, or one writer, who goes before readers that come later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._writers = 0  # that write or wait

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Read, beside others that read; a context manager."""
        with self._changed:
            self._changed.wait_for(lambda: self._writers == 0)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One at a time: callers hold a lock of their own."""
        try:
            with self._changed:
                self._writers = 1
                self._changed.wait_for(lambda: self._readers == 0)
            yield
        finally:
            with self._changed:
                self._writers = 0
                self._changed.notify_all()
