# SPDX-License-Identifier: MIT
"""What a run leaves beside its predictions, so that others can look into it: a report, say.

``run.json`` says what was matched with what, and how; ``scores.npz`` holds the candidates, their
scores and the names of the images. The second is written first: where there is a ``run.json``,
its ``scores.npz`` is whole.
"""

from __future__ import annotations

import json
import math
import platform
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.assets.data_files import resolve_ground_truth
from patchnetvlad.base.files import replace_text, replacing
from patchnetvlad.base.names import absolute
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import ConfigError, ResultsError
from patchnetvlad.version import __version__

FORMAT = "patchnetvlad run 1"
RUN_FILE = "run.json"
SCORES_FILE = "scores.npz"
RUN_FILES = (RUN_FILE, SCORES_FILE)

_LIBRARIES = {"torch": ("torch",), "faiss": ("faiss-cpu", "faiss-gpu"), "numpy": ("numpy",)}
_LIBRARIES |= {"opencv": ("opencv-python-headless", "opencv-python")}
_WAY_OUT = "run feature_match again"


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One run of matching: what it was given, and what it found.

    Attributes
    ----------
    date : str
        When it ended, ISO 8601, UTC.
    versions : dict of str to str
        Of this package, of Python and of the libraries that compute.
    config : Config
        Relative paths in it are those of the folder that the run was started in.
    query_names, index_names : tuple of str
        Names of Q and N images, as in the lists.
    query_list, index_list : str
        The lists' absolute paths; where a protocol joins several, a name that says so.
    dataset_root : str
        Folder that relative names lie under, absolute.
    query_features, index_features : str
        Directories of features, absolute.
    ground_truth : str or None
        Absolute path.
    threshold : float or None
        Distance of a positive, in the unit of the ground truth.
    protocol : str or None
        Name of the benchmark.
    candidates : str or None
        Absolute path of the file of candidates that were re-ranked in place of retrieval.
    checkpoint : str or None
        SHA-256 of the weights, where the features say it.
    citation : str
        One line that says how the numbers came about; empty without a protocol.
    retrieved : ndarray [Q, k] of int64
        Candidates before re-ranking, best first: rows of the index list.
    reranked : ndarray [Q, k] of int64 or None
        The same candidates after it; None for configurations without patches.
    patch_scores : ndarray [Q, k, S] of float32 or None
        Score at each patch size of each candidate in ``retrieved``; lower is better.
    scores : dict of str to ndarray [Q, k] of float64
        Scores that compare between queries, larger is better: ``"NetVLAD"`` in the order of
        ``retrieved``, ``"PatchNetVLAD"`` in that of ``reranked``.
    """

    date: str
    versions: dict[str, str]
    config: Config
    query_names: tuple[str, ...]
    index_names: tuple[str, ...]
    query_list: str
    index_list: str
    dataset_root: str
    query_features: str
    index_features: str
    ground_truth: str | None
    threshold: float | None
    protocol: str | None
    candidates: str | None
    checkpoint: str | None
    citation: str
    retrieved: NDArray[np.int64]
    reranked: NDArray[np.int64] | None
    patch_scores: NDArray[np.float32] | None
    scores: dict[str, NDArray[np.float64]]


def write_run(
    results_dir: Path,
    config: Config,
    queries: ImageList,
    index: ImageList,
    *,
    dataset_root: str | Path,
    query_features: str | Path,
    index_features: str | Path,
    ground_truth: str | Path | None,
    threshold: float | None,
    protocol: str | None,
    candidates: str | None,
    checkpoint: str | None,
    citation: str,
    retrieved: NDArray[np.int64],
    reranked: NDArray[np.int64] | None,
    patch_scores: NDArray[np.float64] | None,
    scores: Mapping[str, NDArray[np.float64]],
) -> None:
    """Write ``run.json`` and ``scores.npz``, each replaced as a whole.

    Parameters
    ----------
    results_dir : Path
        Must exist.
    config : Config
    queries, index : ImageList
    dataset_root, query_features, index_features, ground_truth, candidates
        As they were given; they are made absolute, but for URLs.
    threshold, protocol, checkpoint, citation, retrieved, reranked, patch_scores, scores
        As in :class:`RunRecord`.

    Raises
    ------
    OutputError
        A file cannot be written.
    """
    truth = None if ground_truth is None else absolute(resolve_ground_truth(ground_truth))
    arrays: dict[str, Any] = {
        "query_names": _bytes_of(queries.names),
        "index_names": _bytes_of(index.names),
        "retrieved": retrieved.astype(np.int32),
    }
    if reranked is not None:
        arrays["reranked"] = reranked.astype(np.int32)
    if patch_scores is not None:
        arrays["patch_scores"] = patch_scores.astype(np.float32)
    for method, values in scores.items():
        arrays[f"scores_{method}"] = np.asarray(values, dtype=np.float64)
    content = {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(),
        "queries": len(queries),
        "index": len(index),
        "query_list": absolute(queries.path) if queries.path.is_file() else queries.path.name,
        "index_list": absolute(index.path) if index.path.is_file() else index.path.name,
        "dataset_root": absolute(dataset_root),
        "query_features": absolute(query_features),
        "index_features": absolute(index_features),
        "ground_truth": truth,
        "threshold": threshold,
        "protocol": protocol,
        "candidates": None if candidates is None else absolute(candidates),
        "checkpoint": checkpoint or None,
        "citation": citation,
        "config": asdict(config),
    }
    with replacing(results_dir / SCORES_FILE) as file:
        np.savez_compressed(file, **arrays)
    text = json.dumps(content, indent=2, allow_nan=False)
    replace_text(results_dir / RUN_FILE, [text, "\n"])


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
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ResultsError(
            f"{file} is of format {found!r}, this release of patchnetvlad reads {FORMAT!r}; "
            f"use a later one, or {_WAY_OUT}"
        )
    get = _Entries(file, content)
    num_queries, num_index = get.whole("queries"), get.whole("index")
    config = _config(file, get.of("config", dict))
    given: dict[str, Any] = {
        name: get.of(name, str)
        for name in ("date", "query_list", "index_list", "dataset_root", "query_features",
                     "index_features", "citation")
    }  # fmt: skip
    optional: dict[str, Any] = {
        name: get.of(name, str, True)
        for name in ("ground_truth", "protocol", "candidates", "checkpoint")
    }
    threshold = content.get("threshold")
    if threshold is not None and not (_is_number(threshold) and math.isfinite(threshold)):
        raise _damaged(file, f"threshold is {threshold!r}")
    versions = {str(name): str(value) for name, value in get.of("versions", dict).items()}
    arrays = _arrays(folder / SCORES_FILE, num_queries, num_index, config)
    return RunRecord(
        versions=versions, config=config, threshold=threshold, **given, **optional, **arrays
    )


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
            raise _damaged(self.file, f"{name} is {value!r}")
        return value

    def whole(self, name: str) -> int:
        value = self.of(name, int)
        if value < 1 or isinstance(value, bool):
            raise _damaged(self.file, f"{name} is {value}")
        return int(value)


def _config(file: Path, content: Mapping[str, Any]) -> Config:
    try:
        return read_config(content)
    except (ConfigError, AttributeError, TypeError, ValueError) as error:
        raise _damaged(file, f"config: {error}") from None


def read_config(content: Mapping[str, Any]) -> Config:
    """Build a configuration from its fields in JSON's types.

    Fields that a later version added are passed over: its format says whether it can be read.

    Raises
    ------
    ConfigError, AttributeError, TypeError, ValueError
        A value is not of its field.
    """
    known = {field.name: field.default for field in fields(Config)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in content.items()
        if name in known
    }
    for name, value in values.items():
        if not _fits(value, known[name]):
            raise TypeError(f"{name} is {value!r}")
    return Config(**values)


def _fits(value: object, default: object) -> bool:
    """Whether a value is of the kind of a field, which its default shows."""
    if default is None:
        return isinstance(value, str | None)
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(_fits(of, default[0]) for of in value)
    if isinstance(default, float):
        return _is_number(value)
    if isinstance(default, int):  # Config takes 1 for True, and 512.0 for 512
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, type(default))


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
        raise _damaged(file, error) from None

    def needed(name: str) -> NDArray[Any]:
        if name not in arrays:
            raise _damaged(file, f"it has no {name!r}")
        return arrays[name]

    names = {
        "query_names": _names_of(file, needed("query_names"), num_queries),
        "index_names": _names_of(file, needed("index_names"), num_index),
    }
    retrieved = _rows(file, "retrieved", needed("retrieved"), num_queries, num_index)
    shape = retrieved.shape
    reranked = patch_scores = None
    if "reranked" in arrays:
        reranked = _rows(file, "reranked", arrays["reranked"], num_queries, num_index)
        if (np.sort(reranked, axis=1) != np.sort(retrieved, axis=1)).any():
            raise _damaged(file, "'reranked' holds other candidates than 'retrieved'")
    if "patch_scores" in arrays:
        wanted = (*shape, len(config.patch_sizes))
        patch_scores = _numbers(file, "patch_scores", arrays["patch_scores"], wanted, np.float32)
    scores = {
        method: _numbers(file, f"scores_{method}", arrays[f"scores_{method}"], shape, np.float64)
        for method in ("NetVLAD", "PatchNetVLAD")
        if f"scores_{method}" in arrays
    }
    return {
        **names,
        "retrieved": retrieved,
        "reranked": reranked,
        "patch_scores": patch_scores,
        "scores": scores,
    }


def _rows(
    file: Path, name: str, values: NDArray[Any], num_queries: int, num_index: int
) -> NDArray[np.int64]:
    if values.dtype.kind not in "iu" or values.ndim != 2 or len(values) != num_queries:
        raise _damaged(
            file, f"{name!r} is of {values.dtype} and shape {list(values.shape)}, "
            f"for {num_queries} queries"
        )  # fmt: skip
    if values.shape[1] < 1 or values.min() < 0 or values.max() >= num_index:
        raise _damaged(file, f"{name!r} must name rows of an index of {num_index} images")
    return values.astype(np.int64)


def _numbers(
    file: Path, name: str, values: NDArray[Any], shape: tuple[int, ...], dtype: Any
) -> NDArray[Any]:
    if values.dtype.kind != "f" or values.shape != shape:
        raise _damaged(
            file, f"{name!r} is of {values.dtype} and shape {list(values.shape)}, not of shape "
            f"{list(shape)}"
        )  # fmt: skip
    if not np.isfinite(values).all():
        raise _damaged(file, f"{name!r} holds NaN or infinities")
    return values.astype(dtype)


def _bytes_of(names: tuple[str, ...]) -> NDArray[np.uint8]:
    """Pack names as lines of UTF-8: an array of text would take the longest name's room a name."""
    return np.frombuffer("\n".join(names).encode(errors="surrogatepass"), np.uint8)


def _names_of(file: Path, packed: NDArray[Any], count: int) -> tuple[str, ...]:
    try:
        names = tuple(packed.astype(np.uint8).tobytes().decode(errors="surrogatepass").split("\n"))
    except ValueError as error:
        raise _damaged(file, error) from None
    if len(names) != count:
        raise _damaged(file, f"it has {len(names)} names for {count} images")
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


def _damaged(file: Path, reason: object) -> ResultsError:
    text = textwrap.shorten(str(reason), 250, placeholder=" ...") or type(reason).__name__
    return ResultsError(f"{file} cannot be read: {text}; {_WAY_OUT}, or delete {RUN_FILE}")
