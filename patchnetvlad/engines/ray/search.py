# SPDX-License-Identifier: MIT
"""Retrieval with an index in partitions, each held by a worker of a Ray cluster.

A partition is some of the index's rows. Each is searched by FAISS for all queries, and the nearest
rows of all partitions are merged by distance, then by row. For ``Flat`` that is what one index
gives, bit for bit. FAISS multiplies matrices of 1024 rows by 4096 queries, and the last bits of a
distance depend on the shape of these and on the number of threads; so partitions begin at multiples
of 1024 rows, queries are sent in multiples of 4096, and workers use as many threads as this process
would. What remains is the processor and the BLAS library: a warning says so if a worker's results
differ.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from patchnetvlad.base.files import make_folder
from patchnetvlad.config_ini import parse_parameters
from patchnetvlad.engines.ray.connection import code_version
from patchnetvlad.engines.ray.search_worker import (
    IndexShard,
    SearchPlan,
    Unreadable,
    arithmetic_digest,
    trained_index,
)
from patchnetvlad.errors import ClusterError, FeatureError, PatchNetVLADError
from patchnetvlad.search.exact import check_found, check_search, incomplete
from patchnetvlad.search.index import index_parts
from patchnetvlad.search.rows import Rows

logger = logging.getLogger(__name__)

RESTARTS = 3
"""How often a partition is rebuilt because its worker, or the node, died."""
SHARDS_A_NODE = 8
"""Largest number of partitions per node, unless their number is given."""
TRAINING_ROWS = 256
"""Rows of the index a centre, of lists or of a sub-quantizer, that an index is trained with."""
BATCHES = 2
"""Batches of queries under way at a time."""

_Calls = dict[Any, tuple["_Shard", Callable[[], Any]]]


def retrieve(
    queries: NDArray[np.float32],
    index: NDArray[np.float32] | Rows,
    top_k: int,
    *,
    factory: str = "Flat",
    parameters: str = "",
    index_path: str | Path | None = None,
    gpu: bool = False,
    num_shards: int | None = None,
    progress: bool = True,
) -> NDArray[np.int64]:
    """Find the nearest index images of each query, with the index in partitions on a Ray cluster.

    Ray must be initialised. Search is that of :func:`patchnetvlad.search.retrieve.retrieve`: with
    ``Flat`` it gives the same, in the same order. Any other kind of index is trained on one worker,
    with up to 256 rows per centre (at least 65,536, or all there are), drawn with a fixed seed;
    each partition then adds its own rows. A worker that dies is replaced, if need be on another
    node, and its partition is built or read again, at most three times.

    Parameters
    ----------
    queries : ndarray [Q, P] of float
    index : ndarray [N, P] of float, or Rows
        An array is sent to the workers part by part, through Ray's object store. Rows are read by
        each worker; one that does not see their file is sent its part.
    top_k : int
        Candidates per query, from 1; clamped to N.
    factory : str, default "Flat"
        Kind of index, in the language of FAISS's ``index_factory``.
    parameters : str, default ""
        How much each partition searches, as for :func:`patchnetvlad.search.retrieve.retrieve`.
    index_path : str or Path, optional
        Name for the files of the index, in a folder that all nodes share: ``city.faiss`` gives
        ``city.shard-0-of-3.faiss`` and so on, and ``city.trained.faiss`` if there is training. Each
        is a FAISS index whose ids are rows of the whole index, with a fingerprint beside it. Files
        that fit are reused; the number of partitions must be the same.
    gpu : bool, default False
        Has no effect: partitions are searched on the processors of their nodes.
    num_shards : int, optional
        By default one per node, and up to 8 on a node with several times the processors that this
        process uses. Never more than there are blocks of 1024 rows.
    progress : bool, default True
        Show progress bars.

    Returns
    -------
    ndarray [Q, min(top_k, N)] of int64
        Rows of ``index``, nearest first; none twice for a query.

    Raises
    ------
    ValueError
        ``top_k`` or ``num_shards`` is less than 1.
    PatchNetVLADError
        As for :func:`patchnetvlad.search.retrieve.retrieve`.
    ClusterError
        The workers of a partition kept dying.
    """
    import faiss

    k = check_search(queries.shape, index.shape, top_k)
    parse_parameters(parameters)
    if num_shards is not None and num_shards < 1:
        raise ValueError(f"num_shards = {num_shards} must be 1 or more")
    if k == 0 or len(queries) == 0:
        return np.empty((len(queries), k), np.int64)
    plan = SearchPlan(
        "".join(factory.split()),
        parameters,
        index.shape[0],
        index.shape[1],
        faiss.omp_get_max_threads(),
        None if index_path is None else os.path.abspath(index_path),
        code_version(),
    )
    plan.empty()  # refuses at once what FAISS would refuse on each worker
    if plan.path is not None:
        make_folder(Path(plan.path).parent)
    shards = _Shards(index, plan, num_shards or _places(plan.threads))
    try:
        shards.prepare(progress)
        found = shards.search("search", queries, k, progress)
        if plan.factory != "Flat":
            bad = incomplete(found, plan.factory)
            if bad.any():
                found[bad] = shards.search("search_exactly", queries[bad], k, progress)
    finally:
        shards.close()
    check_found(queries, found)
    return found


def merge(
    parts: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]], k: int
) -> NDArray[np.int64]:
    """Merge the results of several searches, by distance, then by row.

    Parameters
    ----------
    parts : sequence of (ndarray [Q, m] of float32, ndarray [Q, m] of int64)
        Distances and rows; -1 where there are no more.
    k : int

    Returns
    -------
    ndarray [Q, k] of int64
        The nearest rows; -1 where there are no more.

    Examples
    --------
    >>> first = np.array([[0.1, 0.5]], np.float32), np.array([[7, 2]])
    >>> other = np.array([[0.1, 0.3]], np.float32), np.array([[4, 9]])
    >>> merge([first, other], 3).tolist()
    [[4, 7, 9]]
    """
    distances = np.concatenate([part[0] for part in parts], axis=1)
    rows = np.concatenate([part[1] for part in parts], axis=1)
    distances = np.where(rows < 0, np.inf, distances)
    order = np.lexsort((np.where(rows < 0, np.iinfo(np.int64).max, rows), distances), axis=1)
    return np.take_along_axis(rows, order[:, :k], axis=1)


def _places(threads: int) -> int:
    """Return for how many partitions the nodes of the cluster have processors."""
    import ray

    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return max(1, sum(max(1, min(SHARDS_A_NODE, int(c // threads))) for c in nodes if c > 0))


def _cuts(count: int, num_shards: int) -> list[tuple[int, int]]:
    """Cut rows into at most that many parts, of whole blocks of FAISS's exact search."""
    import faiss

    block = faiss.cvar.distance_compute_blas_database_bs
    blocks = -(-count // block)
    parts = min(num_shards, blocks)
    edges = [min(count, blocks * i // parts * block) for i in range(parts + 1)]
    return list(itertools.pairwise(edges))


def _batches(count: int, dims: int) -> list[tuple[int, int]]:
    """Cut queries so that FAISS does with each part what it does with them within the whole."""
    import faiss

    block = faiss.cvar.distance_compute_blas_query_bs
    # Fewer numbers (in older FAISS, fewer queries) than that are compared one by one.
    least = faiss.cvar.distance_compute_blas_threshold
    step = block * max(1, -(-least // (block * dims)))
    edges = [*range(0, max(1, count - step + 1), step), count]
    return list(itertools.pairwise(edges))


def _source(index: NDArray[np.float32] | Rows, rows: slice | NDArray[np.int64]) -> list[Any]:
    """Give some rows of the index to workers, as Rows if that is what it is.

    The list of a reference, which the driver keeps, is what a worker that replaces another one can
    still read. Ray drops what it stores for large arguments by itself.
    """
    import ray

    return [ray.put(index[rows])] if isinstance(index, Rows) else _send(index, rows)


def _send(index: NDArray[np.float32] | Rows, rows: slice | NDArray[np.int64]) -> list[Any]:
    import ray

    if isinstance(index, Rows):
        try:
            part = index[rows].read()
        except OSError as error:
            raise FeatureError(f"{index.path} cannot be read: {error}") from None
    else:
        part = np.ascontiguousarray(index[rows], np.float32)
    return [ray.put(part)]


def _result(reference: Any, name: str) -> Any:
    """Wait for the result of a worker, or raise its error."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, PatchNetVLADError | Unreadable):
            raise error.cause from None
        raise
    except RayError as error:
        reason = str(error).strip().split("\n")[0]
        raise ClusterError(
            f"{name}: the worker died {RESTARTS + 1} times ({reason}); give the nodes more memory, "
            "or the index more partitions"
        ) from None


@dataclass
class _Shard:
    """A partition as the driver sees it."""

    number: int
    first: int
    last: int
    source: list[Any]
    sent: bool = False
    actor: Any = None

    def __str__(self) -> str:
        return f"index images {self.first}-{self.last}"


class _Shards:
    """All partitions of an index, and their actors."""

    def __init__(
        self, index: NDArray[np.float32] | Rows, plan: SearchPlan, num_shards: int
    ) -> None:
        self.index, self.plan = index, plan
        self.trained: list[Any] = []
        self.shards = [
            _Shard(number, first, end - 1, _source(index, slice(first, end)))
            for number, (first, end) in enumerate(_cuts(plan.count, num_shards))
        ]

    def prepare(self, progress: bool) -> None:
        """Train, if the kind of index needs it, and make all partitions ready."""
        begin = time.perf_counter()
        plain = self.plan.factory == "Flat" and self.plan.path is None
        if not self.plan.empty().is_trained:
            self.trained = [self._train()]
        for shard in self.shards:
            self._start(shard)
        from_files, arithmetic = 0, set()
        with tqdm(
            total=self.plan.count,
            desc="Reading the index" if plain else f"Building {self.plan.factory}",
            unit="image",
            disable=not progress,
        ) as bar:
            calls = self._call("prepare", "read" if plain else "add")
            for shard, (from_file, digest) in self._results(calls):
                from_files += from_file
                arithmetic.add(digest)
                bar.update(shard.last - shard.first + 1)
        if self.plan.factory == "Flat" and arithmetic != {arithmetic_digest()}:
            logger.warning(
                "the processors or the FAISS of the workers round distances differently from "
                "this machine, or from each other: candidates whose distances differ in their "
                "last digits may be in another order than on one machine"
            )
        logger.info(
            "%s in %d partitions, %d of them read from files, is ready after %.1f s",
            self.plan.factory,
            len(self.shards),
            from_files,
            time.perf_counter() - begin,
        )

    def search(
        self, method: str, queries: NDArray[np.float32], k: int, progress: bool
    ) -> NDArray[np.int64]:
        """Search all partitions for all queries; rows [Q, k], -1 where there are no more."""
        import ray

        found = np.empty((len(queries), k), np.int64)
        waiting: list[tuple[int, int, _Calls]] = []
        with tqdm(total=len(queries), desc="Searching", unit="query", disable=not progress) as bar:

            def finish() -> None:
                first, end, calls = waiting.pop(0)
                found[first:end] = merge([result for _, result in self._results(calls)], k)
                bar.update(end - first)

            for first, end in _batches(len(queries), self.plan.dims):
                part = ray.put(np.ascontiguousarray(queries[first:end], np.float32))
                waiting.append((first, end, self._call(method, "search", part, k)))
                if len(waiting) == BATCHES:
                    finish()
            while waiting:
                finish()
        return found

    def close(self) -> None:
        """End the actors."""
        import ray

        for shard in self.shards:
            if shard.actor is not None:
                with contextlib.suppress(Exception):
                    ray.kill(shard.actor)

    def _train(self) -> Any:
        """Train on one worker; a reference to the bytes of the index without descriptors."""
        import ray

        centres = 256
        for part in index_parts(self.plan.empty()):
            quantizer = getattr(part, "pq", None)
            centres = max(centres, getattr(part, "nlist", 0), getattr(quantizer, "ksub", 0))
        count, rows = self.plan.count, np.arange(self.plan.count)
        picked: slice | NDArray[np.int64] = slice(None)
        if count > centres * TRAINING_ROWS:
            rng = np.random.default_rng(0)
            picked = rows = np.sort(rng.choice(rows, centres * TRAINING_ROWS, replace=False))
        name = f"train {self.plan.factory} with {len(rows)} of {count} images"
        task = ray.remote(trained_index).options(num_cpus=0.01, max_retries=RESTARTS, name=name)
        try:
            data = _result(task.remote(self.plan, _source(self.index, picked), rows), name)
        except Unreadable as error:
            logger.info("%s: the rows are sent to the worker (%s)", name, error)
            data = _result(task.remote(self.plan, _send(self.index, picked), rows), name)
        return ray.put(data)  # which the worker's end does not take away

    def _start(self, shard: _Shard) -> None:
        import ray

        actor: Any = ray.remote(IndexShard)
        actor = actor.options(
            num_cpus=0.01,
            scheduling_strategy="SPREAD",
            max_restarts=RESTARTS,
            max_task_retries=-1,  # as long as the actor comes back
        )
        name = f"shard-{shard.number}-of-{len(self.shards)}"
        shard.actor = actor.remote(
            self.plan, shard.source, shard.first, shard.last, name, self.trained
        )

    def _call(self, method: str, verb: str, *args: Any) -> _Calls:
        """Call a method of all actors."""
        calls: _Calls = {}
        for shard in self.shards:

            def again(shard: _Shard = shard) -> Any:
                call = getattr(shard.actor, method).options(name=f"{verb} {shard}")
                return call.remote(*args)

            calls[again()] = shard, again
        return calls

    def _results(self, calls: _Calls) -> Iterator[tuple[_Shard, Any]]:
        """Yield what calls return, as they do so."""
        import ray

        while calls:
            (reference, *_), _ = ray.wait(list(calls))
            shard, again = calls.pop(reference)
            try:
                yield shard, _result(reference, str(shard))
            except Unreadable as error:
                if not shard.sent:
                    logger.info("%s are sent to a worker (%s)", shard, error)
                    rows = slice(shard.first, shard.last + 1)
                    shard.source, shard.sent = _send(self.index, rows), True
                    self._start(shard)  # Ray ends the other one, which nothing refers to
                calls[again()] = shard, again
