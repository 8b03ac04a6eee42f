# SPDX-License-Identifier: MIT
"""Detecting ground truth for which recalls say little about the method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.names import normal_name
from patchnetvlad.base.text import some

_NEARLY_ALL = 0.9  # of the index images are right answers


def doubts(
    positives: Sequence[NDArray[np.integer] | Sequence[int]],
    query_names: Sequence[str],
    index_names: Sequence[str],
) -> list[str]:
    """Return reasons not to take recalls with these right answers at face value.

    Parameters
    ----------
    positives : sequence of Q arrays of int
        Rows of the index list.
    query_names, index_names : sequence of str

    Returns
    -------
    list of str
        Empty if nothing speaks against them.

    Examples
    --------
    >>> doubts([[0, 1, 2]], ["q"], ["a", "b", "c"])
    ['every index image is a right answer to every query, so that recalls are 1 whatever ...
    """
    found = []
    shares = np.array([len(right) for right in positives]) / max(1, len(index_names))
    if len(index_names) > 1 and len(shares):
        if shares.min() == 1:
            found.append(
                "every index image is a right answer to every query, so that recalls are 1 "
                "whatever the method: are positions and distance in the same unit?"
            )
        elif shares.mean() > _NEARLY_ALL:
            found.append(
                f"on average {shares.mean():.1%} of the index images are right answers to a query, "
                "so that recalls say little: is the distance right?"
            )
    there = set(map(normal_name, index_names))
    both = [name for name in query_names if normal_name(name) in there]
    if both:
        every = "all" if len(both) == len(query_names) else str(len(both))
        found.append(
            f"{every} of the {len(query_names)} queries are index images, too, and find "
            f"themselves: {some(both)}"
        )
    return found
