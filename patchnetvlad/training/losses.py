# SPDX-License-Identifier: MIT
"""Losses on global descriptors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
