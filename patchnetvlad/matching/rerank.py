# SPDX-License-Identifier: MIT
"""Re-ranking: the candidates of every query, put in order by their patches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from patchnetvlad.config import Config
from patchnetvlad.errors import FeatureError
from patchnetvlad.geometry import PatchGrid
from patchnetvlad.matching.fusion import fuse_scores, rank
from patchnetvlad.matching.pair import match_pair

PatchReader = Callable[[int], Sequence[NDArray[np.float32]]]
GridReader = Callable[[int], Sequence[PatchGrid]]


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


def rerank(
    predictions: NDArray[np.int64],
    query_patches: PatchReader,
    index_patches: PatchReader,
    query_grids: GridReader,
    index_grids: GridReader,
    config: Config,
    *,
    names: tuple[Sequence[str], Sequence[str]] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Reranking:
    """Order the candidates of every query by their patches (paper, sections 3.3 to 3.5).

    Parameters
    ----------
    predictions : ndarray [Q, k] of int64
        Candidates from retrieval.
    query_patches, index_patches : callable
        Give the patch descriptors of image ``i``: arrays [n_s, P], one a patch size.
    query_grids, index_grids : callable
        Give the patch grids of image ``i``, one a patch size.
    config : Config
        Its ``matcher`` and ``patch_weights`` are used.
    names : (sequence of str, sequence of str), optional
        Names of the queries and of the index images, for messages.
    device : torch.device or str, default "cpu"
        Where nearest neighbours are computed.
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
    num_queries, num_candidates = predictions.shape
    scores = np.zeros((num_queries, num_candidates, len(config.patch_sizes)))
    ranked = np.empty_like(predictions)

    def name(part: int, i: int) -> str:
        return f"{('query', 'index image')[part]} {names[part][i] if names else i}"

    def load(part: int, i: int) -> tuple[list[Tensor], Sequence[PatchGrid]]:
        described = (query_patches, index_patches)[part](i)
        laid = (query_grids, index_grids)[part](i)
        for values, grid in zip(described, laid, strict=True):
            if len(values) != len(grid):
                raise FeatureError(
                    f"{name(part, i)} has {len(values)} patches of size {grid.patch_size}; an "
                    f"image of the configured size has {len(grid)}. Check imageresizeh, "
                    f"imageresizew and strides in {config.source}"
                )
        return [torch.from_numpy(np.ascontiguousarray(v)).to(device) for v in described], laid

    # Reading, OpenCV and PyTorch all leave the interpreter to other threads meanwhile.
    with (
        ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool,
        tqdm(total=num_queries, desc="Re-ranking", unit="query", disable=not progress) as bar,
    ):
        for q in range(num_queries):
            query, query_grid = load(0, q)

            def score(
                c: int,
                query: list[Tensor] = query,
                query_grid: Sequence[PatchGrid] = query_grid,
            ) -> list[float]:
                candidate, candidate_grid = load(1, c)
                for ours, theirs in zip(query, candidate, strict=True):
                    if ours.shape[1] != theirs.shape[1]:
                        raise FeatureError(
                            f"the query's patch descriptors have {ours.shape[1]} dimensions, those "
                            f"of {name(1, c)} {theirs.shape[1]}; extract both with one "
                            "configuration"
                        )
                matches = match_pair(query, candidate, query_grid, candidate_grid, config.matcher)
                return [match.score for match in matches]

            scores[q] = list(pool.map(score, predictions[q].tolist()))
            ranked[q] = rank(predictions[q], fuse_scores(scores[q], config.patch_weights))
            bar.update()
    return Reranking(ranked, scores)
