# SPDX-License-Identifier: MIT
"""Exact search in PyTorch on any device, for GPUs without the GPU version of FAISS."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.base.device import arithmetic, upload

BLOCK_BYTES = 512 * 2**20
"""Bytes of reference descriptors, and of distances, on the device at a time."""

_MARGIN = 32  # kept beyond k until distances are computed without cancellation


@torch.inference_mode()
def nearest_rows(
    queries: NDArray[np.float32], index: NDArray[np.float32], k: int, device: torch.device
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find the rows of an index that are nearest to each query, by Euclidean distance.

    Candidates are found by products in float32 (paper of FAISS, section 3), a few more than k, and
    are then ordered by distances in float64; rows at equal distances keep their order.

    Parameters
    ----------
    queries : ndarray [Q, P] of float32
    index : ndarray [N, P] of float32
        Stays in main memory; a block of :data:`BLOCK_BYTES` at a time is copied to the device.
    k : int
        From 1; clamped to N.
    device : torch.device

    Returns
    -------
    distances : ndarray [Q, min(k, N)] of float32
        Squared, nearest first.
    rows : ndarray [Q, min(k, N)] of int64
        -1 where a distance is not finite.
    """
    k = min(k, len(index))
    kept = min(k + _MARGIN, len(index))
    rows_per_block = max(1, BLOCK_BYTES // (4 * index.shape[1]))
    with arithmetic(device, "exact"):
        asked = upload(queries, device)
        best = torch.empty((len(queries), 0), dtype=torch.int64, device=device)
        for start in range(0, len(index), rows_per_block):
            block = upload(index[start : start + rows_per_block], device)
            best = _nearer(best, asked, block, start, kept)
    return _in_order(queries, index, (best & _ROW).cpu().numpy(), k)


def _nearer(best: Tensor, queries: Tensor, block: Tensor, start: int, kept: int) -> Tensor:
    """Merge the keys [Q, m] of the best rows so far with those of a block [n, P] of the index."""
    norms = block.square().sum(dim=1)
    step = max(1, BLOCK_BYTES // (16 * len(block)))
    merged = []
    for known, part in zip(best.split(step), queries.split(step), strict=True):
        # Less |q|^2, which is the same for all rows.
        distances = torch.addmm(norms, part, block.T, alpha=-2)  # [q, n]
        keys = torch.cat([known, _keys(distances, start)], dim=1)
        merged.append(keys.topk(min(kept, keys.shape[1]), dim=1, largest=False).values)
    return torch.cat(merged)


_ROW = 2**32 - 1


def _keys(distances: Tensor, start: int) -> Tensor:
    """Pack distances and rows into integers that sort by distance, then by row."""
    bits = (distances + 0.0).view(torch.int32)  # -0 becomes 0
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    bits = torch.where(distances.isnan(), torch.iinfo(torch.int32).max, bits)
    rows = torch.arange(start, start + distances.shape[1], device=distances.device)
    return (bits << 32) | rows


def _in_order(
    queries: NDArray[np.float32], index: NDArray[np.float32], rows: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Order candidates [Q, m] by their distances in float64, and keep k."""
    distances = np.empty((len(queries), k), np.float32)
    found = np.empty((len(queries), k), np.int64)
    for q, (query, candidates) in enumerate(zip(queries, rows, strict=True)):
        with np.errstate(invalid="ignore", over="ignore"):
            square = ((index[candidates].astype(np.float64) - query) ** 2).sum(axis=1)
            order = np.lexsort((candidates, square))[:k]  # NaN last
            distances[q] = square[order]
        found[q] = np.where(np.isfinite(distances[q]), candidates[order], -1)
    return distances, found
