# SPDX-License-Identifier: MIT
"""A report of a run: one HTML file to look at every query, its candidates and its matches."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.assets import file_sha256, resolve_ground_truth
from patchnetvlad.config import Config
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import OutputError, PatchNetVLADError, ResultsError
from patchnetvlad.evaluation.exports import candidate_distances
from patchnetvlad.evaluation.metrics import Metrics, by_method, evaluate_methods, reorder
from patchnetvlad.evaluation.plots import COLOURS
from patchnetvlad.evaluation.recall import recall_at_n
from patchnetvlad.evaluation.report_images import Pictures, make_pictures
from patchnetvlad.evaluation.report_page import PageContent, json_block, render, wilson_interval
from patchnetvlad.evaluation.run_record import RUN_FILE, RUN_FILES, RunRecord, read_config, read_run
from patchnetvlad.files import replacing

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

METHODS = ("NetVLAD", "PatchNetVLAD")
MB = 1_000_000
MAX_LINES = 60
"""Matches drawn a patch size: fewer than in a picture of two images, which is larger."""

_DETAIL_CHUNK = 100  # queries whose details stand in one block of JSON
_SMALL_CHUNK, _LARGE_CHUNK = 64, 8  # pictures
_FAR = 1000  # of a coordinate in a picture: parts of its width or height
_RIGHT, _WRONG, _RESCUED, _HURT, _NO_ANSWER = "r", "w", "s", "h", "n"
_CHANGED, _UNCHANGED = "c", "u"


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

    It needs nothing but a browser: pictures are in it, and it loads nothing. What is not given is
    taken from the ``run.json`` of the results. Without one, the page shows what the predictions,
    ``metrics.json`` and the arguments tell, and says what is missing.

    Parameters
    ----------
    results_dir : str or Path
        What ``feature_match`` wrote.
    output : str or Path, optional
        By default ``report.html`` among the results. Replaced as a whole.
    title : str, optional
        By default the name of the protocol, or of the folder and the one above it.
    max_mb : float, default 50
        Largest size of the file in MB (10^6 bytes): pictures are made smaller, then left out, to
        fit.
    candidates : int, default 5
        Candidates shown of each query, before and after re-ranking; the first right one is
        always among them.
    matches : int, default 200
        Queries whose matched patches are drawn: first those that re-ranking rescued or hurt and
        the wrong ones. They are matched again, which takes a moment each.
    config : Config or str or Path, optional
    query_list, index_list, query_features, index_features, dataset_root : str or Path, optional
        In place of those of the run: for data that moved.
    ground_truth : str or Path, optional
    threshold : float, optional
        Distance of a positive, in place of the run's, or of the ground truth's where the run had
        none.
    device : str, default "auto"
        Where patches are matched.
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
        be written. What only ``run.json`` names and is not there is left out of the page, which
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
    results = _load(folder, config, query_list, index_list, ground_truth, threshold)
    target = Path(output) if output is not None else folder / "report.html"
    _check_output(target, folder)
    if query_features is not None:
        results.places["query_features"] = str(query_features)
    if index_features is not None:
        results.places["index_features"] = str(index_features)
    if dataset_root is not None:
        results.places["dataset_root"] = str(dataset_root)
    table = _Table.of(results)
    shown = [table.shown(q, candidates) for q in range(len(results.query_names))]
    given = query_features is not None or index_features is not None
    drawn = _match_patches(results, table, matches, given, device, progress)
    ids = _image_ids(results, shown)
    details = [_details(q, of, results, table, ids, drawn.get(q, {})) for q, of in enumerate(shown)]
    page = _page(folder, results, table, candidates, ids, details, title)
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


def _check_output(file: Path, folder: Path) -> None:
    """Refuse what cannot be written, and files of feature_match, before any work."""
    try:
        where = file.resolve()
        free = not where.exists() and not where.is_symlink()
        good = where.parent.is_dir() and (where.is_file() or free)
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links
        raise OutputError(f"{file} cannot be written: {error}; name another file") from None
    if not good:
        raise OutputError(f"{file} cannot be written: name a file in a folder that exists")
    results = (*RUN_FILES, "metrics.json", "recalls.txt")
    named = where.name in results or where.name.endswith("_predictions.txt")
    if named and where.parent == folder.resolve():
        raise OutputError(f"{file} is one of the results; name another file")


# What there is ---------------------------------------------------------------------------------


@dataclass(eq=False)
class _Results:
    """All that is known of a run."""

    query_names: Sequence[str]
    index_names: Sequence[str]
    retrieved: NDArray[np.int64]  # [Q, k]
    reranked: NDArray[np.int64] | None
    patch_scores: NDArray[np.float32] | None
    scores: dict[str, NDArray[np.float64]]
    config: Config | None
    run: RunRecord | None
    stored: dict[str, Any]  # metrics.json
    truth: GroundTruth | None = None
    positives: list[NDArray[np.int64]] | None = None
    metrics: dict[str, Metrics] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    complete_index: bool = True
    notes: list[str] = field(default_factory=list)
    given: dict[str, Path] = field(default_factory=dict)  # in place of the run's, by part
    changed: set[str] = field(default_factory=set)  # parts that are other than the run's
    same_files: set[str] = field(default_factory=set)  # parts whose SHA-256 is the run's

    @property
    def about(self) -> dict[str, Any]:
        """Provenance of ``metrics.json``."""
        found: dict[str, Any] = self.stored.get("provenance", {})
        return found

    @property
    def candidates(self) -> str | None:
        """File of candidates that were re-ranked in place of retrieval."""
        return self.run.candidates if self.run is not None else self.about.get("candidates")

    def name(self, method: str) -> str:
        """Return the method's name, which candidates of another method do not have."""
        return "Given candidates" if method == "NetVLAD" and self.candidates else method

    @property
    def n_values(self) -> tuple[int, ...]:
        k = self.retrieved.shape[1]
        wanted = self.config.n_values if self.config else (1, 5, 10, 20, 50, 100)
        return tuple(n for n in dict.fromkeys(wanted) if n <= k) or (1,)

    def answers(self) -> dict[str, NDArray[np.int64]]:
        return by_method(self.retrieved, self.reranked)


