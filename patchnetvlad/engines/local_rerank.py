# SPDX-License-Identifier: MIT
"""Matching queries and candidates in this process, by threads."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.base.device import (
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
from patchnetvlad.config import Config
from patchnetvlad.engines.engine import Candidates, GridReader, Names, PatchReader
from patchnetvlad.errors import DeviceError, FeatureError
from patchnetvlad.matching.batched_ransac import batched_homographies
from patchnetvlad.matching.nearest import Pairs, mutual_nearest_neighbours, pairs_of
from patchnetvlad.matching.on_device import find_matches, score_candidates
from patchnetvlad.matching.pair import inlier_score, keypoints_of, score_matches

T = TypeVar("T")
logger = logging.getLogger(__name__)

_CPU_BLOCK = 8  # candidates of a task, so that handing it over takes no time in comparison
_LOADERS = 4


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Restrict PyTorch to one thread per caller, also in threads started meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a part of the setting is the process's
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Matcher:
    """A pool of threads that load and match patches, until it is closed.

    They match within :meth:`matching`, any number of times: the encoder may use all processors in
    between. As a context, a matcher matches until it is closed at the end.

    A block of candidates is one task. On a CPU, one thread does it from beginning to end. On a
    GPU, all candidates of a query are a block, as far as memory allows: their descriptors stay in
    its memory, matching and scoring are launched together, and while one query is computed the
    next is launched and others are loaded. OpenCV's homographies are fitted on the CPU meanwhile.

    Parameters
    ----------
    config : Config
    device : torch.device
    patches : (callable, callable)
        Of queries and of index images, as of :func:`rerank_candidates`. Those of index images are
        kept from one run to the next; those of a query, until it is done.
    grids : (callable, callable)
    names : (sequence or mapping of int to str, the same), optional
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
        self._precision = choose_precision(config.precision, device)
        self._process = os.getpid()
        loaders = _LOADERS if self.on_cpu else max(_LOADERS, min(16, count_cpus()))
        self._loaders = serial_pool(loaders, "load")
        # On a GPU one launches while the other waits for what it launched before.
        self._matchers = serial_pool(self.threads if self.on_cpu else 2, "match")
        self._verifiers = ThreadPoolExecutor(count_cpus(), "verify")
        self._limit = memory_budget(config.memory_mb, device)
        self._cache = PatchCache(self._load, self._loaders, self._limit // 2)

    def __enter__(self) -> Matcher:
        self._exit.enter_context(self.matching())
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._exit.close()
        finally:
            self.close()

    @contextlib.contextmanager
    def matching(self) -> Iterator[None]:
        """Set PyTorch up for :meth:`run`, for the whole process: each thread computes alone."""
        with one_thread(), arithmetic(self.device, self._precision):
            yield

    @property
    def usable(self) -> bool:
        """Whether its threads are there, as many as PyTorch uses now; they do not survive a fork.

        Only of a matcher that has not been closed.
        """
        as_many = not self.on_cpu or self.threads == torch.get_num_threads()
        return as_many and self._process == os.getpid()

    def close(self, *, wait: bool = True) -> None:
        """Stop the threads and release descriptors; work that has not begun is dropped.

        Parameters
        ----------
        wait : bool, default True
            Until they have ended.
        """
        if self._process == os.getpid():
            for pool in (self._verifiers, self._matchers, self._loaders):
                pool.shutdown(wait, cancel_futures=True)
            self._cache.clear()

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
        """Match queries with their candidates, within :meth:`matching`.

        After an error, or where not all is taken, threads may go on with this run: close the
        matcher then.

        Parameters
        ----------
        todo : sequence of int
            Queries.
        predictions : ndarray [Q, k] of int64, or mapping of int to ndarray [k]
            Candidates of each query.

        Yields
        ------
        (int, ndarray [k, S] of float64)
            A query and the scores of its candidates, in the order of ``todo``.

        Raises
        ------
        FeatureError
            Features do not fit each other or their grids.
        DeviceError
            The device's memory does not suffice for two images.
        """
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
        self._cache.discard((0, q))
        return q, np.concatenate(results).astype(np.float64, copy=False)


def _release(slots: threading.Semaphore, _: object) -> None:
    slots.release()


class PatchCache:
    """A cache of the patch descriptors of recently used images, with a size limit.

    Parameters
    ----------
    load : callable
        Gives the descriptors [n_s, P] of an image, one tensor per patch size.
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
        """Halve the size limit."""
        with self._lock:
            self._limit //= 2
            self._evict()

    def clear(self) -> None:
        """Release all loaded descriptors."""
        with self._lock:
            self._remove(list(self._entries))

    def discard(self, key: tuple[int, int]) -> None:
        """Release the descriptors of an image, if loaded."""
        with self._lock:
            self._remove([key])

    def _evict(self, kept: tuple[int, int] | None = None) -> None:
        """Let go of what was used longest ago, as far as there is too much; but not of ``kept``."""
        surplus, chosen = self._bytes - self._limit, []
        for key in self._entries:
            if surplus <= 0:
                break
            if key != kept and (size := self._size(key)):
                surplus -= size
                chosen.append(key)
        self._remove(chosen)

    def _remove(self, keys: Sequence[tuple[int, int]]) -> None:
        for key in keys:
            if size := self._size(key):
                self._bytes -= size
                del self._entries[key]

    def _size(self, key: tuple[int, int]) -> int:
        """Return the bytes of an image; 0 while it is not loaded."""
        future = self._entries.get(key)
        if future is None or not future.done() or future.cancelled() or future.exception():
            return 0
        return _nbytes(future.result())

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
