# SPDX-License-Identifier: MIT
"""Results of a run, read back and checked."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.assets.data_files import resolve_ground_truth
from patchnetvlad.base.files import file_sha256
from patchnetvlad.base.text import one_line, parse_json
from patchnetvlad.config import Config
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import PatchNetVLADError, ResultsError
from patchnetvlad.evaluation.calibration import Calibration
from patchnetvlad.evaluation.metrics import METHODS, SEQUENCE, Metrics, evaluate_methods
from patchnetvlad.evaluation.per_query import Intervals
from patchnetvlad.pipeline.record import Origin, RunRecord
from patchnetvlad.pipeline.run_record import RUN_FILE, read_run
from patchnetvlad.search.candidates import parse_pairs

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Results:
    """Everything that is known about a run.

    Its record has no origin where there was no ``run.json``. Names and configuration are those of
    the record, or what the user gave in place of them.
    """

    record: RunRecord
    query_names: Sequence[str]
    index_names: Sequence[str]
    stored: dict[str, Any]  # metrics.json
    config: Config | None = None
    truth: GroundTruth | None = None
    positives: list[NDArray[np.int64]] | None = None
    metrics: dict[str, Metrics] = field(default_factory=dict)
    locations: dict[str, str] = field(default_factory=dict)  # of features and images
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
        """File of candidates that were re-ranked instead of those of retrieval."""
        return self.origin.candidates if self.origin else self.about.get("candidates")

    @property
    def origin(self) -> Origin | None:
        """Provenance of the results in ``run.json``."""
        return self.record.origin

    def name(self, method: str) -> str:
        """Return the name of the method; candidates of another method have none."""
        return "Given candidates" if method == "NetVLAD" and self.candidates else method

    def roots(self) -> tuple[str, str]:
        """Return the root folders of relative names of queries and of index images.

        It is the list itself, where that is a folder.
        """
        root = self.locations.get("dataset_root", "")
        ran = self.origin
        queries = str(self.given.get("queries", ran.query_list if ran else ""))
        index = str(self.given.get("index", ran.index_list if ran else ""))
        return queries if os.path.isdir(queries) else root, index if os.path.isdir(index) else root

    @property
    def n_values(self) -> tuple[int, ...]:
        """The N of recall@N that the number of candidates allows."""
        k = self.record.retrieved.shape[1]
        wanted = self.config.n_values if self.config else (1, 5, 10, 20, 50, 100)
        return tuple(n for n in dict.fromkeys(wanted) if n <= k) or (1,)

    def answers(self) -> dict[str, NDArray[np.int64]]:
        """The candidates [Q, k] by method."""
        return self.record.answers()


def load_results(
    folder: Path,
    config: Config | str | Path | None,
    query_list: str | Path | None,
    index_list: str | Path | None,
    ground_truth: str | Path | None,
    threshold: float | None,
    dataset_root: str | Path | None = None,
) -> Results:
    """Read the results folder of a run; see :func:`~patchnetvlad.write_report`."""
    if not folder.is_dir():
        raise ResultsError(
            f"there is no folder {folder}; give the --result_save_folder of feature_match"
        )
    if config is not None and not isinstance(config, Config):
        config = Config.load(config)
    lists = [
        ImageList.read(path, dataset_root or "").names if path is not None else None
        for path in (query_list, index_list)
    ]
    stored = _read_metrics(folder / "metrics.json")
    record = read_run(folder)
    if record is not None:
        results = _of_run(record, stored, lists)
    else:
        results = _of_predictions(folder, stored, lists)
    origin = results.origin
    ran = origin.config if origin else _stored_config(folder / "metrics.json", stored)
    results.config = config or ran
    if config is not None and ran is not None:
        _check_sizes(config, ran, results.record.patch_scores is not None)
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
    record: RunRecord, stored: dict[str, Any], lists: Sequence[tuple[str, ...] | None]
) -> Results:
    names = [record.query_names, record.index_names]
    for i, (what, given) in enumerate(zip(("query", "index"), lists, strict=True)):
        if given is None:
            continue
        if len(given) != len(names[i]):
            raise ResultsError(
                f"the {what} list names {len(given)} images, the results have {len(names[i])}; "
                "give the list that was matched"
            )
        names[i] = given
    origin = record.origin
    assert origin is not None  # of what was read from run.json
    locations = {
        "dataset_root": origin.dataset_root,
        "query_features": origin.query_features,
        "index_features": origin.index_features,
    }
    return Results(record, names[0], names[1], stored, locations=locations)


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
) -> Results:
    files = {method: folder / f"{method}_predictions.txt" for method in METHODS}
    found = {method: file for method, file in files.items() if file.is_file()}
    if not found:
        raise ResultsError(
            f"{folder} holds no results: neither {RUN_FILE} nor {files['NetVLAD'].name}; give the "
            "--result_save_folder of feature_match"
        )
    pairs = {method: _read_predictions(file, *lists) for method, file in found.items()}
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
    if "NetVLAD" not in arrays:
        notes.append(f"{files['NetVLAD'].name} is missing: what is shown is after re-ranking.")
    (first_method, retrieved), *others = arrays.items()
    for method, rows_of in others:
        if (np.sort(retrieved, 1) != np.sort(rows_of, 1)).any():
            raise ResultsError(
                f"{found[method]} has other candidates than {found[first_method]}; they are of "
                "different runs"
            )
    later = dict(others)
    record = RunRecord(
        queries, index, retrieved, later.get("PatchNetVLAD"), None, (), {}, 0,
        sequenced=later.get(SEQUENCE),
    )  # fmt: skip
    return Results(record, queries, index, stored, complete_index=complete, notes=notes)


def _read_predictions(
    file: Path, queries: Sequence[str] | None, index: Sequence[str] | None
) -> list[tuple[str, list[str]]]:
    """Read predictions as ``feature_match`` writes them: each query's lines follow each other."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ResultsError(f"{file} cannot be read: {error}") from None
    known = [None if names is None else set(names) for names in (queries, index)]
    way_out = "--query_file_path" if queries is None else "the list that was matched"
    try:
        pairs = parse_pairs(lines, *known)
    except ValueError as error:
        raise ResultsError(f"{file}, {error}; give {way_out}") from None
    if not pairs:
        raise ResultsError(f"{file} holds no pairs")
    if queries is None:
        groups = itertools.groupby(pairs, key=lambda pair: pair.query)
        found = [(name, [pair.candidate for pair in of]) for name, of in groups]
        counts = {len(names) for _, names in found}
        if len(counts) > 1:
            raise ResultsError(
                f"{file}: queries have {min(counts)} to {max(counts)} candidates; give {way_out}"
            )
        return found
    k, rest = divmod(len(pairs), len(queries))
    if rest or not k:
        raise ResultsError(
            f"{file} has {len(pairs)} pairs for {len(queries)} queries of the list; give {way_out}"
        )
    for i, pair in enumerate(pairs):
        if pair.query != queries[i // k]:
            raise ResultsError(
                f"{file}, line {pair.line} has a candidate of {pair.query} where those of "
                f"{queries[i // k]} should be; give {way_out}"
            )
    return [
        (name, [pair.candidate for pair in pairs[q * k : (q + 1) * k]])
        for q, name in enumerate(queries)
    ]


def _read_metrics(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        methods = content["methods"]
        if not isinstance(methods, dict) or not isinstance(content.get("provenance"), dict):
            raise ValueError("it has no methods or no provenance")
        _check_provenance(content["provenance"])
        for method, values in methods.items():
            _check_metrics(method, values)
    except (OSError, ValueError, KeyError, OverflowError, TypeError) as error:
        raise ResultsError(
            f"{file} is damaged ({one_line(error)}); delete it, or run feature_match again"
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
    if values.get("intervals") is not None:
        Intervals.from_dict(values["intervals"], [int(n) for n in recalls])
    if values.get("confidence") is not None:
        Calibration.from_dict(values["confidence"])
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
        return Config.from_json(content)
    except (PatchNetVLADError, AttributeError, TypeError, ValueError) as error:
        raise ResultsError(
            f"{file} is damaged (provenance.config: {one_line(error)}); delete it, or run "
            "feature_match again"
        ) from None


def _add_truth(results: Results, ground_truth: str | Path | None, threshold: float | None) -> None:
    """Load ground truth; what the user names must be good, what the run names may be gone."""
    path, given = ground_truth, ground_truth is not None or threshold is not None
    if results.origin is not None:
        path = path if path is not None else results.origin.ground_truth
        threshold = threshold if threshold is not None else results.origin.threshold
    if path is None:
        if threshold is not None:
            logger.info("a distance for positives has no effect without ground truth")
        return
    if not results.complete_index:
        if given:
            raise ResultsError("ground truth needs the index list: give --index_file_path")
        return
    try:
        truth = GroundTruth.load(path, threshold, (results.query_names, results.index_names))
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
        results.answers(),
        results.positives,
        results.n_values,
        results.record.scores,
        interval_block=results.config.interval_block if results.config else "auto",
        query_names=results.query_names,
        confidences=results.record.confidences,
    )
    rule = results.about.get("ground_truth") or {}
    if rule.get("threshold") != truth.distance:
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
    results: Results, lists: Sequence[tuple[str, ...] | None], threshold: float | None
) -> None:
    """Find out what is not as it was in the run, and say so."""
    record, origin, truth = results.record, results.origin, results.truth
    ran = (record.query_names, record.index_names) if origin is not None else (None, None)
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
    if truth is not None and (origin is not None or results.stored):
        sha256, file = rule.get("sha256"), origin.ground_truth if origin is not None else None
        given = results.given.get("ground_truth")
        if sha256 is not None:
            other = "ground_truth" not in results.same_files
        else:
            other = given is not None and (file is None or Path(file) != given.absolute())
        was = origin.threshold if origin is not None else rule.get("threshold")
        moved = threshold is not None and truth.distance not in (was, None)
        if other:
            results.changed.add("ground_truth")
        if moved:
            results.changed.add("threshold")
        if other and given is None:
            results.notes.append(f"The ground truth {file_name(file)} has changed since the run.")
        if (other and given is not None) or moved:
            name = file_name(str(given or file or rule.get("file")))
            distance = "" if truth.distance is None else f", distance {truth.distance:g}"
            results.notes.append(
                f"Ground truth {name}{distance}, in place of the run's"
                f"{'' if sha256 or file else ', which had none'}."
            )
    if results.candidates:
        results.notes.append(
            f"Candidates are another method's, of {file_name(results.candidates)}: they were "
            "re-ranked in place of those that NetVLAD retrieves."
        )


def _sha256(file: Path) -> str | None:
    try:
        return file_sha256(file)
    except OSError:
        return None


def _stored_sha256(results: Results, part: str) -> str | None:
    found = (results.about.get(part) or {}).get("sha256")
    return found if isinstance(found, str) else None


def file_name(path: str | None) -> str:
    """Return the last part of a path; an empty text for None."""
    return Path(path).name if path else ""


def image_locations(names: Sequence[str], root: str) -> list[Path | str]:
    """Return the locations of images, from their names in the list and the root folder."""
    return ImageList(Path(), tuple(names), tuple(range(len(names)))).image_locations(root)
