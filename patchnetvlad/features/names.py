# SPDX-License-Identifier: MIT
"""Rows of a list by name, and the errors of features on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.names import normal_name
from patchnetvlad.errors import FeatureError


def places_of(names: Sequence[str]) -> dict[str, list[int]]:
    """Say at which places in a list each image stands; repeated ones share their features."""
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(normal_name(name), []).append(i)
    return places


def places_to_do(names: Sequence[str], done: NDArray[np.bool_]) -> list[int]:
    """Return the first place in a list of each image that is not done at all its places."""
    return [places[0] for places in places_of(names).values() if not done[places].all()]


def cannot_write(directory: Path, reason: object) -> FeatureError:
    """Say why features cannot be written, and that no work is lost."""
    return FeatureError(
        f"features cannot be written to {directory}: {reason}; what is written is kept, and the "
        "same command goes on from there"
    )


def unfinished(directory: Path, missing: int) -> FeatureError:
    """Make the error that a list cannot be finished."""
    return FeatureError(f"{directory}: {missing} images have no features yet")


@contextlib.contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Turn an OSError into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise cannot_write(directory, error.strerror or error) from None
