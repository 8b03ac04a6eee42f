# SPDX-License-Identifier: MIT
"""The lock that allows one writer at a time in a folder of features."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from patchnetvlad.base.files import drop_link, remove_leftovers
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.names import write_error

logger = logging.getLogger(__name__)

LOCK_FILE = "features.lock"
_BUSY = (
    "another process is extracting into {folder}; wait for it, or name another "
    "--output_features_dir"
)


@contextlib.contextmanager
def locked(folder: Path, busy: str = _BUSY) -> Iterator[None]:
    """Keep other processes from writing to a folder; delete what killed ones have left.

    If another process writes there, ``busy`` is the message of the FeatureError, with the folder in
    place of ``{folder}``.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        drop_link(folder / LOCK_FILE)
        lock.acquire(timeout=0)
    except Timeout:
        raise FeatureError(busy.format(folder=folder)) from None
    except NotImplementedError:
        logger.warning("%s has no locks: let one process at a time write to it", folder)
    except OSError as error:
        raise write_error(folder, error.strerror or error) from None
    remove_leftovers(folder)
    try:
        yield
    finally:
        lock.release()
