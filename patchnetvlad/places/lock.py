# SPDX-License-Identifier: MIT
"""A lock for many readers or one writer, which is safe in forked processes."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator


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


class Changing:
    """What threads change, and a forked process inherits: never in the middle of a change.

    Parameters
    ----------
    in_child : bound method
        Called in a forked process. Locks and open files are the parent's: they must be let go of,
        not used.

    Attributes
    ----------
    lock : RLock
        Held while something changes, on the disk and in memory; forks wait for it.
    """

    def __init__(self, in_child: Callable[[], None]) -> None:
        self.lock = threading.RLock()
        # An object, whose method it is, may be deleted.
        self.in_child = weakref.WeakMethod(in_child)
        _changing.add(self)


_changing: weakref.WeakSet[Changing] = weakref.WeakSet()
_forking = threading.Lock()
_held: list[Changing] = []


def _before_fork() -> None:
    _forking.acquire()
    _held[:] = list(_changing)
    for one in _held:
        one.lock.acquire()


def _in_parent() -> None:
    while _held:
        _held.pop().lock.release()
    _forking.release()


def _in_child() -> None:
    global _forking
    while _held:
        one = _held.pop()
        one.lock = threading.RLock()
        if (in_child := one.in_child()) is not None:
            in_child()
    _forking = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
