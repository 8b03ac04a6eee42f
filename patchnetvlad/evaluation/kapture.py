# SPDX-License-Identifier: MIT
"""Pairs of query and index images, in the text format of kapture 1.0."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

HEADER = "# kapture format: 1.0\n# query_image, map_image\n"


def write_pairs(
    path: Path,
    query_names: Sequence[str],
    index_names: Sequence[str],
    predictions: NDArray[np.integer],
) -> None:
    """Write the candidates of every query, best first, a pair a line.

    Parameters
    ----------
    path : Path
        Replaced as a whole; its folder must exist.
    query_names, index_names : sequence of str
        Names of Q and N images.
    predictions : ndarray [Q, k] of int
        Rows of ``index_names``.
    """
    for name in (*query_names, *index_names):
        if ", " in name:
            logger.warning("%s: names such as %r hold the separator ', '", path.name, name)
            break
    temporary = path.with_name(f"{path.name}.part")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(HEADER)
        for name, candidates in zip(query_names, predictions, strict=True):
            file.writelines(f"{name}, {index_names[i]}\n" for i in candidates)
    temporary.replace(path)
