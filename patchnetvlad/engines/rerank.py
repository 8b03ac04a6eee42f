# SPDX-License-Identifier: MIT
"""Re-ranking: the candidates of every query, put in order by their patches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from patchnetvlad.config import Config
from patchnetvlad.engines.engine import GridReader, PatchReader, Run
from patchnetvlad.engines.journal import Journal
from patchnetvlad.engines.local_rerank import Matcher
from patchnetvlad.engines.visiting import visiting_order
from patchnetvlad.matching.fusion import fuse_scores, rank


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
    fused : ndarray [Q, k] of float64
        The fused score that orders each candidate, likewise; lower is better.
    seconds : float
        That a query took; 0 if all had been re-ranked before.
    """

    predictions: NDArray[np.int64]
    scores: NDArray[np.float64]
    fused: NDArray[np.float64]
    seconds: float = 0.0


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
        Return the patch descriptors of image ``i``: tensors or arrays [n_s, P], one per patch size.
        They are called from several threads.
    query_grids, index_grids : callable
        Return the patch grids of image ``i``, one per patch size.
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
    wanted: NDArray[np.bool_] | None = None,
) -> Reranking:
    """Order candidates by scores that are computed elsewhere.

    Parameters
    ----------
    predictions : ndarray [Q, k] of int64
    config : Config
    run : callable
        Is given queries, in the order in which candidates are shared best, and the predictions;
        gives queries and the scores [k, S] of each, in any order.
    journal, progress
        As for :func:`rerank_candidates`.
    wanted : ndarray [Q] of bool, optional
        Queries that are re-ranked; by default all. The candidates of the others stay in their
        order, and their scores are 0.

    Returns
    -------
    Reranking
    """
    num_queries, num_candidates = predictions.shape
    scores = np.zeros((num_queries, num_candidates, len(config.patch_sizes)))
    chosen = np.ones(num_queries, dtype=bool) if wanted is None else wanted
    finished = journal.scores if journal is not None else {}
    for q, values in finished.items():
        if chosen[q]:
            scores[q] = values
    order = [q for q in visiting_order(predictions).tolist() if chosen[q]]
    todo = [q for q in order if q not in finished]
    start = time.perf_counter()
    with tqdm(
        total=len(order),
        initial=len(order) - len(todo),
        desc="Re-ranking",
        unit="query",
        disable=not progress,
    ) as bar:
        for q, values in run(todo, predictions):
            scores[q] = values
            if journal is not None:
                journal.add(q, values)
            bar.update()
    seconds = (time.perf_counter() - start) / len(todo) if todo else 0.0
    fused = np.zeros(predictions.shape)
    ranked = np.empty(predictions.shape, dtype=np.int64)
    for q, values in enumerate(scores):
        fused[q] = fuse_scores(values, config.patch_weights)
        ranked[q] = rank(predictions[q], fused[q])
    return Reranking(ranked, scores, fused, seconds)
