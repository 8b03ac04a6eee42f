# SPDX-License-Identifier: MIT
"""NetVLAD pooling (Arandjelovic et al., CVPR 2016): soft assignment and residuals."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

EPSILON = 1e-12
"""Shorter vectors are divided by this instead of their length, as in ``F.normalize``."""


class NetVLAD(nn.Module):
    """Pool a feature map into one VLAD vector.

    Parameters
    ----------
    num_clusters : int, default 64
        Clusters K of the vocabulary.
    dim : int, default 128
        Channels D of the feature map.
    normalize_input : bool, default True
        L2-normalise each cell over its channels first.
    vladv2 : bool, default False
        Give the assignment layer a bias, as in the NetVLAD paper; False is the variant of the
        released checkpoints.
    use_faiss : bool, default True
        Accepted for compatibility; :meth:`init_params` needs no nearest-neighbour library.

    Attributes
    ----------
    conv : nn.Conv2d
        Assignment layer, weight [K, D, 1, 1], bias [K] if ``vladv2``.
    centroids : nn.Parameter
        [K, D].
    alpha : float
        Sharpness of the assignment that :meth:`init_params` chose; 0 before.
    """

    def __init__(
        self,
        num_clusters: int = 64,
        dim: int = 128,
        normalize_input: bool = True,
        vladv2: bool = False,
        use_faiss: bool = True,
    ) -> None:
        super().__init__()
        self.num_clusters = num_clusters
        self.dim = dim
        self.alpha = 0.0
        self.vladv2 = vladv2
        self.normalize_input = normalize_input
        self.use_faiss = use_faiss
        self.conv = nn.Conv2d(dim, num_clusters, kernel_size=1, bias=vladv2)
        self.centroids = nn.Parameter(torch.rand(num_clusters, dim))

    def init_params(self, clsts: NDArray[np.floating], traindescs: NDArray[np.floating]) -> None:
        """Set the vocabulary from clusters, with a sharpness fitted to descriptors.

        The sharpness is chosen so that, on average over the descriptors, the second-best
        cluster gets 1 % of the weight of the best. Without ``vladv2`` the assignment compares
        by dot product with the normalised clusters. With it, the assignment is
        ``softmax_k(-alpha |x - c_k|^2)``, written as a linear layer with weight
        ``2 alpha c_k`` and bias ``-alpha |c_k|^2`` (NetVLAD paper, equations 2 and 3).

        Parameters
        ----------
        clsts : ndarray [K, D]
            Cluster centres.
        traindescs : ndarray [M, D]
            Descriptors that the clusters were fitted to, or a sample of them.

        Raises
        ------
        ValueError
            The shapes do not fit the layer, or there are fewer than two clusters.
        """
        clusters = np.asarray(clsts, dtype=np.float32)
        descriptors = np.asarray(traindescs, dtype=np.float32)
        if clusters.shape != (self.num_clusters, self.dim) or self.num_clusters < 2:
            raise ValueError(
                f"clsts has shape {clusters.shape}; needed is [{self.num_clusters}, {self.dim}] "
                "with at least two clusters"
            )
        if descriptors.ndim != 2 or descriptors.shape[1] != self.dim or len(descriptors) == 0:
            raise ValueError(
                f"traindescs has shape {descriptors.shape}; needed is [M, {self.dim}], M >= 1"
            )
        if self.vladv2:
            square_norms = (clusters**2).sum(axis=1)  # [K]
            # -|x - c|^2 less the term |x|^2, which is the same for all clusters.
            affinity = 2 * descriptors @ clusters.T - square_norms  # [M, K]
            direction = 2 * clusters
        else:
            direction = clusters / np.linalg.norm(clusters, axis=1, keepdims=True)
            affinity = descriptors @ direction.T
        best = np.partition(affinity, -2, axis=1)[:, -2:]  # [M, 2]: second, first
        self.alpha = float(-np.log(0.01) / np.mean(best[:, 1] - best[:, 0]))
        with torch.no_grad():
            self.centroids.copy_(torch.from_numpy(clusters))
            self.conv.weight.copy_(torch.from_numpy(self.alpha * direction)[:, :, None, None])
            if self.conv.bias is not None:
                self.conv.bias.copy_(torch.from_numpy(-self.alpha * square_norms))

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise the cells and assign each softly to the clusters.

        Parameters
        ----------
        x : Tensor [N, D, h, w]
            Feature map.

        Returns
        -------
        x : Tensor [N, D, h, w]
            L2-normalised over D, if ``normalize_input``.
        assignment : Tensor [N, K, h, w]
            Sums to 1 over K.
        """
        if self.normalize_input:
            x = F.normalize(x, dim=1)
        return x, F.softmax(self.conv(x), dim=1)

    def vlad(self, x: Tensor, assignment: Tensor) -> Tensor:
        """Aggregate cells into normalised VLAD vectors.

        The sum of the residuals ``a_k (x - c_k)`` is computed as one product of assignments
        and cells, less ``(sum a_k) c_k``, so that no residual is ever stored.

        Parameters
        ----------
        x : Tensor [B, D, cells]
            Normalised cells.
        assignment : Tensor [B, K, cells]
            Soft assignments.

        Returns
        -------
        Tensor [B, K * D]
            L2-normalised within each cluster, then as a whole.
        """
        residuals = torch.bmm(assignment, x.transpose(1, 2))  # [B, K, D]
        residuals -= assignment.sum(dim=2, keepdim=True) * self.centroids
        return normalise_vlad(residuals)

    def forward(self, x: Tensor) -> Tensor:
        """Pool a feature map [N, D, h, w] into global VLAD vectors [N, K * D]."""
        x, assignment = self.assign(x)
        return self.vlad(x.flatten(2), assignment.flatten(2))


def normalise_vlad(residuals: Tensor) -> Tensor:
    """Normalise VLAD vectors within each cluster, then as a whole (NetVLAD paper, section 3.1).

    Parameters
    ----------
    residuals : Tensor [B, K, D]

    Returns
    -------
    Tensor [B, K * D]
    """
    # Both at once: this is bound by memory, and the vectors are long.
    norms = torch.linalg.vector_norm(residuals, dim=2)  # [B, K]
    scales = 1 / norms.clamp_min(EPSILON)
    total = torch.linalg.vector_norm(norms * scales, dim=1, keepdim=True)  # [B, 1]
    scales = scales / total.clamp_min(EPSILON)
    return (residuals * scales[:, :, None]).flatten(1)