def _load(
    folder: Path,
    config: Config | str | Path | None,
    query_list: str | Path | None,
    index_list: str | Path | None,
    ground_truth: str | Path | None,
    threshold: float | None,
) -> _Results:
    if not folder.is_dir():
        raise ResultsError(
            f"there is no folder {folder}; give the --result_save_folder of feature_match"
        )
    if config is not None and not isinstance(config, Config):
        config = Config.load(config)
    lists = [
        ImageList.read(path).names if path is not None else None
        for path in (query_list, index_list)
    ]
    stored = _read_metrics(folder / "metrics.json")
    run = read_run(folder)
    if run is not None:
        results = _of_run(run, stored, lists)
        ran: Config | None = run.config
    else:
        results = _of_predictions(folder, stored, lists)
        ran = _stored_config(folder / "metrics.json", stored)
    results.config = config or ran
    if config is not None and ran is not None:
        _check_sizes(config, ran, run is not None and run.patch_scores is not None)
        if config != replace(ran, source=config.source):
            results.notes.append(
                f"Configuration {Path(config.source).name} in place of the run's, for what is "
                "matched again."
            )
    for part, path in (("queries", query_list), ("index", index_list)):
        if path is not None:
            results.given[part] = Path(path)
    _add_truth(results, ground_truth, threshold)
    _compare_with_run(results, lists, threshold)
    return results


def _of_run(
    run: RunRecord, stored: dict[str, Any], lists: Sequence[tuple[str, ...] | None]
) -> _Results:
    names = [run.query_names, run.index_names]
    for i, (what, given) in enumerate(zip(("query", "index"), lists, strict=True)):
        if given is None:
            continue
        if len(given) != len(names[i]):
            raise ResultsError(
                f"the {what} list names {len(given)} images, the results have {len(names[i])}; "
                "give the list that was matched"
            )
        names[i] = given
    return _Results(
        names[0],
        names[1],
        run.retrieved,
        run.reranked,
        run.patch_scores,
        run.scores,
        run.config,
        run,
        stored,
        places={
            "dataset_root": run.dataset_root,
            "query_features": run.query_features,
            "index_features": run.index_features,
        },
    )


def _check_sizes(given: Config, ran: Config, scored: bool) -> None:
    """Refuse a configuration that cannot be the one of these results."""
    way_out = "give the configuration that was used, or none"
    if scored and given.patch_sizes != ran.patch_sizes:
        raise ResultsError(
            f"{given.source} has patch sizes {list(given.patch_sizes)}, the results have scores of "
            f"{list(ran.patch_sizes)}; {way_out}"
        )
    weights = [f"{Path(c.resume_path).name} with num_pcs = {c.num_pcs}" for c in (given, ran)]
    if weights[0] != weights[1]:
        raise ResultsError(
            f"{given.source} names the weights {weights[0]}, the results are of {weights[1]}; "
            f"{way_out}"
        )


