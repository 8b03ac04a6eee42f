# SPDX-License-Identifier: MIT
"""Processes that are killed at any call that changes files: before, amid or after it."""

from __future__ import annotations

import builtins
import io
import itertools
import os
import signal
import sqlite3
import traceback

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")

CALLS = (
    "replace", "rename", "unlink", "remove", "mkdir", "rmdir", "link", "symlink", "truncate",
    "ftruncate", "fsync", "utime",
)  # fmt: skip
"""Functions of ``os`` that change files; those that write bytes are apart."""


def fork(work):
    """Call ``work`` in a process of its own."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def killed(work, moment, more=()):
    """Call ``work`` in a process that is killed at a moment; False if it ended before that."""

    def die():
        die_at(moment, more)
        work()

    _, status = os.waitpid(fork(die), 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def die_at(moment, more=()):
    """Make this process kill itself at one of the moments, from 0, when files change.

    They are before and after each call of Python that changes files, and before each statement of
    SQLite, of which all pages are on the disk before they are committed. Before a call that writes
    bytes, half of them are written. ``more`` are further methods that count: types and names.
    """
    moments = itertools.count()

    def pass_by():
        if next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(call, half=None):
        def replacement(*arguments, **keywords):
            if half is not None and next(moments) == moment:
                call(*half(*arguments), **keywords)
                os.kill(os.getpid(), signal.SIGKILL)
            elif half is None:
                pass_by()
            result = call(*arguments, **keywords)
            pass_by()
            return result

        return replacement

    for owner, name in [*((os, name) for name in CALLS), *more]:
        setattr(owner, name, counted(getattr(owner, name)))
    os.write = counted(os.write, lambda file, data: (file, memoryview(data)[: len(data) // 2]))
    if hasattr(os, "sendfile"):
        os.sendfile = counted(os.sendfile, lambda to, of, at, count: (to, of, at, count // 2))
    _count_opening(counted)
    _count_sqlite(counted, pass_by)


def _count_opening(counted):
    """Count files that are opened to be written, and what is written to them."""
    plain_open, plain_io = os.open, io.open
    open_to_write, io_to_write = counted(plain_open), counted(plain_io)
    writing = counted(io.FileIO.write, lambda file, data: (file, data[: len(data) // 2]))

    class Raw(io.FileIO):
        def write(self, data):
            return writing(self, memoryview(data).cast("B"))

    def os_open(path, flags, *rest, **keywords):
        changes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        return (open_to_write if changes else plain_open)(path, flags, *rest, **keywords)

    def io_open(file, mode="r", buffering=-1, *rest, **keywords):
        if not set(mode) & set("wax+") or isinstance(file, int):
            return plain_io(file, mode, buffering, *rest, **keywords)
        if "b" not in mode:
            return io_to_write(file, mode, buffering, *rest, **keywords)
        raw = counted(Raw)(os.fspath(file), mode.replace("b", ""))
        if buffering == 0:
            return raw
        return (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)

    os.open = os_open
    io.open = builtins.open = io_open


def _count_sqlite(counted, pass_by):
    """Count the statements of SQLite that change something."""
    connect = counted(sqlite3.connect)

    class Connection(sqlite3.Connection):
        backup = counted(sqlite3.Connection.backup)
        close = counted(sqlite3.Connection.close)

    def trace(statement):
        if not statement.lstrip().upper().startswith(("SELECT", "PRAGMA")):
            pass_by()

    def opened(*arguments, **keywords):
        db = connect(*arguments, factory=Connection, **keywords)
        db.execute("PRAGMA cache_size = 1")
        db.set_trace_callback(trace)
        return db

    sqlite3.connect = opened
