# SPDX-License-Identifier: MIT
"""The content of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.datasets.ground_truth import CLIP_DISTANCE, GroundTruth
from patchnetvlad.evaluation.per_query import Intervals
from patchnetvlad.evaluation.recall import recall_at_n
from patchnetvlad.pipeline.record import RunRecord
from patchnetvlad.plots.drawing import COLOURS
from patchnetvlad.plots.maps import on_map
from patchnetvlad.report.html import NAMES, Interval, PageContent, json_block, wilson_interval
from patchnetvlad.report.images import Pictures
from patchnetvlad.report.matches import Lines
from patchnetvlad.report.queries import Shown, Table
from patchnetvlad.report.results import Results, file_name

_DETAIL_CHUNK = 100  # queries whose details stand in one block of JSON
SMALL_CHUNK, LARGE_CHUNK = 64, 8  # pictures


def number_images(results: Results, shown: Sequence[Shown]) -> dict[int, int]:
    """Number the index images that are shown, after the queries, by row.

    They go in the order of the queries that show them, so that those of one query stand together.
    """
    ids: dict[int, int] = {}
    for q, of in enumerate(shown):
        rows = [int(results.record.retrieved[q, j]) for j in of.columns]
        for row in rows if of.missed is None else [*rows, of.missed]:
            ids.setdefault(row, len(results.query_names) + len(ids))
    return ids


def page_content(
    folder: Path,
    results: Results,
    table: Table,
    candidates: int,
    ids: dict[int, int],
    details: Sequence[dict[str, Any]],
    title: str | None,
) -> PageContent:
    """Assemble the content of the page; see :class:`~patchnetvlad.report.html.PageContent`."""
    record, origin, config = results.record, results.origin, results.config
    num_queries, k = record.retrieved.shape
    image_names = [*results.query_names, *(results.index_names[row] for row in ids)]
    blocks = {
        f"details-{n}": json_block(details[start : start + _DETAIL_CHUNK])
        for n, start in enumerate(range(0, num_queries, _DETAIL_CHUNK))
    }
    recalls, curves, intervals = _curves(results)
    if title is None:
        title = "/".join(folder.resolve().parts[-2:]).lstrip("/")
        if origin is not None and origin.protocol and not results.changed:
            title = origin.protocol
    return PageContent(
        title=title,
        data=_data(results, table, candidates, ids, image_names),
        blocks=blocks,
        image_names=image_names,
        num_queries=num_queries,
        num_index=len(results.index_names) if results.complete_index else None,
        k=k,
        counts={letter: table.status.count(letter) for letter in dict.fromkeys(table.status)},
        changed_by=_changed_by(record),
        within="" if results.truth is None else _within(results.truth),
        has_truth=results.truth is not None,
        recalls=recalls,
        recall_curves={
            results.name(method): recall_at_n(found, results.positives, range(1, k + 1))
            for method, found in results.answers().items()
            if results.positives is not None
        },
        precision_recall=curves,
        intervals=intervals,
        calibrations={
            results.name(method): of.calibration
            for method, of in results.metrics.items()
            if of.calibration is not None
        },
        selection=record.selection,
        usual=table.usual,
        patches=dict(zip(config.patch_sizes, table.patches, strict=False)) if config else {},
        citation=_citation(results),
        provenance=_provenance(results),
        notes=list(results.notes),
        made=[],
    )


def _data(
    results: Results, table: Table, candidates: int, ids: dict[int, int], image_names: list[str]
) -> dict[str, Any]:
    """Return what the script shows of all queries."""
    record, config = results.record, results.config
    num_queries, k = record.retrieved.shape
    reranked = record.final is not record.retrieved
    final, score = record.final, record.scores.get(record.method)
    sure = record.confidences.get(record.method)
    best = table.after.argmin(axis=1)[:, None]
    away = None if table.distances is None else np.take_along_axis(table.distances, best, 1)[:, 0]
    return {
        "queries": num_queries,
        "names": image_names,
        "prefix": common_folder(image_names),
        "status": table.status,
        "answer": [ids[int(row)] for row in final[:, 0]],
        "before": _plain_ranks(table.first.get("NetVLAD")),
        "after": _plain_ranks(table.first.get(record.method) if reranked else None),
        "score": None if score is None else _numbers(score[:, 0]),
        "confidence": None if sure is None else _numbers(100 * sure.round(3)),
        "distance": None if away is None else _numbers(away),
        "k": k,
        "reranked": reranked,
        "final": NAMES.get(record.method, record.method),
        "sizes": list(config.patch_sizes) if config and reranked else [],
        "scored": record.patch_scores is not None,
        "inliers": config is not None and config.matcher == "RANSAC",
        "colours": list(COLOURS),
        "shown": candidates,
        "threshold": None if results.truth is None else results.truth.distance,
        "unit": "" if results.truth is None else results.truth.unit,
        "patches": list(table.patches),
        "usual": [asdict(usual) for usual in table.usual],
        "detailChunk": _DETAIL_CHUNK,
        "smallChunk": SMALL_CHUNK,
        "largeChunk": LARGE_CHUNK,
        "map": _map(results.truth, list(ids)),
    }


def picture_blocks(
    pictures: Pictures,
) -> tuple[dict[str, Any], dict[str, str], list[str], list[str]]:
    """Return pictures as a page has them.

    Parameters
    ----------
    pictures : Pictures

    Returns
    -------
    data : dict
        For the script.
    blocks : dict of str to str
        JSON by the id of its element.
    made, notes : list of str
        How the pictures were made, and what is missing.
    """
    blocks = {}
    for n, start in enumerate(range(0, len(pictures.small), SMALL_CHUNK)):
        part = pictures.small[start : start + SMALL_CHUNK]
        if any(part):
            blocks[f"small-{n}"] = json_block(part)
    large = list(pictures.large.items())
    for n, start in enumerate(range(0, len(large), LARGE_CHUNK)):
        blocks[f"large-{n}"] = json_block([text for _, text in large[start : start + LARGE_CHUNK]])
    data = {
        "media": pictures.media_type,
        "ratios": [None if ratio is None else round(ratio, 3) for ratio in pictures.ratios],
        "large": [i for i, _ in large],
    }
    count = len(pictures.small)
    made = []
    if pictures.small_level is not None:
        made.append(
            f"{count - pictures.small.count(None)} of {count} images have a small picture "
            f"({pictures.small_level})"
        )
    made.append(
        f"{len(large)} a larger one ({pictures.large_level})" if large else "none has a larger one"
    )
    notes = []
    if pictures.left_out:
        notes.append(
            f"{pictures.left_out} images have no picture, for lack of room: give --max_mb more."
        )
    if pictures.broken:
        notes.append(
            f"{len(pictures.broken)} of {count} images cannot be shown, first: "
            f"{next(iter(pictures.broken.values()))}. Is --dataset_root_dir right?"
        )
    return data, blocks, made, notes


def query_details(
    q: int,
    of: Shown,
    results: Results,
    table: Table,
    ids: dict[int, int],
    drawn: dict[int, Lines],
) -> dict[str, Any]:
    """Return the candidates of a query, and its matches.

    A candidate is [image, rank before, rank after, score of NetVLAD, of Patch-NetVLAD, scores a
    patch size, distance, right]; ranks count from 1, 0 is for an image that is no candidate.

    See :class:`~patchnetvlad.report.results.Results` and
    :class:`~patchnetvlad.report.queries.Table`; ``ids`` are the numbers of shown images by row,
    ``drawn`` the lines by row.
    """
    record = results.record
    netvlad = record.scores.get("NetVLAD")
    rows: list[list[Any]] = []
    matches: list[list[Any]] = []

    def add(row: int, *more: Any) -> None:
        if row in drawn:
            matches.append([len(rows), *drawn[row]])
        rows.append([ids[row], *more])

    for j in of.columns:
        known = record.was_reranked is None or record.was_reranked[q]
        sizes = None if record.patch_scores is None or not known else record.patch_scores[q, j]
        add(
            int(record.retrieved[q, j]),
            j + 1,
            int(table.after[q, j]) + 1,
            None if netvlad is None else _number(netvlad[q, j]),
            None if table.raw is None else _number(table.raw[q, j]),
            None if sizes is None else _numbers(sizes),
            None if table.distances is None else _number(table.distances[q, j]),
            None if table.right is None else int(table.right[q, j]),
        )
    if of.missed is not None:
        assert results.truth is not None
        truth = results.truth
        away = float(np.linalg.norm(truth.utm_index[of.missed] - truth.utm_queries[q]))
        distance = None if truth.distance is None else _number(away)
        add(of.missed, 0, 0, None, None, None, distance, 1)
    return {"c": rows, "m": matches} if matches else {"c": rows}


def _within(truth: GroundTruth) -> str:
    """Say what is right; empty where it is named, not near."""
    if truth.distance is None:
        return ""
    if truth.unit != "frames":
        return (
            f"within {truth.threshold:g} {truth.unit or 'of'} {'of ' * bool(truth.unit)}the query"
        )
    frames = f"{truth.threshold:g} frame{'' if truth.threshold == 1 else 's'}"
    clip = ", in the same clip" if truth.has_clips else ""
    return f"within {frames} of the query{clip}"


def _changed_by(record: RunRecord) -> str:
    """Name what orders the candidates after retrieval, as the subject of a sentence."""
    steps = [("re-ranking", record.reranked), ("sequences", record.sequenced)]
    return " and ".join(name for name, rows in steps if rows is not None).capitalize()


def common_folder(names: Sequence[str]) -> str:
    """Return the folders that all names begin with, with the slash that ends them; "" for none."""
    first, last = min(names), max(names)
    same = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )
    return first[: first.rfind("/", 0, same) + 1]


def _number(value: float) -> float | None:
    """Return a number as short as it may be in a table."""
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _numbers(values: NDArray[np.floating]) -> list[float | None]:
    return [_number(float(value)) for value in values]


def _plain_ranks(first: NDArray[np.int64] | None) -> list[int] | None:
    """Return ranks from 1; 0 for none."""
    return None if first is None else (first + 1).tolist()


def _map(truth: GroundTruth | None, ids: Sequence[int]) -> dict[str, Any] | None:
    """Return positions as whole numbers of a unit that no eye can see, from a corner."""
    if truth is None or truth.distance is None:
        return None
    queries, index = truth.utm_queries, truth.utm_index
    clips = 0
    if truth.has_clips:
        queries, index, _ = on_map(queries, index, truth.unit)
        clips = round(float(np.ptp(truth.utm_index[:, 0]))) // round(CLIP_DISTANCE) + 1
        # A clip as wide as the longest is high, so that both are whole numbers of one unit.
        wide = max(float(np.ptp(truth.utm_index[:, 1])), 1.0)
        queries, index = queries * [wide, 1], index * [wide, 1]
    both = np.concatenate([queries, index])
    one = both.shape[1] == 1
    if one:  # along one axis: queries above, index images below
        both = np.hstack([both, np.zeros_like(both)])
    low, high = both[:, :2].min(axis=0), both[:, :2].max(axis=0)
    extent: NDArray[np.float64] = high - low
    unit = max(float(extent.max()) / 20_000, 1e-12)
    points = ((both[:, :2] - low) / unit).round().astype(int)
    split = len(truth.utm_queries)
    if one:
        points[:split, 1] = max(1, int(points.max()) // 12)
    return {
        "queries": points[:split].ravel().tolist(),
        "index": points[split:].ravel().tolist(),
        "rows": ids,  # of the index images that are shown
        "extent": extent.tolist(),
        "line": one,
        "clips": clips,
    }


def _curves(
    results: Results,
) -> tuple[
    dict[str, list[tuple[int, float, Interval | None, Interval]]],
    dict[str, dict[str, Any]],
    dict[str, Intervals],
]:
    """Return recalls with intervals, precision-recall as in ``metrics.json``, and the intervals."""
    total = len(results.query_names)
    found = {method: metrics.to_dict() for method, metrics in results.metrics.items()}
    if not found:
        stored, known = results.stored.get("methods", {}), results.answers()
        found = {method: of for method, of in stored.items() if method in known}
    truth, rule = results.truth, results.about.get("ground_truth") or {}
    as_stored = truth is None or (
        truth.distance == rule.get("threshold")
        and "ground_truth" in results.same_files
        and not results.changed
    )
    recalls = {}
    curves = {}
    intervals = {}
    for method, of in found.items():
        name = results.name(method)
        drawn = of.get("intervals") or {}
        ends = drawn.get("recall", {})
        recalls[name] = [
            (
                int(n),
                float(value),
                (float(ends[n][0]), float(ends[n][1])) if n in ends else None,
                wilson_interval(round(float(value) * total), total),
            )
            for n, value in of.get("recall", {}).items()
        ]
        if drawn:
            intervals[name] = Intervals.from_dict(drawn, [int(n) for n in of["recall"]])
        curve = of.get("precision_recall")
        if not curve and as_stored:
            curve = results.stored.get("methods", {}).get(method, {}).get("precision_recall")
        if curve:
            curves[name] = curve
    return recalls, curves, intervals


def _citation(results: Results) -> str:
    if results.changed:
        return ""
    if results.origin is not None:
        return results.record.citation
    return str(results.about.get("citation") or "")


def _provenance(results: Results) -> list[tuple[str, str]]:
    """Say where the numbers come from, a name and a text each.

    Files go without their folders, as in ``metrics.json``: reports are handed on.
    """
    origin, stored, given = results.origin, results.about, results.given
    lines: list[tuple[str, object]] = []

    def file(part: str, ran: str | None) -> str:
        return given[part].name if part in given else file_name(ran)

    if origin is not None:
        versions = ", ".join(f"{name} {number}" for name, number in origin.versions.items())
        lines += [("Date", origin.date), ("Versions", versions)]
        protocol = origin.protocol
    else:
        lines += [("Date", stored.get("date")), ("Version", stored.get("version"))]
        protocol = stored.get("protocol")
    lines.append(("Protocol", None if results.changed else protocol))
    # Another one is for matching again alone.
    config = origin.config if origin is not None else results.config
    if config is not None:
        weights = f"{Path(config.resume_path).name}{config.num_pcs or ''}"
        lines += [("Configuration", Path(config.source).name), ("Weights", weights)]
    checkpoint = origin.checkpoint if origin else stored.get("checkpoint", {}).get("sha256")
    lines.append(("SHA-256 of the weights", checkpoint))
    if origin is not None:
        lines += [
            ("Queries", f"{len(results.query_names)} images, {file('queries', origin.query_list)}"),
            ("Index", f"{len(results.index_names)} images, {file('index', origin.index_list)}"),
            ("Ground truth", file("ground_truth", origin.ground_truth)),
            ("Candidates of another method", file_name(origin.candidates)),
        ]
    else:
        lines += [
            (name, given[part].name)
            for part, name in (("queries", "Queries"), ("index", "Index"),
                               ("ground_truth", "Ground truth"))
            if part in given
        ]  # fmt: skip
    for part, name in (("queries", "query list"), ("index", "index list"),
                       ("ground_truth", "ground truth")):  # fmt: skip
        of = stored.get(part)
        replaced = (part in given or part in results.changed) and part not in results.same_files
        if isinstance(of, dict) and of.get("sha256") and not replaced:
            lines.append((f"SHA-256 of the {name}", f"{of['sha256']} ({of.get('file')})"))
    if config is not None:
        for entry in sorted(vars(config)):
            if entry != "source":
                value = getattr(config, entry)
                is_file = entry.endswith("_path") or entry == "confidence"
                value = file_name(value) if is_file else value
                text = ", ".join(map(str, value)) if isinstance(value, tuple) else value
                lines.append((entry, text))
    return [(name, str(text)) for name, text in lines if text not in (None, "")]
