# SPDX-License-Identifier: MIT
"""Writing a report: one HTML file with every query of a run, its candidates and its matches."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from patchnetvlad.base.arguments import checked
from patchnetvlad.base.files import check_inputs_stay, replacing
from patchnetvlad.base.names import is_remote
from patchnetvlad.config import Config
from patchnetvlad.errors import OutputError, ResultsError
from patchnetvlad.pipeline.run_record import RUN_FILES
from patchnetvlad.report.html import PageContent, render
from patchnetvlad.report.images import Pictures, make_pictures
from patchnetvlad.report.matches import match_again
from patchnetvlad.report.page import (
    number_images,
    page_content,
    picture_blocks,
    query_details,
)
from patchnetvlad.report.queries import RIGHT, UNCHANGED, Table
from patchnetvlad.report.results import Results, image_locations, load_results

logger = logging.getLogger(__name__)
MB = 1_000_000


@checked
def write_report(
    results_dir: str | Path,
    output: str | Path | None = None,
    *,
    title: str | None = None,
    max_mb: float = 50,
    candidates: int = 5,
    matches: int = 200,
    config: Config | str | Path | None = None,
    query_list: str | Path | None = None,
    index_list: str | Path | None = None,
    query_features: str | Path | None = None,
    index_features: str | Path | None = None,
    dataset_root: str | Path | None = None,
    ground_truth: str | Path | None = None,
    threshold: float | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Path:
    """Write one HTML file that shows the results of matching a data set.

    The file contains its pictures and loads nothing else. Arguments that are not given are taken
    from the ``run.json`` of the results. Without it, the page shows what it can from the
    predictions, ``metrics.json`` and the arguments, and says what is missing.

    Parameters
    ----------
    results_dir : str or Path
        Results folder written by ``feature_match``.
    output : str or Path, optional
        By default ``report.html`` in the results folder. Replaced atomically.
    title : str, optional
        By default the name of the protocol, or of the folder and its parent.
    max_mb : float, default 50
        Maximum size of the file in MB (10^6 bytes): pictures are reduced, then left out, to fit.
    candidates : int, default 5
        Candidates to show per query, before and after re-ranking; always includes the first
        right one.
    matches : int, default 200
        Maximum number of queries with matched patches; rescued, hurt and wrong ones come first.
        They are matched again, which takes a moment each.
    config : Config or str or Path, optional
    query_list, index_list, query_features, index_features, dataset_root : str or Path, optional
        Override those of the run, for data that moved.
    ground_truth : str or Path, optional
    threshold : float, optional
        Distance within which an index image is a positive; overrides that of the run, or of the
        ground truth if the run had none.
    device : str, default "auto"
        Device on which patches are matched.
    progress : bool, default True
        Show progress bars on stderr.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    PatchNetVLADError
        There are no results, they are damaged, an argument does not fit them, or the file cannot
        be written. Data named only in ``run.json`` that is missing is left out of the page, which
        says so.
    """
    if not 0 < max_mb < np.inf:
        raise ResultsError(f"max_mb = {max_mb:g} must be a number more than 0")
    if candidates < 1 or matches < 0:
        raise ResultsError(
            f"candidates = {candidates} must be 1 or more, and matches = {matches} 0 or more"
        )
    if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
        raise ResultsError(f"the distance for a positive is {threshold:g}; it must be 0 or more")
    folder = Path(results_dir)
    results = load_results(
        folder, config, query_list, index_list, ground_truth, threshold, dataset_root
    )
    target = Path(output) if output is not None else folder / "report.html"
    if query_features is not None:
        results.locations["query_features"] = str(query_features)
    if index_features is not None:
        results.locations["index_features"] = str(index_features)
    if dataset_root is not None:
        results.locations["dataset_root"] = str(dataset_root)
    _check_output(target, folder, results)
    table = Table.of(results)
    shown = [table.shown(q, candidates) for q in range(len(results.query_names))]
    given = query_features is not None or index_features is not None
    drawn = match_again(results, table, matches, given, device, progress)
    ids = number_images(results, shown)
    details = [
        query_details(q, of, results, table, ids, drawn.get(q, {})) for q, of in enumerate(shown)
    ]
    page = page_content(folder, results, table, candidates, ids, details, title)
    room = int(max_mb * MB)
    least = sum(map(len, render(page)))
    # An image's ratio and number stand in the data, its picture in a block, which has a name.
    room_for_pictures = room - least - 4000 - 32 * len(page.image_names)
    if room_for_pictures < 0:
        raise ResultsError(
            f"the page has {least / MB:.1f} MB without any picture; give --max_mb more than "
            f"{max_mb:g}, or fewer --candidates or --matches"
        )
    pictures = make_pictures(
        _image_paths(results, page),
        _wanted_large(page.data["status"], page.data["answer"], details),
        room_for_pictures,
        progress=progress,
    )
    page = _add_pictures(page, pictures)
    with replacing(target) as file:
        size = sum(file.write(piece) for piece in render(page))
    logger.info("%s: %.1f MB; %s", target, size / MB, "; ".join(page.made))
    for note in page.notes:
        logger.info("%s", note)
    return target


def _check_output(file: Path, folder: Path, results: Results) -> None:
    """Refuse what cannot be written, and what the page is made from, before any work."""
    try:
        where = file.resolve()
        free = not where.exists() and not where.is_symlink()
        good = where.parent.is_dir() and (where.is_file() or free)
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links
        raise OutputError(f"{file} cannot be written: {error}; name another file") from None
    if not good:
        raise OutputError(f"{file} cannot be written: name a file in a folder that exists")
    named = (*RUN_FILES, "metrics.json", "recalls.txt")
    if where.parent == folder.resolve() and (
        where.name in named or where.name.endswith("_predictions.txt")
    ):
        raise OutputError(f"{file} is one of the results; name another file")
    if where.exists():
        check_inputs_stay([file], _inputs(folder, named, results))


def _inputs(folder: Path, named: Sequence[str], results: Results) -> Iterator[str | Path | None]:
    """Yield what the page may be made from."""
    yield from (folder / name for name in named)
    yield from folder.glob("*_predictions.txt")
    yield from results.given.values()
    if results.config is not None:
        yield results.config.source
    if (origin := results.origin) is not None:
        yield from (origin.query_list, origin.index_list, origin.ground_truth, origin.candidates)
        yield origin.config.source
    for features in (results.locations.get(f"{what}_features") for what in ("query", "index")):
        if features and not is_remote(features) and Path(features).is_dir():
            yield from Path(features).iterdir()
    names = results.query_names, results.index_names
    for listed, root in zip(names, results.roots(), strict=True):
        yield from image_locations(listed, root)


def _image_paths(results: Results, page: PageContent) -> list[Path | str]:
    parts = page.image_names[: page.num_queries], page.image_names[page.num_queries :]
    pairs = zip(parts, results.roots(), strict=True)
    return [place for names, root in pairs for place in image_locations(names, root)]


def _wanted_large(
    status: str, answers: Sequence[int], details: Sequence[dict[str, Any]]
) -> list[int]:
    """Name images in the order in which a larger picture is worth its room.

    First those that lines are drawn over, then first answers, then the other candidates; those of
    right queries come after the others.
    """
    order = sorted(range(len(status)), key=lambda q: status[q] in (RIGHT, UNCHANGED))
    found: dict[int, None] = {}
    for q in order:
        for shown, *_ in details[q].get("m", []):
            found |= dict.fromkeys((q, details[q]["c"][shown][0]))
    for q in order:
        found |= dict.fromkeys((q, answers[q]))
    for q in order:
        found |= dict.fromkeys(candidate[0] for candidate in details[q]["c"])
    return list(found)


def _add_pictures(page: PageContent, pictures: Pictures) -> PageContent:
    data, blocks, made, notes = picture_blocks(pictures)
    return replace(
        page,
        data={**page.data, **data},
        blocks={**page.blocks, **blocks},
        made=made,
        notes=[*page.notes, *notes],
    )
