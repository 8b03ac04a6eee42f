# SPDX-License-Identifier: MIT
"""Re-ranking on a cluster: workers match groups of queries that share candidates.

The driver tells workers where the features of images are, and workers read them. A worker keeps
features in memory, and is given queries whose candidates it has.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.assets.checkpoints import resolve_checkpoint
from patchnetvlad.base.device import memory_budget
from patchnetvlad.base.names import absolute_location
from patchnetvlad.config import Config
from patchnetvlad.engines.engine import PatchReader, Run
from patchnetvlad.engines.local_rerank import Matcher
from patchnetvlad.engines.ray.connection import check_code, code_version
from patchnetvlad.engines.ray.extract_worker import load_describer, serve_checkpoint
from patchnetvlad.engines.ray.pool import Failure, Pool, Task, Worker, task_size
from patchnetvlad.engines.readers import grid_reader, patch_readers
from patchnetvlad.errors import ClusterError, FeatureError, PatchNetVLADError
from patchnetvlad.features.interface import Reader
from patchnetvlad.features.manifest import check_checkpoint
from patchnetvlad.models.describer import Describer

logger = logging.getLogger(__name__)

T = TypeVar("T")
Paths = tuple[Sequence[Path | str], Sequence[Path | str]]

_GROUP = 32  # largest number of queries per task
_LOOK_AT = 64  # groups to choose from, by the candidates that a worker has


@contextlib.contextmanager
def matching(
    config: Config,
    readers: tuple[Reader, Reader],
    paths: Paths,
    names: tuple[Sequence[str], Sequence[str]],
    *,
    on_gpus: bool,
) -> Iterator[Run]:
    """Prepare for scoring candidates; workers start when they are needed.

    Parameters
    ----------
    config : Config
    readers : (StoreReader or NpyReader, StoreReader or NpyReader)
        Of queries and of index images.
    paths : (sequence of Path, sequence of Path)
        Of the images, whose sizes are read where they are not resized.
    names : (sequence of str, sequence of str)
    on_gpus : bool

    Yields
    ------
    callable
        As for :func:`~patchnetvlad.engines.rerank.collect_scores`.
    """
    model = _find_model(config, readers)
    yield functools.partial(_run, config, readers, paths, names, model, on_gpus)


@dataclass(frozen=True, eq=False)
class _Model:
    """Where workers get the model for feature maps."""

    checkpoint: str
    sha256: str
    server: Any


def _find_model(config: Config, readers: Sequence[Reader]) -> _Model | None:
    maps = [reader for reader in readers if reader.kind == "map"]
    if not maps:
        return None
    for reader in maps:
        check_checkpoint(reader.directory, reader.manifest, config)
    path = str(resolve_checkpoint(config.resume_path, config.num_pcs).resolve())
    assert maps[0].manifest is not None
    return _Model(path, maps[0].manifest.checkpoint, serve_checkpoint(path))


@dataclass(frozen=True, eq=False)
class _Group:
    """Queries and what a worker needs to match them.

    Attributes
    ----------
    queries : list of int
    predictions : ndarray [len(queries), k] of int64
    readers : (Reader, Reader)
        Small ones, of these queries and their candidates.
    paths, names : (dict, dict)
        By the images' rows in their lists; paths only if images have native sizes.
    """

    queries: list[int]
    predictions: NDArray[np.int64]
    readers: tuple[Reader, Reader]
    paths: tuple[dict[int, Path | str], dict[int, Path | str]]
    names: tuple[dict[int, str], dict[int, str]]


def _run(
    config: Config,
    readers: tuple[Reader, Reader],
    paths: Paths,
    names: tuple[Sequence[str], Sequence[str]],
    model: _Model | None,
    on_gpus: bool,
    todo: Sequence[int],
    predictions: NDArray[np.int64],
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Score the candidates of queries; see :func:`~patchnetvlad.engines.rerank.collect_scores`.

    An error of some queries is raised when all others are done.
    """
    if not todo:
        return
    native = config.match_image_size == (0, 0)

    def task(queries: Sequence[int]) -> Task:
        return Task(f"re-rank {len(queries)} queries from {names[0][queries[0]]}", queries)

    def group(task: Task) -> tuple[_Group]:
        queries = list(task.items)
        rows = predictions[queries]
        candidates = np.unique(rows).tolist()
        return (
            _Group(
                queries,
                rows,
                (readers[0].part(queries), readers[1].part(candidates)),
                (_locations(paths[0], queries), _locations(paths[1], candidates))
                if native
                else ({}, {}),
                (_some(names[0], queries), _some(names[1], candidates)),
            ),
        )

    capacity = _cached_images(config, readers[1], predictions)

    def choose(worker: Worker, waiting: Sequence[Task]) -> int:
        """Choose the group most of whose candidates the worker has in memory."""
        looked_at = [
            np.unique(predictions[list(waiting[i].items)]).tolist()
            for i in range(min(_LOOK_AT, len(waiting)))
        ]
        shared = [sum(c in worker.known for c in candidates) for candidates in looked_at]
        best = int(np.argmax(shared))
        for candidate in looked_at[best]:
            worker.known.pop(candidate, None)
            worker.known[candidate] = None
        while len(worker.known) > capacity:
            del worker.known[next(iter(worker.known))]
        return best

    size = max(1, round(task_size(len(todo), _GROUP, on_gpus)))
    wrong: Exception | None = None
    arguments = code_version(), config, model, on_gpus
    with Pool(RerankWorker, arguments, on_gpus=on_gpus) as pool:
        for start in range(0, len(todo), size):
            pool.add(task(todo[start : start + size]))
        for done, result in pool.run(group, choose, task):
            if not isinstance(result, Failure):
                yield from zip(done.items, result, strict=True)
                continue
            logger.warning("%r is given up: %s", done.name, result.error)
            if result.blamed:
                query = f"the query {names[0][done.items[0]]}"
                wrong = ClusterError(
                    f"matching {query} killed the workers that it was given to (out of memory?); "
                    "lower memory_mb"
                    if result.died
                    else f"{query} cannot be matched: {result.reason}"
                )
            else:
                wrong = wrong or result.error
    if wrong is not None:
        raise wrong


