# SPDX-License-Identifier: MIT
"""Matches drawn in a report: important candidates are matched again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config import Config
from patchnetvlad.errors import PatchNetVLADError
from patchnetvlad.plots.spread import MAX_LINES, spread_out
from patchnetvlad.report.queries import (
    CHANGED,
    HURT,
    NO_ANSWER,
    RESCUED,
    RIGHT,
    UNCHANGED,
    WRONG,
    Table,
)
from patchnetvlad.report.results import Results, image_locations

if TYPE_CHECKING:
    import torch

_FAR = 1000  # of a coordinate in a picture: parts of its width or height

_MOST_LINES = 60  # in the page, a patch size

Lines = list[tuple[int, list[int], int]]
"""A patch size: the number of matches; x, y, x, y in thousandths of those that are in the page; how
many of them, from the first, are drawn at first."""


def match_again(
    results: Results, table: Table, most: int, given: bool, device: str, progress: bool
) -> dict[int, dict[int, Lines]]:
    """Match queries again with important candidates; return lines by query and index row.

    Features that the user ``given`` must be good; those that the run names may be gone.

    Parameters
    ----------
    results : Results
    table : Table
    most : int
        Queries whose matches are drawn, at most.
    given : bool
        Whether the user named the features.
    device : str
    progress : bool

    Returns
    -------
    dict
        Lines by query and row of the index list.
    """
    from patchnetvlad.base.device import choose_device

    target = choose_device(device)
    config = results.config
    if not most or results.record.reranked is None:
        return {}
    if config is None or not results.locations.get("query_features"):
        results.notes.append(
            "Matched patches are not drawn: it is not known where the features are. Give "
            "--query_input_features_dir and --index_input_features_dir"
            + (", and --config_path." if config is None else ".")
        )
        return {}
    order = sorted(
        range(len(table.status)),
        key=lambda q: f"{RESCUED}{HURT}{WRONG}{CHANGED}{RIGHT}{UNCHANGED}{NO_ANSWER}".index(
            table.status[q]
        ),
    )[:most]
    jobs = [(q, _worth_matching(results, table, q)) for q in order]
    drawn: dict[int, dict[int, Lines]] = {}
    try:
        for q, row, lines in _matched(results, config, jobs, target, progress):
            drawn.setdefault(q, {})[row] = lines
    except PatchNetVLADError as error:
        if given:
            raise
        what = "are not drawn" if not drawn else f"are drawn for {len(drawn)} queries only"
        results.notes.append(f"Matched patches {what}: {error}")
        return drawn
    if len(order) < len(table.status):
        results.notes.append(
            f"Matched patches are drawn for {len(order)} of {len(table.status)} queries, those "
            "that re-ranking rescued or hurt and wrong ones first; --matches sets how many."
        )
    return drawn


def _worth_matching(results: Results, table: Table, q: int) -> list[int]:
    """Return the first answers before and after, and the first right one."""
    record = results.record
    rows = [int(record.final[q, 0]), int(record.retrieved[q, 0])]
    if record.method in table.first:
        if table.first[record.method][q] >= 0:
            rows.append(int(record.final[q, table.first[record.method][q]]))
        elif table.nearest[q] >= 0:
            rows.append(int(table.nearest[q]))
    return list(dict.fromkeys(rows))


def _matched(
    results: Results,
    config: Config,
    jobs: Sequence[tuple[int, Sequence[int]]],
    device: torch.device,
    progress: bool,
) -> Any:
    import torch
    from tqdm import tqdm

    from patchnetvlad.base.device import arithmetic, choose_precision
    from patchnetvlad.datasets.images import native_size
    from patchnetvlad.engines.readers import patch_readers
    from patchnetvlad.features.open import open_reader
    from patchnetvlad.matching.pair import match_pair
    from patchnetvlad.models.grid import patch_grids

    config.check_matching()
    roots = results.roots()
    names = (results.query_names, results.index_names)
    readers = [
        open_reader(results.locations.get(f"{what}_features", ""), of, config, root)
        for what, of, root in zip(("query", "index"), names, roots, strict=True)
    ]
    patches: list[Any] = list(patch_readers(config, readers, device))

    def frame(which: int, i: int) -> tuple[Any, NDArray[np.float64]]:
        """Return the grids of an image, and its (width, height)."""
        size = config.match_image_size
        if size == (0, 0):
            size = native_size(image_locations([names[which][i]], roots[which])[0])
        grids = patch_grids(size, config.patch_sizes, config.strides, config.geometry)
        return grids, np.array([size[1], size[0]], dtype=np.float64)

    bar = tqdm(jobs, desc="Matching patches", unit="query", disable=not progress)
    precision = choose_precision(config.precision, device)
    with torch.inference_mode(), arithmetic(device, precision):
        for q, rows in bar:
            query = patches[0](q)
            grids, size = frame(0, q)
            for row in rows:
                theirs, their_size = frame(1, row)
                found = match_pair(
                    query, patches[1](row), grids, theirs, config.matcher, config.ransac
                )
                ends = [
                    np.hstack([
                        ours.keypoints[match.query_patches] / size,
                        other.keypoints[match.candidate_patches] / their_size,
                    ])
                    for match, ours, other in zip(found, grids, theirs, strict=True)
                ]  # fmt: skip
                yield q, row, _lines(ends)


def _lines(ends: Sequence[NDArray[np.float64]]) -> Lines:
    """Choose from the ends [m, 4] of matches, one array per patch size, those to show."""
    lines: Lines = []
    for of, few in zip(ends, spread_out(ends, MAX_LINES), strict=True):
        rest = np.setdiff1d(np.arange(len(of)), few)
        more = min(len(rest), _MOST_LINES - len(few))
        rest = rest[np.linspace(0, len(rest) - 1, more).astype(int)]  # evenly
        chosen = (of[np.concatenate([few, rest])] * _FAR).round().astype(int)
        lines.append((len(of), chosen.ravel().tolist(), len(few)))
    return lines