def _of_predictions(
    folder: Path, stored: dict[str, Any], lists: Sequence[tuple[str, ...] | None]
) -> _Results:
    files = {method: folder / f"{method}_predictions.txt" for method in METHODS}
    found = {method: file for method, file in files.items() if file.is_file()}
    if not found:
        raise ResultsError(
            f"{folder} holds no results: neither {RUN_FILE} nor {files['NetVLAD'].name}; give the "
            "--result_save_folder of feature_match"
        )
    pairs = {method: _read_pairs(file, lists[0]) for method, file in found.items()}
    first = next(iter(pairs.values()))
    queries = tuple(query for query, _ in first)
    for method, of_method in pairs.items():
        same = tuple(query for query, _ in of_method) == queries
        if not same or len(of_method[0][1]) != len(first[0][1]):
            raise ResultsError(
                f"{found[method]} has other queries than {next(iter(found.values()))}, or another "
                "number of candidates; they are of different runs"
            )
    index = lists[1]
    complete = index is not None
    if index is None:
        every = (name for of in pairs.values() for _, names in of for name in names)
        index = tuple(dict.fromkeys(every))
    rows = {name: i for i, name in reversed(list(enumerate(index)))}
    arrays = {}
    for method, of_method in pairs.items():
        unknown = next((name for _, names in of_method for name in names if name not in rows), None)
        if unknown is not None:
            raise ResultsError(
                f"{found[method]} names {unknown}, which is not in the index list; give the list "
                "that was matched"
            )
        arrays[method] = np.array(
            [[rows[name] for name in names] for _, names in of_method], dtype=np.int64
        )
    notes = [
        f"There is no {RUN_FILE} among these results, so scores of candidates are not known. Run "
        "feature_match again to see them."
    ]
    if not complete:
        notes.append(
            "The index list is not known, so ground truth cannot be used: give --index_file_path."
        )
    retrieved = arrays.get("NetVLAD")
    reranked = arrays.get("PatchNetVLAD")
    if retrieved is None:
        assert reranked is not None
        retrieved, reranked = reranked, None
        notes.append(f"{files['NetVLAD'].name} is missing: what is shown is after re-ranking.")
    elif reranked is not None and (np.sort(retrieved, 1) != np.sort(reranked, 1)).any():
        raise ResultsError(
            f"{found['PatchNetVLAD']} has other candidates than {found['NetVLAD']}; they are of "
            "different runs"
        )
    return _Results(
        queries, index, retrieved, reranked, None, {}, None, None, stored,
        complete_index=complete, notes=notes,
    )  # fmt: skip


