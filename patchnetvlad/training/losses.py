# SPDX-License-Identifier: MIT
"""Losses on global descriptors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from patchnetvlad.errors import ArgumentError


def triplet_loss(
    queries: Tensor, positives: Tensor, negatives: Tensor, counts: Tensor, margin: float
) -> Tensor:
    """Compute the mean of the triplet loss over all pairs of a triplet and its negatives.

    Parameters
    ----------
    queries, positives : Tensor [B, d]
    negatives : Tensor [n, d]
        Of the first triplet, then of the second, and so on.
    counts : Tensor [B] of int64
        Negatives of each triplet; their sum is n.
    margin : float
        Of squared distances; the loss is ``max(0, |q - p| - |q - n| + sqrt(margin))``.

    Returns
    -------
    Tensor []
    """
    anchors, right = (x.repeat_interleave(counts, dim=0) for x in (queries, positives))  # [n, d]
    return F.triplet_margin_loss(anchors, right, negatives, margin=margin**0.5, p=2)


EPSILON, ALPHA, BETA, BASE = 0.1, 1.0, 50.0, 0.0
"""Of the multi-similarity loss and its miner, as place recognition usually sets them."""


def multi_similarity_loss(vectors: Tensor, labels: Tensor) -> Tensor:
    """Compute the multi-similarity loss (Wang et al., CVPR 2019) of the pairs its miner selects.

    Parameters
    ----------
    vectors : Tensor [B, d]
        Compared by their cosine.
    labels : Tensor [B] of int64
        Equal for images of one place.

    Returns
    -------
    Tensor []
        0 where all pairs are well apart.

    Raises
    ------
    ArgumentError
        pytorch-metric-learning is not installed.
    """
    check_metric_learning()
    from pytorch_metric_learning.losses import MultiSimilarityLoss
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    pairs = MultiSimilarityMiner(epsilon=EPSILON)(vectors, labels)
    loss: Tensor = MultiSimilarityLoss(alpha=ALPHA, beta=BETA, base=BASE)(vectors, labels, pairs)
    return loss


def check_metric_learning() -> None:
    """Raise ArgumentError if the library of multi-similarity loss is not installed."""
    try:
        import pytorch_metric_learning  # noqa: F401
    except ImportError:
        raise ArgumentError(
            "loss = multisimilarity needs pytorch-metric-learning: pip install "
            "'patchnetvlad[train]'; or set loss = triplet"
        ) from None