def _some(values: Sequence[T], rows: Iterable[int]) -> dict[int, T]:
    return {i: values[i] for i in rows}


def _locations(paths: Sequence[Path | str], rows: Iterable[int]) -> dict[int, Path | str]:
    """Return absolute locations of some images, for processes in other folders."""
    return {i: absolute_location(paths[i]) for i in rows}


def _cached_images(config: Config, reader: Reader, predictions: NDArray[np.int64]) -> int:
    """Estimate how many index images' patches a worker keeps in memory."""
    factor = {"int8": 4, "float16": 2}.get(reader.kind, 1)
    size = max(1, reader.size(int(predictions.flat[0])))
    budget = memory_budget(config.memory_mb, torch.device("cpu"))
    return max(1, budget // 2 // (size * factor))


# --- the workers' side ----------------------------------------------------------------------------


class RerankWorker:
    """Ray actor that matches groups of queries with their candidates.

    Parameters
    ----------
    cpus : int
    code : str
        As for :func:`~patchnetvlad.engines.ray.connection.check_code`.
    config : Config
    model : _Model or None
        For feature maps.
    on_gpu : bool
    """

    def __init__(
        self, cpus: int, code: str, config: Config, model: _Model | None, on_gpu: bool
    ) -> None:
        check_code(code)
        torch.set_num_threads(cpus)
        self._config = config
        self._device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        self._reads: list[PatchReader] = []  # of one group, whose records they hold
        self._paths: tuple[dict[int, Path | str], dict[int, Path | str]] = ({}, {})
        self._names: tuple[dict[int, str], dict[int, str]] = ({}, {})
        self._matcher: Matcher | None = None
        self._describer: Describer | None = None
        if model is not None:
            self._describer = load_describer(
                cpus, config, model.checkpoint, model.sha256, model.server, on_gpu
            )

    def ready(self) -> None:
        """Return as soon as the model, if one is needed, is loaded."""

    def run(self, group: _Group) -> list[NDArray[np.float64]]:
        """Score the candidates of a group of queries; [k, S] each, in their order.

        Raises
        ------
        FeatureError
            Features are missing, damaged, or do not fit each other.
        """
        describer = self._describer
        load = None if describer is None else lambda: describer
        self._reads = patch_readers(self._config, group.readers, self._device, load)
        for part in (0, 1):
            self._paths[part].update(group.paths[part])
            self._names[part].update(group.names[part])
        if self._matcher is None:
            self._matcher = self._make_matcher()
            self._matcher.__enter__()  # for as long as this process lives
        rows = dict(zip(group.queries, group.predictions, strict=True))
        try:
            scores = dict(self._matcher.run(group.queries, rows))
        except PatchNetVLADError as error:
            raise FeatureError(str(error)) from None  # which the driver can be sent
        return [scores[q] for q in group.queries]

    def _make_matcher(self) -> Matcher:
        grids = tuple(grid_reader(self._config, paths) for paths in self._paths)
        return Matcher(
            self._config,
            self._device,
            (lambda i: self._reads[0](i), lambda i: self._reads[1](i)),
            (grids[0], grids[1]),
            self._names,
        )
