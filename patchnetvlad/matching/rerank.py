# SPDX-License-Identifier: MIT
"""Re-ranking: the candidates of every query, put in order by their patches."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from patchnetvlad.config import Config
from patchnetvlad.device import (
    arithmetic,
    beside,
    choose_precision,
    count_cpus,
    download,
    empty_cache,
    memory_budget,
    out_of_memory,
    serial_pool,
    upload,
)
from patchnetvlad.errors import DeviceError, FeatureError, OutputError
from patchnetvlad.geometry import PatchGrid
from patchnetvlad.matching.batched_ransac import batched_homographies
from patchnetvlad.matching.fusion import fuse_scores, rank
from patchnetvlad.matching.nearest import Pairs, mutual_nearest_neighbours, pairs_of
from patchnetvlad.matching.on_device import find_matches, score_candidates
from patchnetvlad.matching.pair import inlier_score, keypoints_of, score_matches

T = TypeVar("T")
logger = logging.getLogger(__name__)

PatchReader = Callable[[int], Sequence[Tensor] | Sequence[NDArray[np.float32]]]
GridReader = Callable[[int], Sequence[PatchGrid]]
Names = Sequence[str] | Mapping[int, str]
Candidates = NDArray[np.int64] | Mapping[int, NDArray[np.int64]]
Run = Callable[[Sequence[int], NDArray[np.int64]], Iterator[tuple[int, NDArray[np.float64]]]]

_CPU_BLOCK = 8  # candidates of a task, so that handing it over takes no time in comparison
_LOADERS = 4
_SHARING = 4000  # queries, repetitions counted, that are looked at for the next to be visited


@dataclass(frozen=True, eq=False)
class Reranking:
    """The outcome of re-ranking.

    Attributes
    ----------
    predictions : ndarray [Q, k] of int64
        Candidates of each query, best first.
    scores : ndarray [Q, k, S] of float64
        Score of each candidate at each patch size, in the order of the candidates before
        re-ranking; lower is better.
    """

    predictions: NDArray[np.int64]
    scores: NDArray[np.float64]


def rerank_candidates(
    predictions: NDArray[np.int64],
    query_patches: PatchReader,
    index_patches: PatchReader,
    query_grids: GridReader,
    index_grids: GridReader,
    config: Config,
    *,
    names: tuple[Sequence[str], Sequence[str]] | None = None,
    device: torch.device | str = "cpu",
    journal: Journal | None = None,
    progress: bool = True,
) -> Reranking:
    """Order the candidates of every query by their patches (paper, sections 3.3 to 3.5).

    Images are loaded ahead, and kept in memory as far as ``config.memory_mb`` goes; queries are
    visited in an order in which candidates repeat soon.

    Parameters
    ----------
    predictions : ndarray [Q, k] of int64
        Candidates from retrieval.
    query_patches, index_patches : callable
        Give the patch descriptors of image ``i``: tensors or arrays [n_s, P], one a patch size.
        They are called from several threads.
    query_grids, index_grids : callable
        Give the patch grids of image ``i``, one a patch size.
    config : Config
        Its ``matcher``, ``ransac``, ``patch_weights`` and ``memory_mb`` are used.
    names : (sequence of str, sequence of str), optional
        Names of the queries and of the index images, for messages.
    device : torch.device or str, default "cpu"
        Where nearest neighbours are computed.
    journal : Journal, optional
        Has the scores of queries that an interrupted run finished, and gets those of this one.
    progress : bool, default True

    Returns
    -------
    Reranking

    Raises
    ------
    FeatureError
        Features do not fit each other or their grids.
    """
    config.check_matching()
    with Matcher(
        config,
        torch.device(device),
        (query_patches, index_patches),
        (query_grids, index_grids),
        names,
    ) as matcher:
        return collect_scores(predictions, config, matcher.run, journal=journal, progress=progress)


def collect_scores(
    predictions: NDArray[np.int64],
    config: Config,
    run: Run,
    *,
    journal: Journal | None = None,
    progress: bool = True,
) -> Reranking:
    """Order candidates by the scores that somebody computes.

    Parameters
    ----------
    predictions : ndarray [Q, k] of int64
    config : Config
    run : callable
        Is given queries, in the order in which candidates are shared best, and the predictions;
        gives queries and the scores [k, S] of each, in any order.
    journal, progress
        As for :func:`rerank_candidates`.

    Returns
    -------
    Reranking
    """
    num_queries, num_candidates = predictions.shape
    scores = np.zeros((num_queries, num_candidates, len(config.patch_sizes)))
    finished = journal.scores if journal is not None else {}
    for q, values in finished.items():
        scores[q] = values
    todo = [q for q in visiting_order(predictions).tolist() if q not in finished]
    with tqdm(
        total=num_queries,
        initial=num_queries - len(todo),
        desc="Re-ranking",
        unit="query",
        disable=not progress,
    ) as bar:
        for q, values in run(todo, predictions):
            scores[q] = values
            if journal is not None:
                journal.add(q, values)
            bar.update()
    ranked = [
        rank(row, fuse_scores(values, config.patch_weights))
        for row, values in zip(predictions, scores, strict=True)
    ]
    return Reranking(np.array(ranked, dtype=np.int64).reshape(predictions.shape), scores)


def as_matched(patches: Tensor, precision: str) -> Tensor:
    """Cast descriptors to the precision that they are matched in.

    On a GPU, float16 doubles what its memory holds, and its speed; sums are of float32.
    """
    return patches if precision == "exact" or patches.device.type == "cpu" else patches.half()


def visiting_order(predictions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Order queries so that each shares many candidates with the one before.

    From one query on, the unvisited query that shares most candidates with it is next; where
    none shares any, the first that is left. Where candidates are shared by many, only the best
    of each query are looked at, so that the time stays proportional to the number of queries.

    Parameters
    ----------
    predictions : ndarray [Q, k] of int64
        Candidates.

    Returns
    -------
    ndarray [Q] of int64
        Each query once.
    """
    num_queries, k = predictions.shape
    if num_queries == 0 or k == 0:
        return np.arange(num_queries)
    few = max(1, int((_SHARING * (predictions.max() + 1) / num_queries) ** 0.5))
    predictions = predictions[:, :few]
    k = predictions.shape[1]
    flat = predictions.ravel()
    by_candidate = np.argsort(flat, kind="stable") // k  # queries, grouped by candidate
    starts = np.searchsorted(np.sort(flat), np.arange(flat.max() + 2))
    left = np.ones(num_queries, dtype=bool)
    order = np.empty(num_queries, dtype=np.int64)
    first, current = 0, 0
    for n in range(num_queries):
        order[n], left[current] = current, False
        if n == num_queries - 1:
            break
        sharing = np.concatenate(
            [by_candidate[starts[c] : starts[c + 1]] for c in predictions[current]]
        )
        sharing = sharing[left[sharing]]
        if len(sharing):
            seen, counts = np.unique(sharing, return_counts=True)
            current = int(seen[counts.argmax()])
        else:
            while not left[first]:
                first += 1
            current = first
    return order


