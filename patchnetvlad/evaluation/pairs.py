# SPDX-License-Identifier: MIT
"""Pairs of query and index images, in the text formats of kapture 1.0 and 1.1."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import replace_text
from patchnetvlad.errors import ImageListError

logger = logging.getLogger(__name__)

HEADER = "# kapture format: 1.0\n# query_image, map_image\n"
SCORED_HEADER = "# kapture format: 1.1\n# query_image, map_image, score\n"


def write_pairs(
    path: Path,
    query_names: Sequence[str],
    index_names: Sequence[str],
    predictions: NDArray[np.integer],
) -> None:
    """Write the candidates of every query, best first, one pair per line.

    Parameters
    ----------
    path : Path
        Replaced as a whole; its folder must exist.
    query_names, index_names : sequence of str
        Names of Q and N images.
    predictions : ndarray [Q, k] of int
        Rows of ``index_names``.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    for name in (*query_names, *index_names):
        if ", " in name:
            logger.warning("%s: names such as %r hold the separator ', '", path.name, name)
            break
    pairs = (
        f"{name}, {index_names[i]}\n"
        for name, candidates in zip(query_names, predictions, strict=True)
        for i in candidates
    )
    replace_text(path, (HEADER, *pairs))


def write_scored_pairs(
    path: Path,
    query_names: Sequence[str],
    index_names: Sequence[str],
    predictions: NDArray[np.integer],
    scores: NDArray[np.floating],
) -> None:
    """Write the candidates of every query with their scores, best first, one pair per line.

    kapture's tools order the candidates of a query by score, largest first, and look at the order
    of the lines only where scores are equal. It is said in the log where the two orders differ.

    Parameters
    ----------
    path : Path
        Replaced as a whole; its folder must exist.
    query_names, index_names : sequence of str
        Names of Q and N images.
    predictions : ndarray [Q, k] of int
        Rows of ``index_names``.
    scores : ndarray [Q, k] of float
        Of the candidates in ``predictions``; larger is more similar.

    Raises
    ------
    ValueError
        The shapes differ, or scores are not finite.
    ImageListError
        A name that kapture would read as something else.
    OutputError
        The file cannot be written.
    """
    if scores.shape != predictions.shape:
        raise ValueError(
            f"scores of shape {list(scores.shape)} for predictions of {list(predictions.shape)}"
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(scores))} scores are not finite")
    check_names(query_names, index_names)
    rising = np.count_nonzero((scores[:, 1:] > scores[:, :-1]).any(axis=1))
    if rising:
        logger.info(
            "%s: the scores of %d of %d queries do not fall from line to line; readers that sort "
            "by score see another order",
            path.name,
            rising,
            len(scores),
        )
    pairs = (
        f"{name}, {index_names[i]}, {score!s}\n"
        for name, candidates, row in zip(query_names, predictions, scores, strict=True)
        for i, score in zip(candidates, row, strict=True)
    )
    replace_text(path, (SCORED_HEADER, *pairs))


def check_names(query_names: Sequence[str], index_names: Sequence[str]) -> None:
    """Raise ImageListError if kapture 1.1, which has no quotes, cannot represent a name."""
    for name in (*query_names, *index_names):
        if re.search(r"[,\r\n]", name) or name != name.strip() or name.startswith("#"):
            raise ImageListError(
                f"the name {name!r} cannot stand in a file of kapture 1.1, which separates by "
                "commas, ignores blanks around names and lines that begin with '#'; rename the "
                "image, or export csv"
            )
