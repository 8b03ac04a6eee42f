# SPDX-License-Identifier: MIT
"""What a run returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.evaluation.metrics import Metrics


@dataclass(frozen=True, eq=False)
class RerankResult:
    """What matching a data set gave.

    Attributes
    ----------
    query_names, index_names : tuple of str
        Names of Q and N images, as in the lists.
    retrieved : ndarray [Q, k] of int64
        Candidates by global descriptor (NetVLAD), best first: rows of the index list.
    reranked : ndarray [Q, k] of int64 or None
        The same by patches (Patch-NetVLAD); None for configurations without patches.
    patch_scores : ndarray [Q, k, S] of float64 or None
        Score at each patch size of each candidate in ``retrieved``; lower is better.
    n_values : tuple of int
    recalls : dict of str to ndarray [len(n_values)]
        Recall@N of ``"NetVLAD"`` and ``"PatchNetVLAD"``; empty without ground truth.
    num_without_positives : int
        Queries that have no right answer in the index; 0 without ground truth.
    scores : dict of str to ndarray [Q, k] of float64
        How similar the candidates in ``retrieved`` ("NetVLAD": minus the distance of global
        descriptors) and ``reranked`` ("PatchNetVLAD": minus the weighted sum of patch scores) are,
        comparable between queries; larger is more similar. Without "NetVLAD" where the candidates
        are another method's.
    metrics : dict of str to Metrics
        All metrics of both; empty without ground truth.
    citation : str
        One line that says how the numbers came about; empty without a protocol.
    """

    query_names: tuple[str, ...]
    index_names: tuple[str, ...]
    retrieved: NDArray[np.int64]
    reranked: NDArray[np.int64] | None
    patch_scores: NDArray[np.float64] | None
    n_values: tuple[int, ...]
    recalls: dict[str, NDArray[np.float64]]
    num_without_positives: int
    scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    metrics: dict[str, Metrics] = field(default_factory=dict)
    citation: str = ""