def _read_pairs(file: Path, queries: Sequence[str] | None) -> list[tuple[str, list[str]]]:
    """Read predictions as ``feature_match`` writes them: each query's lines follow each other."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ResultsError(f"{file} cannot be read: {error}") from None
    lines = [line for line in text.split("\n") if line and not line.startswith("# ")]
    if not lines:
        raise ResultsError(f"{file} holds no pairs")
    if queries is None:
        found: list[tuple[str, list[str]]] = []
        for line in lines:
            name, separator, candidate = line.partition(", ")
            if not separator or ", " in candidate:
                raise ResultsError(
                    f"{file}: {line[:200]!r} is no pair of names, or one holds ', '; give "
                    "--query_file_path"
                )
            if not found or found[-1][0] != name:
                found.append((name, []))
            found[-1][1].append(candidate)
        counts = {len(names) for _, names in found}
        if len(counts) > 1:
            raise ResultsError(
                f"{file}: queries have {min(counts)} to {max(counts)} candidates; give "
                "--query_file_path"
            )
        return found
    k, rest = divmod(len(lines), len(queries))
    if rest or not k:
        raise ResultsError(
            f"{file} has {len(lines)} pairs for {len(queries)} queries of the list; give the list "
            "that was matched"
        )
    found = []
    for q, name in enumerate(queries):
        names = []
        for line in lines[q * k : (q + 1) * k]:
            if not line.startswith(f"{name}, "):
                raise ResultsError(
                    f"{file}: {line[:200]!r} stands where candidates of {name} should; give the "
                    "list that was matched"
                )
            names.append(line[len(name) + 2 :])
        found.append((name, names))
    return found


def _read_metrics(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        methods = content["methods"]
        if not isinstance(methods, dict) or not isinstance(content.get("provenance"), dict):
            raise ValueError("it has no methods or no provenance")
        _check_provenance(content["provenance"])
        for method, values in methods.items():
            _check_metrics(method, values)
    except (OSError, ValueError, KeyError, OverflowError, TypeError) as error:
        raise ResultsError(
            f"{file} is damaged ({error}); delete it, or run feature_match again"
        ) from None
    return content


def _check_provenance(content: dict[str, Any]) -> None:
    for name in ("checkpoint", "queries", "index", "ground_truth", "config"):
        value = content.get(name, {})
        # Without ground truth it is null.
        if not isinstance(value, dict) and not (value is None and name == "ground_truth"):
            raise ValueError(f"provenance.{name} is {value!r:.80}")
    for name in ("date", "version", "protocol", "citation", "candidates"):
        value = content.get(name)
        if not isinstance(value, str | None):
            raise ValueError(f"provenance.{name} is {value!r:.80}")


def _check_metrics(method: str, values: Any) -> None:
    """Check what the page takes from the metrics of a method."""

    def check(ok: bool, what: str, value: object) -> None:
        if not ok:
            raise ValueError(f"{what} of {method} is {value!r:.80}")

    def is_number(value: object, most: float = 1 + 1e-9) -> bool:
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        return known and math.isfinite(value) and (0 <= value <= most or most == math.inf)  # type: ignore[arg-type,operator]

    check(isinstance(values, dict), "what is said", values)
    recalls = values.get("recall", {})
    check(isinstance(recalls, dict), "recall", recalls)
    for n, value in recalls.items():
        check(n.isascii() and n.isdigit() and int(n) > 0, "N of a recall", n)
        check(is_number(value), f"recall@{n}", value)
    curve = values.get("precision_recall")
    check(isinstance(curve, dict | None), "precision_recall", curve)
    if not curve:
        return
    for name in ("average_precision", "recall_at_full_precision"):
        check(curve.get(name) is None or is_number(curve[name]), name, curve.get(name))
    best = curve.get("best") or {}
    check(isinstance(best, dict), "best", best)
    shares = [best.get(name) for name in ("f1", "precision", "recall")]
    complete = all(map(is_number, shares)) and is_number(best.get("threshold"), math.inf)
    check(complete or all(share is None for share in shares), "best", best)
    points = curve.get("curve", {})
    check(isinstance(points, dict), "curve", points)
    for name in ("precision", "recall"):
        of = points.get(name, [])
        check(isinstance(of, list) and all(map(is_number, of)), f"{name} of the curve", of)


def _stored_config(file: Path, stored: dict[str, Any]) -> Config | None:
    content = stored.get("provenance", {}).get("config")
    if not content:
        return None
    try:
        return read_config(content)
    except (PatchNetVLADError, AttributeError, TypeError, ValueError) as error:
        raise ResultsError(
            f"{file} is damaged (provenance.config: {error}); delete it, or run feature_match again"
        ) from None


def _add_truth(results: _Results, ground_truth: str | Path | None, threshold: float | None) -> None:
    """Load ground truth; what the user names must be good, what the run names may be gone."""
    path, given = ground_truth, ground_truth is not None or threshold is not None
    if results.run is not None:
        path = path if path is not None else results.run.ground_truth
        threshold = threshold if threshold is not None else results.run.threshold
    if path is None:
        if threshold is not None:
            logger.info("a distance for positives has no effect without ground truth")
        return
    if not results.complete_index:
        if given:
            raise ResultsError("ground truth needs the index list: give --index_file_path")
        return
    try:
        truth = GroundTruth.load(path, threshold)
        truth.check_counts(len(results.query_names), len(results.index_names), path)
    except PatchNetVLADError as error:
        if given:
            raise
        results.notes.append(f"Right and wrong are not known: {error}")
        return
    if ground_truth is not None:
        results.given["ground_truth"] = Path(ground_truth)
    if _sha256(resolve_ground_truth(path)) == _stored_sha256(results, "ground_truth"):
        results.same_files.add("ground_truth")
    results.truth = truth
    results.positives = truth.positives()
    results.metrics = evaluate_methods(
        results.answers(), results.positives, results.n_values, results.scores
    )
    rule = results.about.get("ground_truth") or {}
    if rule.get("threshold") != truth.threshold:
        return
    for method, metrics in results.metrics.items():
        before = results.stored["methods"].get(method, {}).get("recall", {})
        now = dict(zip(map(str, metrics.n_values), metrics.recalls.tolist(), strict=True))
        changed = [n for n in now if n in before and abs(now[n] - before[n]) > 1e-9]
        if changed:
            results.notes.append(
                f"Recall@{changed[0]} of {results.name(method)} is {now[changed[0]]:.4f} here and "
                f"{before[changed[0]]:.4f} in metrics.json: the ground truth is another one."
            )


def _compare_with_run(
    results: _Results, lists: Sequence[tuple[str, ...] | None], threshold: float | None
) -> None:
    """Find out what is not as it was in the run, and say so."""
    run, truth = results.run, results.truth
    ran = (run.query_names, run.index_names) if run is not None else (None, None)
    for part, name, now, before in zip(
        ("queries", "index"), ("Query list", "Index list"), lists, ran, strict=True
    ):
        if now is None:
            continue
        sha256 = _stored_sha256(results, part)
        same = _sha256(results.given[part]) == sha256
        if same:
            results.same_files.add(part)
        if now != before if before is not None else sha256 is not None and not same:
            results.changed.add(part)
            results.notes.append(f"{name} {results.given[part].name} in place of the run's.")
    rule = results.about.get("ground_truth") or {}
    if truth is not None and (run is not None or results.stored):
        sha256, file = rule.get("sha256"), run.ground_truth if run is not None else None
        given = results.given.get("ground_truth")
        if sha256 is not None:
            other = "ground_truth" not in results.same_files
        else:
            other = given is not None and (file is None or Path(file) != given.absolute())
        was = run.threshold if run is not None else rule.get("threshold")
        moved = threshold is not None and truth.threshold != was
        if other:
            results.changed.add("ground_truth")
        if moved:
            results.changed.add("threshold")
        if other and given is None:
            results.notes.append(f"The ground truth {_file_name(file)} has changed since the run.")
        if (other and given is not None) or moved:
            name = _file_name(str(given or file or rule.get("file")))
            results.notes.append(
                f"Ground truth {name}, distance {truth.threshold:g}, in place of the run's"
                f"{'' if sha256 or file else ', which had none'}."
            )
    if results.candidates:
        results.notes.append(
            f"Candidates are another method's, of {_file_name(results.candidates)}: they were "
            "re-ranked in place of those that NetVLAD retrieves."
        )


def _sha256(file: Path) -> str | None:
    try:
        return file_sha256(file)
    except OSError:
        return None


def _stored_sha256(results: _Results, part: str) -> str | None:
    found = (results.about.get(part) or {}).get("sha256")
    return found if isinstance(found, str) else None


# The queries -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Shown:
    """Candidates of one query that the page shows.

    Attributes
    ----------
    places : list of int
        In the order of ``retrieved``.
    missed : int or None
        The nearest right index image, where none is among the candidates.
    """

    places: list[int]
    missed: int | None


@dataclass(frozen=True, eq=False)
class _Table:
    """What is said of every query, and of its candidates in the order of ``retrieved``.

    Attributes
    ----------
    status : str
        A letter a query.
    after : ndarray [Q, k] of int64
        Rank after re-ranking of each candidate, from 0.
    first : dict of str to ndarray [Q] of int64
        Rank of the first right candidate by method, from 0; -1 for none.
    right : ndarray [Q, k] of bool or None
    distances : ndarray [Q, k] of float64 or None
    raw : ndarray [Q, k] of float64 or None
        Scores of Patch-NetVLAD.
    nearest : ndarray [Q] of int64
        The right index image nearest to each query; -1 for none.
    """

    status: str
    retrieved: NDArray[np.int64]
    after: NDArray[np.int64]
    first: dict[str, NDArray[np.int64]]
    right: NDArray[np.bool_] | None
    distances: NDArray[np.float64] | None
    raw: NDArray[np.float64] | None
    nearest: NDArray[np.int64]

    @classmethod
    def of(cls, results: _Results) -> _Table:
        retrieved = results.retrieved
        final = results.reranked if results.reranked is not None else retrieved
        num_queries, k = retrieved.shape
        ranks = np.tile(np.arange(k, dtype=np.float64), (num_queries, 1))
        after = reorder(ranks, final, retrieved).astype(np.int64)
        raw = results.scores.get("PatchNetVLAD")
        if raw is not None:
            raw = reorder(raw, final, retrieved)
        nearest = np.full(num_queries, -1)
        right = distances = None
        first: dict[str, NDArray[np.int64]] = {}
        if results.truth is not None and results.positives is not None:
            truth = results.truth
            distances = candidate_distances(truth.utm_queries, truth.utm_index, retrieved)
            right = np.array(
                [np.isin(row, of) for row, of in zip(retrieved, results.positives, strict=True)]
            )
            for q, of in enumerate(results.positives):
                if len(of):
                    away = np.linalg.norm(truth.utm_index[of] - truth.utm_queries[q], axis=1)
                    nearest[q] = of[away.argmin()]
            for method, order in zip(METHODS, (ranks, after), strict=True):
                best = np.where(right, order, k).min(axis=1)
                first[method] = np.where(best < k, best, -1).astype(np.int64)
            before, now = (first[method] == 0 for method in METHODS)
            pairs = zip(before, now, nearest >= 0, strict=True)
            words = {
                (True, True): _RIGHT, (False, False): _WRONG, (False, True): _RESCUED,
                (True, False): _HURT,
            }  # fmt: skip
            status = "".join(words[b, a] if has else _NO_ANSWER for b, a, has in pairs)
        else:
            status = "".join(_UNCHANGED if row == 0 else _CHANGED for row in after[:, 0])
        if results.reranked is None:
            first.pop("PatchNetVLAD", None)
        return cls(status, retrieved, after, first, right, distances, raw, nearest)

    def shown(self, q: int, most: int) -> _Shown:
        after = self.after[q]
        places = dict.fromkeys(np.argsort(after)[:most].tolist())
        places |= dict.fromkeys(range(min(most, len(after))))
        for method, order in zip(METHODS, (np.arange(len(after)), after), strict=True):
            if method in self.first and self.first[method][q] >= 0:
                places[int(np.flatnonzero(order == self.first[method][q])[0])] = None
        missed = None
        if self.right is not None and self.nearest[q] >= 0 and not self.right[q].any():
            missed = int(self.nearest[q])
        return _Shown(sorted(places, key=lambda j: int(after[j])), missed)


# Matched patches -------------------------------------------------------------------------------

Lines = list[tuple[int, list[int]]]
"""A patch size: the number of matches, and x, y, x, y in thousandths of those that are drawn."""


def _match_patches(
    results: _Results, table: _Table, most: int, given: bool, device: str, progress: bool
) -> dict[int, dict[int, Lines]]:
    """Match queries again with the candidates that matter; lines by query and index row.

    Features that the user ``given`` must be good; those that the run names may be gone.
    """
    from patchnetvlad.device import choose_device

    target = choose_device(device)
    config = results.config
    if not most or results.reranked is None:
        return {}
    if config is None or not results.places.get("query_features"):
        results.notes.append(
            "Matched patches are not drawn: it is not known where the features are. Give "
            "--query_input_features_dir and --index_input_features_dir"
            + (", and --config_path." if config is None else ".")
        )
        return {}
    order = sorted(
        range(len(table.status)),
        key=lambda q: f"{_RESCUED}{_HURT}{_WRONG}{_CHANGED}{_RIGHT}{_UNCHANGED}{_NO_ANSWER}".index(
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


def _worth_matching(results: _Results, table: _Table, q: int) -> list[int]:
    """Return the first answers before and after, and the first right one."""
    assert results.reranked is not None
    rows = [int(results.reranked[q, 0]), int(results.retrieved[q, 0])]
    if "PatchNetVLAD" in table.first:
        if table.first["PatchNetVLAD"][q] >= 0:
            rows.append(int(results.reranked[q, table.first["PatchNetVLAD"][q]]))
        elif table.nearest[q] >= 0:
            rows.append(int(table.nearest[q]))
    return list(dict.fromkeys(rows))


def _matched(
    results: _Results,
    config: Config,
    jobs: Sequence[tuple[int, Sequence[int]]],
    device: torch.device,
    progress: bool,
) -> Any:
    import torch
    from tqdm import tqdm

    from patchnetvlad.datasets.transforms import native_size
    from patchnetvlad.device import arithmetic, choose_precision
    from patchnetvlad.features.store import open_reader
    from patchnetvlad.geometry import patch_grids
    from patchnetvlad.matching.pair import match_pair
    from patchnetvlad.matching.readers import patch_readers

    config.check_matching()
    root = results.places.get("dataset_root", "")
    names = (results.query_names, results.index_names)
    readers = [
        open_reader(results.places.get(f"{what}_features", ""), of, config, root)
        for what, of in zip(("query", "index"), names, strict=True)
    ]
    patches: list[Any] = list(patch_readers(config, readers, device))

    def frame(which: int, i: int) -> tuple[Any, NDArray[np.float64]]:
        """Return the grids of an image, and its (width, height)."""
        size = config.match_image_size
        if size == (0, 0):
            size = native_size(_paths([names[which][i]], root)[0])
        grids = patch_grids(size, config.patch_sizes, config.strides)
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
                lines: Lines = []
                for match, ours, other in zip(found, grids, theirs, strict=True):
                    count = len(match.query_patches)
                    # Evenly spread; more could not be told apart.
                    drawn = np.unique(np.linspace(0, count - 1, min(count, MAX_LINES)).astype(int))
                    ends = np.hstack([
                        ours.keypoints[match.query_patches[drawn]] / size,
                        other.keypoints[match.candidate_patches[drawn]] / their_size,
                    ])  # fmt: skip
                    lines.append((count, (ends * _FAR).round().astype(int).ravel().tolist()))
                yield q, row, lines


# The page --------------------------------------------------------------------------------------


def _image_ids(results: _Results, shown: Sequence[_Shown]) -> dict[int, int]:
    """Number the index images that are shown, after the queries, by row.

    They go in the order of the queries that show them, so that those of one query stand together.
    """
    ids: dict[int, int] = {}
    for q, of in enumerate(shown):
        rows = [int(results.retrieved[q, j]) for j in of.places]
        for row in rows if of.missed is None else [*rows, of.missed]:
            ids.setdefault(row, len(results.query_names) + len(ids))
    return ids


def _page(
    folder: Path,
    results: _Results,
    table: _Table,
    candidates: int,
    ids: dict[int, int],
    details: Sequence[dict[str, Any]],
    title: str | None,
) -> PageContent:
    num_queries, k = results.retrieved.shape
    final = results.reranked if results.reranked is not None else results.retrieved
    method = METHODS[results.reranked is not None]
    score = results.scores.get(method)
    best = table.after.argmin(axis=1)[:, None]
    away = None if table.distances is None else np.take_along_axis(table.distances, best, 1)[:, 0]
    image_names = [*results.query_names, *(results.index_names[row] for row in ids)]
    run, config = results.run, results.config
    data = {
        "queries": num_queries,
        "names": image_names,
        "prefix": _common_folder(image_names),
        "status": table.status,
        "answer": [ids[int(row)] for row in final[:, 0]],
        "before": _plain_ranks(table.first.get("NetVLAD")),
        "after": _plain_ranks(table.first.get("PatchNetVLAD")),
        "score": None if score is None else _numbers(score[:, 0]),
        "distance": None if away is None else _numbers(away),
        "k": k,
        "reranked": results.reranked is not None,
        "sizes": list(config.patch_sizes) if config and results.reranked is not None else [],
        "scored": results.patch_scores is not None,
        "inliers": config is not None and config.matcher == "RANSAC",
        "colours": list(COLOURS),
        "shown": candidates,
        "threshold": None if results.truth is None else results.truth.threshold,
        "detailChunk": _DETAIL_CHUNK,
        "smallChunk": _SMALL_CHUNK,
        "largeChunk": _LARGE_CHUNK,
        "map": None if results.truth is None else _map(results.truth, list(ids)),
    }
    blocks = {
        f"details-{n}": json_block(details[start : start + _DETAIL_CHUNK])
        for n, start in enumerate(range(0, num_queries, _DETAIL_CHUNK))
    }
    recalls, curves = _curves(results)
    if title is None:
        title = "/".join(folder.resolve().parts[-2:]).lstrip("/")
        if run is not None and run.protocol and not results.changed:
            title = run.protocol
    return PageContent(
        title=title,
        data=data,
        blocks=blocks,
        image_names=image_names,
        num_queries=num_queries,
        num_index=len(results.index_names) if results.complete_index else None,
        k=k,
        counts={letter: table.status.count(letter) for letter in dict.fromkeys(table.status)},
        reranked=results.reranked is not None,
        threshold=None if results.truth is None else results.truth.threshold,
        has_truth=results.truth is not None,
        recalls=recalls,
        recall_curves={
            results.name(method): recall_at_n(found, results.positives, range(1, k + 1))
            for method, found in results.answers().items()
            if results.positives is not None
        },
        precision_recall=curves,
        citation=_citation(results),
        provenance=_provenance(results),
        notes=list(results.notes),
        made=[],
    )


def _details(
    q: int,
    of: _Shown,
    results: _Results,
    table: _Table,
    ids: dict[int, int],
    drawn: dict[int, Lines],
) -> dict[str, Any]:
    """Return the candidates of a query, and its matches.

    A candidate is [image, rank before, rank after, score of NetVLAD, of Patch-NetVLAD, scores a
    patch size, distance, right]; ranks count from 1, 0 is for an image that is no candidate.
    """
    netvlad = results.scores.get("NetVLAD")
    rows: list[list[Any]] = []
    matches: list[list[Any]] = []

    def add(row: int, *more: Any) -> None:
        if row in drawn:
            matches.append([len(rows), *drawn[row]])
        rows.append([ids[row], *more])

    for j in of.places:
        sizes = None if results.patch_scores is None else results.patch_scores[q, j]
        add(
            int(results.retrieved[q, j]),
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
        add(of.missed, 0, 0, None, None, None, _number(away), 1)
    return {"c": rows, "m": matches} if matches else {"c": rows}


def _common_folder(names: Sequence[str]) -> str:
    """Return the folders that all names begin with, with the slash that ends them."""
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


def _map(truth: GroundTruth, ids: Sequence[int]) -> dict[str, Any]:
    """Return positions as whole numbers of a unit that no eye can see, from a corner."""
    both = np.concatenate([truth.utm_queries, truth.utm_index])
    one = both.shape[1] == 1
    if one:  # along one axis: queries above, index images below
        both = np.hstack([both, np.zeros_like(both)])
    low, high = both[:, :2].min(axis=0), both[:, :2].max(axis=0)
    extent: NDArray[np.float64] = high - low
    unit = max(float(extent.max()) / 20_000, 1e-12)
    places = ((both[:, :2] - low) / unit).round().astype(int)
    split = len(truth.utm_queries)
    if one:
        places[:split, 1] = max(1, int(places.max()) // 12)
    return {
        "queries": places[:split].ravel().tolist(),
        "index": places[split:].ravel().tolist(),
        "rows": ids,  # of the index images that are shown
        "extent": extent.tolist(),
        "line": one,
    }


def _curves(
    results: _Results,
) -> tuple[dict[str, list[tuple[int, float, float, float]]], dict[str, dict[str, Any]]]:
    """Return recalls with their intervals, and precision-recall as ``metrics.json`` has it."""
    total = len(results.query_names)
    found = {method: metrics.to_dict() for method, metrics in results.metrics.items()}
    if not found:
        found = {m: of for m, of in results.stored.get("methods", {}).items() if m in METHODS}
    truth, rule = results.truth, results.about.get("ground_truth") or {}
    as_stored = truth is None or (
        truth.threshold == rule.get("threshold")
        and "ground_truth" in results.same_files
        and not results.changed
    )
    recalls = {}
    curves = {}
    for method, of in found.items():
        name = results.name(method)
        recalls[name] = [
            (int(n), float(value), *wilson_interval(round(float(value) * total), total))
            for n, value in of.get("recall", {}).items()
        ]
        curve = of.get("precision_recall")
        if not curve and as_stored:
            curve = results.stored.get("methods", {}).get(method, {}).get("precision_recall")
        if curve:
            curves[name] = curve
    return recalls, curves


def _citation(results: _Results) -> str:
    if results.changed:
        return ""
    if results.run is not None:
        return results.run.citation
    return str(results.about.get("citation") or "")


def _provenance(results: _Results) -> list[tuple[str, str]]:
    """Say where the numbers come from, a name and a text each.

    Files go without their folders, as in ``metrics.json``: reports are handed on.
    """
    run, stored, given = results.run, results.about, results.given
    lines: list[tuple[str, object]] = []

    def file(part: str, ran: str | None) -> str:
        return given[part].name if part in given else _file_name(ran)

    if run is not None:
        versions = ", ".join(f"{name} {number}" for name, number in run.versions.items())
        lines += [("Date", run.date), ("Versions", versions)]
        protocol = run.protocol
    else:
        lines += [("Date", stored.get("date")), ("Version", stored.get("version"))]
        protocol = stored.get("protocol")
    lines.append(("Protocol", None if results.changed else protocol))
    # Another one is for matching again alone.
    config = run.config if run is not None else results.config
    if config is not None:
        weights = f"{Path(config.resume_path).name}{config.num_pcs or ''}"
        lines += [("Configuration", Path(config.source).name), ("Weights", weights)]
    checkpoint = run.checkpoint if run else stored.get("checkpoint", {}).get("sha256")
    lines.append(("SHA-256 of the weights", checkpoint))
    if run is not None:
        lines += [
            ("Queries", f"{len(results.query_names)} images, {file('queries', run.query_list)}"),
            ("Index", f"{len(results.index_names)} images, {file('index', run.index_list)}"),
            ("Ground truth", file("ground_truth", run.ground_truth)),
            ("Candidates of another method", _file_name(run.candidates)),
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
                value = _file_name(value) if entry.endswith("_path") else value
                text = ", ".join(map(str, value)) if isinstance(value, tuple) else value
                lines.append((entry, text))
    return [(name, str(text)) for name, text in lines if text not in (None, "")]


def _file_name(path: str | None) -> str:
    return Path(path).name if path else ""


# Pictures --------------------------------------------------------------------------------------


def _image_paths(results: _Results, page: PageContent) -> list[Path | str]:
    return _paths(page.image_names, results.places.get("dataset_root", ""))


def _paths(names: Sequence[str], root: str) -> list[Path | str]:
    return ImageList(Path(), tuple(names), tuple(range(len(names)))).image_locations(root)


def _wanted_large(
    status: str, answers: Sequence[int], details: Sequence[dict[str, Any]]
) -> list[int]:
    """Name images in the order in which a larger picture is worth its room.

    First those that lines are drawn over, then first answers, then the other candidates; those of
    right queries come after the others.
    """
    order = sorted(range(len(status)), key=lambda q: status[q] in (_RIGHT, _UNCHANGED))
    found: dict[int, None] = {}
    for q in order:
        for place, *_ in details[q].get("m", []):
            found |= dict.fromkeys((q, details[q]["c"][place][0]))
    for q in order:
        found |= dict.fromkeys((q, answers[q]))
    for q in order:
        found |= dict.fromkeys(candidate[0] for candidate in details[q]["c"])
    return list(found)


def _add_pictures(page: PageContent, pictures: Pictures) -> PageContent:
    blocks = dict(page.blocks)
    for n, start in enumerate(range(0, len(pictures.small), _SMALL_CHUNK)):
        part = pictures.small[start : start + _SMALL_CHUNK]
        if any(part):
            blocks[f"small-{n}"] = json_block(part)
    large = list(pictures.large.items())
    for n, start in enumerate(range(0, len(large), _LARGE_CHUNK)):
        blocks[f"large-{n}"] = json_block([text for _, text in large[start : start + _LARGE_CHUNK]])
    data = {
        **page.data,
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
    notes = list(page.notes)
    if pictures.left_out:
        notes.append(
            f"{pictures.left_out} images have no picture, for lack of room: give --max_mb more."
        )
    if pictures.broken:
        notes.append(
            f"{len(pictures.broken)} of {count} images cannot be shown, first: "
            f"{next(iter(pictures.broken.values()))}. Is --dataset_root_dir right?"
        )
    return replace(page, data=data, blocks=blocks, made=made, notes=notes)
