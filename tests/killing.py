# SPDX-License-Identifier: MIT
"""Processes that are killed before a call that changes files."""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import traceback

import numpy as np
import pytest

from patchnetvlad.features.store.index import StoreIndex

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")


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


def die_before(count, more=()):
    """Make this process kill itself before call ``count`` that changes files.

    A call of ``os.write`` writes half before. ``more`` are further functions of ``os`` that count.
    """
    calls = itertools.count()

    def counted(call, half=False):
        def replacement(*arguments, **keywords):
            if next(calls) == count:
                if half:
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return replacement

    os.write = counted(os.write, half=True)
    for module, names in (
        (os, ("open", "fsync", "ftruncate", "replace", "unlink", *more)),
        (sqlite3, ("connect",)),
        (StoreIndex, ("add", "remove", "close")),
        (np, ("save",)),
    ):
        for name in names:
            setattr(module, name, counted(getattr(module, name)))
