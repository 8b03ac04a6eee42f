# SPDX-License-Identifier: MIT
"""Rows of an image list by name, and errors about features on disk."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base import files
from patchnetvlad.base.names import normal_name
from patchnetvlad.errors import FeatureError


def rows_by_name(names: Sequence[str]) -> dict[str, list[int]]:
    """Return the rows of each image in a list, by its normal name."""
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        rows.setdefault(normal_name(name), []).append(i)
    return rows


def rows_to_do(names: Sequence[str], done: NDArray[np.bool_]) -> list[int]:
    """Return the first row of each image that is not done in all its rows."""
    return [rows[0] for rows in rows_by_name(names).values() if not done[rows].all()]


_WAY_OUT = "what is written is kept, and the same command resumes from there"


def write_error(directory: Path, reason: object) -> FeatureError:
    """Return the error that features cannot be written; no work is lost."""
    return FeatureError(f"features cannot be written to {directory}: {reason}; {_WAY_OUT}")


def disk_errors(directory: Path) -> contextlib.AbstractContextManager[None]:
    """Turn an OSError into a FeatureError that says what to do."""
    problem = f"features cannot be written to {directory}"
    return files.disk_errors(problem, _WAY_OUT, FeatureError)


def unfinished_error(directory: Path, missing: int) -> FeatureError:
    """Return the error that images of a list have no features yet."""
    return FeatureError(f"{directory}: {missing} images have no features yet")


def check_shared_folder(directory: Path) -> None:
    """Raise FeatureError unless a folder that another process made is on this machine, too."""
    if not directory.is_dir():
        raise FeatureError(
            f"node {socket.gethostname()} has no folder {directory}; images and features must lie "
            "in folders that all nodes share, or in object storage"
        )