class Matcher:
    """Threads that load and match; a context.

    A block of candidates is one task. On a CPU, one thread does it from beginning to end. On a
    GPU, all candidates of a query are a block, as far as memory allows: their descriptors stay in
    its memory, matching and scoring are launched together, and while one query is computed the
    next is launched and others are loaded. OpenCV's homographies are fitted on the CPU meanwhile.

    Parameters
    ----------
    config : Config
    device : torch.device
    patches : (callable, callable)
        Of queries and of index images, as of :func:`rerank_candidates`.
    grids : (callable, callable)
    names : (sequence of str, sequence of str), optional
        For messages.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        patches: tuple[PatchReader, PatchReader],
        grids: tuple[GridReader, GridReader],
        names: tuple[Names, Names] | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.patches = patches
        self.grids = grids
        self.names = names
        self.batched = config.matcher == "RANSAC" and config.ransac == "batched"
        self.threads = torch.get_num_threads()
        self.on_cpu = device.type == "cpu"
        self._exit = contextlib.ExitStack()
        loaders = _LOADERS if self.on_cpu else max(_LOADERS, min(16, count_cpus()))
        self._loaders = serial_pool(loaders, "load")
        # On a GPU one launches while the other waits for what it launched before.
        self._matchers = serial_pool(self.threads if self.on_cpu else 2, "match")
        self._verifiers = ThreadPoolExecutor(count_cpus(), "verify")
        self._limit = memory_budget(config.memory_mb, device)
        self._cache = PatchCache(self._load, self._loaders, self._limit // 2)

    def __enter__(self) -> Matcher:
        for pool in (self._loaders, self._matchers, self._verifiers):
            self._exit.callback(pool.shutdown, cancel_futures=True)
        # Each of our threads computes alone. A part of the setting is the process's.
        self._exit.callback(torch.set_num_threads, self.threads)
        torch.set_num_threads(1)
        precision = choose_precision(self.config.precision, self.device)
        self._exit.enter_context(arithmetic(self.device, precision))
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def _name(self, part: int, i: int) -> str:
        return f"{('query', 'index image')[part]} {self.names[part][i] if self.names else i}"

    def _load(self, key: tuple[int, int]) -> list[Tensor]:
        """Load the descriptors of a query (0, q) or an index image (1, i)."""
        part, i = key
        described = self._with_memory(partial(self._read, part, i))
        for values, grid in zip(described, self.grids[part](i), strict=True):
            if len(values) != len(grid):
                raise FeatureError(
                    f"{self._name(part, i)} has {len(values)} patches of size {grid.patch_size}; "
                    f"an image of the configured size has {len(grid)}. Check imageresizeh, "
                    f"imageresizew and strides in {self.config.source}"
                )
        return described

    def _read(self, part: int, i: int) -> list[Tensor]:
        with beside(self.device):
            return [
                values.to(self.device)
                if isinstance(values, Tensor)
                else upload(np.ascontiguousarray(values), self.device)
                for values in self.patches[part](i)
            ]

    def run(
        self, todo: Sequence[int], predictions: Candidates
    ) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Match queries with their candidates; give the scores [k, S] of each, in order."""
        under_way: deque[tuple[int, list[Future[NDArray[np.float64]]]]] = deque()
        slots: threading.Semaphore | None = None
        block = 1
        for q in todo:
            query = self._cache.fetch((0, q))
            if slots is None:
                block, ahead = self._plan(query.result(), len(predictions[q]))
                slots = threading.BoundedSemaphore(ahead)
            tasks = []
            row = predictions[q].tolist()
            for start in range(0, len(row), block):
                part = row[start : start + block]
                slots.acquire()
                candidates = [self._cache.fetch((1, c)) for c in part]
                task = self._matchers.submit(self._match, q, query, part, candidates)
                task.add_done_callback(partial(_release, slots))
                tasks.append(task)
                while under_way and all(task.done() for task in under_way[0][1]):
                    yield self._finish(*under_way.popleft())
            under_way.append((q, tasks))
        while under_way:
            yield self._finish(*under_way.popleft())

    def _plan(self, query: Sequence[Tensor], num_candidates: int) -> tuple[int, int]:
        """Choose how many candidates a task has, and how many tasks are under way.

        Their images are loaded and wait for their turn, beside those in the cache.
        """
        size = max(1, _nbytes(query))
        if self.on_cpu:
            least = self.threads + 1
            shared = num_candidates // (4 * self.threads)
            block = min(_CPU_BLOCK, self._limit // 2 // size // least, shared)
        else:
            least = 3
            block = min(num_candidates, self._limit // 4 // size)
        block = max(1, block)
        return block, max(min(256, self._limit // 2 // (size * block)), least)

    def _match(
        self,
        q: int,
        query_future: Future[list[Tensor]],
        candidates: Sequence[int],
        futures: Sequence[Future[list[Tensor]]],
    ) -> NDArray[np.float64]:
        """Match a query with a block of candidates; give their scores [block, S]."""
        query = query_future.result()
        described = [future.result() for future in futures]
        self._check_dimensions(q, query, candidates, described)
        with torch.inference_mode():
            if self.on_cpu:
                return np.array(self._scores_on_cpu(q, query, candidates, described))
            return self._scores_in_halves(q, query, candidates, described)

    def _check_dimensions(
        self,
        q: int,
        query: Sequence[Tensor],
        candidates: Sequence[int],
        described: Sequence[Sequence[Tensor]],
    ) -> None:
        for c, patches in zip(candidates, described, strict=True):
            for ours, theirs in zip(query, patches, strict=True):
                if ours.shape[1] != theirs.shape[1]:
                    raise FeatureError(
                        f"the patch descriptors of {self._name(0, q)} have {ours.shape[1]} "
                        f"dimensions, those of {self._name(1, c)} {theirs.shape[1]}; extract both "
                        "with one configuration"
                    )

    def _scores_on_cpu(
        self,
        q: int,
        query: Sequence[Tensor],
        candidates: Sequence[int],
        described: Sequence[Sequence[Tensor]],
    ) -> list[list[float]]:
        matches = [
            [mutual_nearest_neighbours(*pair) for pair in zip(query, patches, strict=True)]
            for patches in described
        ]
        if not self.batched:
            return [self._verify(q, c, of) for c, of in zip(candidates, matches, strict=True)]
        grids = self.grids[0](q)
        problems = [
            keypoints_of(pairs, ours, theirs)
            for c, of in zip(candidates, matches, strict=True)
            for pairs, ours, theirs in zip(of, grids, self.grids[1](c), strict=True)
        ]
        solutions = iter(batched_homographies(problems))
        return [[inlier_score(next(solutions)[1], grid) for grid in grids] for _ in candidates]

    def _verify(self, q: int, c: int, matches: Sequence[Pairs]) -> list[float]:
        """Score a candidate's matches, at each patch size."""
        config = self.config
        sizes = zip(matches, self.grids[0](q), self.grids[1](c), strict=True)
        return [
            score_matches(pairs, ours, theirs, config.matcher, config.ransac).score
            for pairs, ours, theirs in sizes
        ]

    def _scores_in_halves(
        self,
        q: int,
        query: Sequence[Tensor],
        candidates: Sequence[int],
        described: Sequence[Sequence[Tensor]],
    ) -> NDArray[np.float64]:
        """Score on a device; where its memory does not suffice, half of the candidates first."""
        try:
            return self._scores_on_device(q, query, candidates, described)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        self._make_room()
        if len(candidates) == 1:
            return self._scores_on_device(q, query, candidates, described)
        half = len(candidates) // 2
        parts = (slice(None, half), slice(half, None))
        return np.concatenate(
            [self._scores_in_halves(q, query, candidates[p], described[p]) for p in parts]
        )

    def _scores_on_device(
        self,
        q: int,
        query: Sequence[Tensor],
        candidates: Sequence[int],
        described: Sequence[Sequence[Tensor]],
    ) -> NDArray[np.float64]:
        # What was loaded is referred to until the device is done with it: see `beside`.
        if self.batched or self.config.matcher == "spatialApproximator":
            their_grids = [self.grids[1](c) for c in candidates]
            scores = score_candidates(
                query, described, self.grids[0](q), their_grids, self.config.matcher
            )
            return download([scores])[0].numpy()
        found = download([find_matches(query, described)])[0].numpy()  # [S, B, L]
        matches = [[pairs_of(row)[0] for row in found[:, b, None]] for b in range(len(candidates))]
        verified = self._verifiers.map(lambda c, of: self._verify(q, c, of), candidates, matches)
        return np.array(list(verified))

    def _make_room(self) -> None:
        self._cache.halve()
        empty_cache(self.device)
        logger.info("%s is out of memory; keeping fewer features there", self.device)

    def _with_memory(self, work: Callable[[], T]) -> T:
        """Do some work again with fewer features in memory, if it does not suffice."""
        try:
            return work()
        except RuntimeError as error:
            if self.on_cpu or not out_of_memory(error):
                raise
        self._make_room()
        return work()

    def _finish(
        self, q: int, tasks: Sequence[Future[NDArray[np.float64]]]
    ) -> tuple[int, NDArray[np.float64]]:
        try:
            results = [task.result() for task in tasks]
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise DeviceError(
                f"the memory of {self.device} is too small to match two images beside "
                f"{self._limit // 2**20} MiB of features; set a smaller memory_mb in "
                f"{self.config.source}, or use another --device"
            ) from None
        return q, np.concatenate(results).astype(np.float64, copy=False)


def _release(slots: threading.Semaphore, _: object) -> None:
    slots.release()


class PatchCache:
    """Keeps the patch descriptors of the images that were used last, within a limit.

    Parameters
    ----------
    load : callable
        Gives the descriptors [n_s, P] of an image, one tensor a patch size.
    pool : ThreadPoolExecutor
        Where it is called.
    limit : int
        Bytes.
    """

    def __init__(
        self,
        load: Callable[[tuple[int, int]], list[Tensor]],
        pool: ThreadPoolExecutor,
        limit: int,
    ) -> None:
        self._load = load
        self._pool = pool
        self._limit = limit
        self._bytes = 0
        self._entries: OrderedDict[tuple[int, int], Future[list[Tensor]]] = OrderedDict()
        self._lock = threading.Lock()

    def fetch(self, key: tuple[int, int]) -> Future[list[Tensor]]:
        """Return the future of an image's descriptors; an image is loaded once at a time."""
        with self._lock:
            future = self._entries.get(key)
            if future is None:
                future = self._entries[key] = self._pool.submit(self._loaded, key)
            self._entries.move_to_end(key)
            return future

    def halve(self) -> None:
        """Keep half as much from now on."""
        with self._lock:
            self._limit //= 2
            self._evict()

    def _evict(self, kept: tuple[int, int] | None = None) -> None:
        """Let go of what was used longest ago, as far as there is too much; but not of ``kept``."""
        for key, future in list(self._entries.items()):
            if self._bytes <= self._limit:
                break
            if key != kept and future.done() and not future.exception():
                self._bytes -= _nbytes(future.result())
                del self._entries[key]

    def _loaded(self, key: tuple[int, int]) -> list[Tensor]:
        try:
            patches = self._load(key)
        except BaseException:
            with self._lock:
                self._entries.pop(key, None)  # it may be asked for again
            raise
        with self._lock:
            self._bytes += _nbytes(patches)
            self._evict(key)
        return patches


def _nbytes(patches: Sequence[Tensor]) -> int:
    return sum(part.nbytes for part in patches)


class Journal:
    """Checkpoint file with the scores of finished queries, used to resume a run.

    It is an SQLite database. Each query is a transaction of its own, so a killed run loses none;
    a power cut can lose those of the last moments, which the operating system had not written yet.
    A file that is damaged, or not such a database, is replaced by an empty one.

    Parameters
    ----------
    path : Path
    shape : (int, int)
        Candidates k and patch sizes S.

    Attributes
    ----------
    scores : dict of int to ndarray [k, S] of float64
        By query, as they were when the file was opened; those with a wrong checksum are left out.

    Raises
    ------
    OutputError
        The file cannot be written, or another process is writing it.
    """

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self.path = path
        with self._errors():
            try:
                self._open(shape)
            except sqlite3.DatabaseError as error:
                if any(sign in str(error) for sign in _NOT_DAMAGED):
                    raise
                self.remove()
                self._open(shape)

    def _open(self, shape: tuple[int, int]) -> None:
        self._db = sqlite3.connect(self.path, isolation_level=None)
        for setting in _SETTINGS:
            self._db.execute(f"PRAGMA {setting}")
        (state,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise sqlite3.DatabaseError(state)
        self._db.execute(_TABLE)
        self.scores: dict[int, NDArray[np.float64]] = {
            q: np.frombuffer(values, np.float64).reshape(shape)
            for q, values, crc in self._db.execute("SELECT query, scores, crc FROM scores")
            if isinstance(q, int)
            and isinstance(values, bytes)
            and len(values) == 8 * shape[0] * shape[1]
            and crc == _checksum(q, values)
        }

    def add(self, q: int, scores: NDArray[np.float64]) -> None:
        """Write down the scores [k, S] of query ``q``."""
        values = np.ascontiguousarray(scores, dtype=np.float64).tobytes()
        with self._errors():
            self._db.execute(
                "INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", (q, values, _checksum(q, values))
            )

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(sqlite3.Error):  # of what could not be written before
            self._db.close()

    def remove(self) -> None:
        """Close the file and delete it."""
        self.close()
        for ending in ("", "-wal", "-journal"):
            self.path.with_name(f"{self.path.name}{ending}").unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if "locked" in str(error):
                raise OutputError(
                    f"{self.path} is in use by another process; wait until that has ended, or "
                    "name another folder"
                ) from None
            raise OutputError(
                f"{self.path} cannot be written: {error}; the queries in it are kept, and the same "
                "command resumes from there"
            ) from None


# Commits go to a log, which is synced when it is moved to the database, not once per query. With
# the lock held until the end, the log needs no shared memory, which network file systems lack.
_SETTINGS = ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL")
_TABLE = """
CREATE TABLE IF NOT EXISTS scores (
    query INTEGER PRIMARY KEY, scores BLOB NOT NULL, crc INTEGER NOT NULL
)"""
_NOT_DAMAGED = ("locked", "unable to open", "readonly", "full", "disk I/O")  # in SQLite's messages


def _checksum(q: int, values: bytes) -> int:
    return zlib.crc32(values, q)
