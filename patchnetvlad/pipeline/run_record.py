# SPDX-License-Identifier: MIT
"""Files that record a run next to its predictions, for example for the report.

``run.json`` says what was matched with what, and how; ``scores.npz`` holds the candidates, their
scores and the names of the images. The second is written first: where there is a ``run.json``,
its ``scores.npz`` is whole.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.assets.data_files import resolve_ground_truth
from patchnetvlad.base.files import replace_text, replacing
from patchnetvlad.base.names import absolute
from patchnetvlad.base.text import one_line, parse_json
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import ConfigError, ResultsError
from patchnetvlad.evaluation.metrics import METHODS
from patchnetvlad.pipeline.inputs import MatchInputs
from patchnetvlad.pipeline.record import Origin, RunRecord, Selection
from patchnetvlad.version import __version__

FORMAT = "patchnetvlad run 1"
RUN_FILE = "run.json"
SCORES_FILE = "scores.npz"
RUN_FILES = (RUN_FILE, SCORES_FILE)

_LIBRARIES = {"torch": ("torch",), "faiss": ("faiss-cpu", "faiss-gpu"), "numpy": ("numpy",)}
_LIBRARIES |= {"opencv": ("opencv-python-headless", "opencv-python")}
_WAY_OUT = "run feature_match again"


def origin_of(inputs: MatchInputs) -> Origin:
    """Return the provenance of the results of a run on these inputs, at its end."""
    queries, index = inputs.images
    truth, candidates = inputs.ground_truth, inputs.candidates_file
    return Origin(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=_versions(),
        query_list=_list_name(queries),
        index_list=_list_name(index),
        dataset_root=absolute(inputs.dataset_root),
        query_features=absolute(inputs.features[0]),
        index_features=absolute(inputs.features[1]),
        ground_truth=None if truth is None else absolute(resolve_ground_truth(truth)),
        threshold=inputs.threshold,
        protocol=inputs.protocol,
        candidates=None if candidates is None else absolute(candidates),
        checkpoint=inputs.checkpoint or None,
        config=inputs.config,
    )


def write_run(results_dir: str | Path, record: RunRecord) -> None:
    """Write ``run.json`` and ``scores.npz`` atomically.

    Parameters
    ----------
    results_dir : str or Path
        Must exist.
    record : RunRecord
        Its recalls and metrics are not written: ``metrics.json`` holds these.

    Raises
    ------
    ValueError
        The record has no origin.
    OutputError
        A file cannot be written.
    """
    if record.origin is None:
        raise ValueError("a record without an origin cannot be written")
    arrays: dict[str, Any] = {
        "query_names": _bytes_of(record.query_names),
        "index_names": _bytes_of(record.index_names),
        "retrieved": record.retrieved.astype(np.int32),
    }
    if record.reranked is not None:
        arrays["reranked"] = record.reranked.astype(np.int32)
    if record.patch_scores is not None:
        arrays["patch_scores"] = record.patch_scores.astype(np.float32)
    if record.sequenced is not None:
        arrays["sequenced"] = record.sequenced.astype(np.int32)
    for method, values in record.scores.items():
        arrays[f"scores_{method}"] = np.asarray(values, dtype=np.float64)
    for method, values in record.confidences.items():
        arrays[f"confidence_{method}"] = np.asarray(values, dtype=np.float64)
    if record.was_reranked is not None:
        arrays["was_reranked"] = record.was_reranked
    origin = asdict(record.origin)
    config = origin.pop("config")
    content = {
        "format": FORMAT,
        "date": origin.pop("date"),
        "versions": origin.pop("versions"),
        "queries": len(record.query_names),
        "index": len(record.index_names),
        **origin,
        "citation": record.citation,
        **({} if record.sequence is None else {"sequence": record.sequence}),
        **({} if record.selection is None else {"reranking": asdict(record.selection)}),
        "config": config,
    }
    with replacing(Path(results_dir) / SCORES_FILE) as file:
        np.savez_compressed(file, **arrays)
    text = json.dumps(content, indent=2, allow_nan=False)
    replace_text(Path(results_dir) / RUN_FILE, [text, "\n"])


def read_run(results_dir: str | Path) -> RunRecord | None:
    """Read what :func:`write_run` wrote.

    Parameters
    ----------
    results_dir : str or Path

    Returns
    -------
    RunRecord or None
        None if there is no ``run.json``: the results are another program's, or an earlier
        version's, or their run has not ended.

    Raises
    ------
    ResultsError
        A file is damaged, of another version, or the two do not fit together.
    """
    folder = Path(results_dir)
    file = folder / RUN_FILE
    if not file.is_file():
        return None
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged_error(file, error) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ResultsError(
            f"{file} is of format {found!r}, this release of patchnetvlad reads {FORMAT!r}; "
            f"use a later one, or {_WAY_OUT}"
        )
    get = _Entries(file, content)
    origin = _origin(get)
    counts = get.whole("queries"), get.whole("index")
    arrays = _arrays(folder / SCORES_FILE, *counts, origin.config)
    return RunRecord(
        n_values=origin.config.n_values,
        recalls={},
        num_without_positives=0,
        citation=get.of("citation", str),
        origin=origin,
        sequence=get.of("sequence", dict, True),
        selection=_selection(get),
        **arrays,
    )


def _selection(get: _Entries) -> Selection | None:
    """Take what ``run.json`` says of queries that were not re-ranked."""
    given = get.of("reranking", dict, True)
    if given is None:
        return None
    values = [given.get(field.name) for field in fields(Selection)]
    if not all(_is_number(value) and math.isfinite(value) and value >= 0 for value in values):
        raise _damaged_error(get.file, f"reranking is {given!r}")
    return Selection(*map(int, values[:3]), *map(float, values[3:]))


def _origin(get: _Entries) -> Origin:
    """Take what ``run.json`` says of where results come from."""
    given: dict[str, Any] = {
        name: get.of(name, str)
        for name in (
            "date", "query_list", "index_list", "dataset_root", "query_features", "index_features"
        )
    }  # fmt: skip
    optional: dict[str, Any] = {
        name: get.of(name, str, True)
        for name in ("ground_truth", "protocol", "candidates", "checkpoint")
    }
    threshold = get.content.get("threshold")
    if threshold is not None and not (_is_number(threshold) and math.isfinite(threshold)):
        raise _damaged_error(get.file, f"threshold is {threshold!r}")
    versions = {str(name): str(value) for name, value in get.of("versions", dict).items()}
    config = _config(get.file, get.of("config", dict))
    return Origin(versions=versions, threshold=threshold, config=config, **given, **optional)


class _Entries:
    """Takes entries of a mapping that was read, of the kind that they must be."""

    def __init__(self, file: Path, content: Mapping[str, Any]) -> None:
        self.file = file
        self.content = content

    def of(self, name: str, kind: type, optional: bool = False) -> Any:
        value = self.content.get(name)
        if value is None and optional:
            return None
        if not isinstance(value, kind):
            raise _damaged_error(self.file, f"{name} is {value!r}")
        return value

    def whole(self, name: str) -> int:
        value = self.of(name, int)
        if value < 1 or isinstance(value, bool):
            raise _damaged_error(self.file, f"{name} is {value}")
        return int(value)


def _config(file: Path, content: Mapping[str, Any]) -> Config:
    try:
        return Config.from_json(content)
    except ConfigError as error:
        raise _damaged_error(file, f"config: {error}") from None


def _arrays(file: Path, num_queries: int, num_index: int, config: Config) -> dict[str, Any]:
    """Read and check ``scores.npz``; gives the fields of the record that are in it."""
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except FileNotFoundError:
        raise ResultsError(
            f"{file} is missing, but not the {RUN_FILE} beside it; {_WAY_OUT}"
        ) from None
    except Exception as error:  # Damage shows in NumPy, in zipfile, in zlib.
        raise _damaged_error(file, error) from None

    def needed(name: str) -> NDArray[Any]:
        if name not in arrays:
            raise _damaged_error(file, f"it has no {name!r}")
        return arrays[name]

    names = {
        "query_names": _names_of(file, needed("query_names"), num_queries),
        "index_names": _names_of(file, needed("index_names"), num_index),
    }
    retrieved = _rows(file, "retrieved", needed("retrieved"), num_queries, num_index)
    shape = retrieved.shape
    patch_scores = None
    later: dict[str, NDArray[np.int64] | None] = {"reranked": None, "sequenced": None}
    for name in later:
        if name not in arrays:
            continue
        later[name] = rows = _rows(file, name, arrays[name], num_queries, num_index)
        if rows.shape != shape or (np.sort(rows, 1) != np.sort(retrieved, 1)).any():
            raise _damaged_error(file, f"{name!r} holds other candidates than 'retrieved'")
    if "patch_scores" in arrays:
        wanted = (*shape, len(config.patch_sizes))
        patch_scores = _numbers(file, "patch_scores", arrays["patch_scores"], wanted, np.float32)
    scores = {
        method: _numbers(file, f"scores_{method}", arrays[f"scores_{method}"], shape, np.float64)
        for method in METHODS
        if f"scores_{method}" in arrays
    }
    confidences = {
        method: _numbers(file, name, arrays[name], shape[:1], np.float64)
        for method in ("NetVLAD", "PatchNetVLAD")
        if (name := f"confidence_{method}") in arrays
    }
    if not all(((of >= 0) & (of <= 1)).all() for of in confidences.values()):
        raise _damaged_error(file, "confidences are no probabilities")
    was_reranked = arrays.get("was_reranked")
    if was_reranked is not None and (was_reranked.dtype != bool or was_reranked.shape != shape[:1]):
        raise _damaged_error(file, f"'was_reranked' is of {was_reranked.dtype}")
    return {
        **names,
        "confidences": confidences,
        "was_reranked": was_reranked,
        "retrieved": retrieved,
        **later,
        "patch_scores": patch_scores,
        "scores": scores,
    }


def _rows(
    file: Path, name: str, values: NDArray[Any], num_queries: int, num_index: int
) -> NDArray[np.int64]:
    if values.dtype.kind not in "iu" or values.ndim != 2 or len(values) != num_queries:
        raise _damaged_error(
            file, f"{name!r} is of {values.dtype} and shape {list(values.shape)}, "
            f"for {num_queries} queries"
        )  # fmt: skip
    if values.shape[1] < 1 or values.min() < 0 or values.max() >= num_index:
        raise _damaged_error(file, f"{name!r} must name rows of an index of {num_index} images")
    return values.astype(np.int64)


def _numbers(
    file: Path, name: str, values: NDArray[Any], shape: tuple[int, ...], dtype: Any
) -> NDArray[Any]:
    if values.dtype.kind != "f" or values.shape != shape:
        raise _damaged_error(
            file, f"{name!r} is of {values.dtype} and shape {list(values.shape)}, not of shape "
            f"{list(shape)}"
        )  # fmt: skip
    if not np.isfinite(values).all():
        raise _damaged_error(file, f"{name!r} holds NaN or infinities")
    return values.astype(dtype)


def _list_name(images: ImageList) -> str:
    return absolute(images.path) if images.path.exists() else images.path.name


def _bytes_of(names: tuple[str, ...]) -> NDArray[np.uint8]:
    """Pack names as lines of UTF-8: an array of text would take the longest name's room a name."""
    return np.frombuffer("\n".join(names).encode(errors="surrogatepass"), np.uint8)


def _names_of(file: Path, packed: NDArray[Any], count: int) -> tuple[str, ...]:
    try:
        names = tuple(packed.astype(np.uint8).tobytes().decode(errors="surrogatepass").split("\n"))
    except ValueError as error:
        raise _damaged_error(file, error) from None
    if len(names) != count:
        raise _damaged_error(file, f"it has {len(names)} names for {count} images")
    return names


def _versions() -> dict[str, str]:
    found = {"patchnetvlad": __version__, "python": platform.python_version()}
    for library, packages in _LIBRARIES.items():
        for package in packages:
            try:
                found[library] = version(package)
                break
            except PackageNotFoundError:
                continue
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _damaged_error(file: Path, reason: object) -> ResultsError:
    return ResultsError(
        f"{file} cannot be read: {one_line(reason)}; {_WAY_OUT}, or delete {RUN_FILE}"
    )
