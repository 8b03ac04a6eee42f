# SPDX-License-Identifier: MIT
"""Search as benchmarks prescribe: within groups, and by the best cut-out of a panorama."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.search.retrieve import FLAT, IndexSpec, retrieve_by

if TYPE_CHECKING:
    from patchnetvlad.search.rows import Rows

logger = logging.getLogger(__name__)

CUTOUTS = 12
"""Perspective cut-outs of one Tokyo 24/7 panorama, which follow each other in its list."""


class SearchRules(Protocol):
    """Search rules, such as those of a :class:`~patchnetvlad.datasets.benchmarks.Benchmark`."""

    @property
    def cutouts(self) -> int:
        """Index images per panorama, of which only the best counts."""

    @property
    def group_folder(self) -> str | None:
        """Whether there are groups, each searched separately: None if not."""

    def groups(
        self, query_names: Sequence[str], index_names: Sequence[str]
    ) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Return the rows of queries [q] and of index images [n] of each group."""


def retrieve_for_benchmark(
    benchmark: SearchRules,
    queries: NDArray[np.float32],
    index: NDArray[np.float32] | Rows,
    query_names: Sequence[str],
    index_names: Sequence[str],
    top_k: int,
    *,
    spec: IndexSpec = FLAT,
    search: Callable[..., NDArray[np.int64]] = retrieve_by,
) -> NDArray[np.int64]:
    """Find the nearest index images of each query, by the rules of a benchmark.

    Parameters
    ----------
    benchmark : Benchmark
    queries : ndarray [Q, P] of float
        Global descriptors.
    index : ndarray [N, P] of float
    query_names, index_names : sequence of str
        Q and N names, as in the lists.
    top_k : int
        Candidates per query.
    spec : IndexSpec, optional
        The index; by default exact search.
    search : callable
        ``search(queries, index, k, spec)``, such as that of an
        :class:`~patchnetvlad.engines.engine.Engine`.

    Returns
    -------
    ndarray [Q, k] of int64
        Rows of ``index``, nearest first. k is ``top_k``, or less if the smallest group, or the
        number of panoramas, does not allow as many.

    Raises
    ------
    PatchNetVLADError
        As for :meth:`~patchnetvlad.datasets.benchmarks.Benchmark.groups` and
        :func:`~patchnetvlad.search.retrieve.retrieve`.
    """
    wanted = top_k * benchmark.cutouts
    if benchmark.group_folder is None:
        found = search(queries, index, wanted, spec)
    else:
        groups = benchmark.groups(query_names, index_names)
        found = retrieve_in_groups(queries, index, wanted, groups, spec=spec, search=search)
    return keep_best_cutout(found, top_k) if benchmark.cutouts > 1 else found


def retrieve_in_groups(
    queries: NDArray[np.float32],
    index: NDArray[np.float32] | Rows,
    top_k: int,
    groups: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    *,
    spec: IndexSpec = FLAT,
    search: Callable[..., NDArray[np.int64]] = retrieve_by,
) -> NDArray[np.int64]:
    """Find the nearest index images of each query within its own group, such as its city.

    Parameters
    ----------
    queries : ndarray [Q, P] of float
        Global descriptors.
    index : ndarray [N, P] of float
    top_k : int
        Candidates per query, from 1; clamped to the size of the smallest group.
    groups : sequence of (ndarray [q] of int, ndarray [n] of int)
        Rows of ``queries`` and of ``index`` that belong together; each query in one group.
    spec : IndexSpec, optional
        The index; by default exact search. Where its ``index_path`` is given and there are several
        groups, each has a file of its own, whose name ends in the number of the group, from 0.
    search : callable
        ``search(queries, index, k, spec)`` searches each group, such as that of an
        :class:`~patchnetvlad.engines.engine.Engine`; may find less than k.

    Returns
    -------
    ndarray [Q, k] of int64
        Rows of the whole ``index``, nearest first.

    Raises
    ------
    ValueError
        A query is in no group or in several, or a group has no index images.
    PatchNetVLADError
        As for :func:`~patchnetvlad.search.retrieve.retrieve`.

    Examples
    --------
    The nearest image of the other city is not looked at:

    >>> queries = np.array([[1.0, 0.0]], np.float32)
    >>> index = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], np.float32)
    >>> groups = [(np.array([0]), np.array([1, 2]))]
    >>> retrieve_in_groups(queries, index, top_k=1, groups=groups).tolist()
    [[2]]
    """
    members = np.concatenate([rows for rows, _ in groups]) if groups else np.empty(0, np.int64)
    if not np.array_equal(np.sort(members), np.arange(len(queries))):
        raise ValueError("each query must be in exactly one group")
    if any(len(rows) == 0 for _, rows in groups):
        raise ValueError("each group must have index images")
    k = min([top_k, *(len(rows) for _, rows in groups)])
    if k < top_k:
        logger.info("only %d candidates per query: the smallest group has no more images", k)
    parts = []
    for number, (query_rows, index_rows) in enumerate(groups):
        of_group = spec
        if spec.index_path is not None and len(groups) > 1:
            path = Path(spec.index_path)
            of_group = replace(spec, index_path=path.with_name(f"{path.name}.{number}"))
        inside = search(queries[query_rows], index[index_rows], k, of_group)
        parts.append(index_rows[inside])
    k = min([k, *(part.shape[1] for part in parts)])  # some images have no features
    found = np.empty((len(queries), k), np.int64)
    for (query_rows, _), part in zip(groups, parts, strict=True):
        found[query_rows] = part[:, :k]
    return found


def keep_best_cutout(predictions: NDArray[np.int64], top_k: int) -> NDArray[np.int64]:
    """Keep the best-ranked cut-out of each panorama (the rule of Tokyo 24/7).

    Parameters
    ----------
    predictions : ndarray [Q, k] of int
        Candidates, best first; images 12 p to 12 p + 11 are cut from panorama p.
    top_k : int
        Candidates to keep per query.

    Returns
    -------
    ndarray [Q, m] of int64
        m is the smaller of top_k and the number of panoramas. 12 * top_k candidates per query,
        or all of a short index, always hold that many.
    """
    kept = []
    for row in predictions:
        _, first = np.unique(row // CUTOUTS, return_index=True)
        kept.append(row[np.sort(first)][:top_k])
    return np.array(kept, dtype=np.int64)
