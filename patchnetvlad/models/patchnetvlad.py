# SPDX-License-Identifier: MIT
"""Patch-NetVLAD pooling (Hausler et al., CVPR 2021, section 3.2): VLAD over square patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from patchnetvlad.errors import ConfigError
from patchnetvlad.geometry import grid_shape
from patchnetvlad.models.netvlad import NetVLAD, normalise_vlad

CHUNK_BYTES = 32 * 2**20
"""Patch VLAD vectors that are held at a time, bytes of float32."""


class PatchNetVLAD(NetVLAD):
    """Pool a feature map into one VLAD vector, and one for every square patch.

    Parameters
    ----------
    num_clusters, dim, normalize_input, vladv2, use_faiss
        As for :class:`~patchnetvlad.models.netvlad.NetVLAD`.
    patch_sizes : str or sequence of int, default "4"
        Side s of the patches in cells, one value a scale; text is split at commas.
    strides : str or sequence of int, default "1"
        Distance t between patches in cells, one value a scale.

    Attributes
    ----------
    integral : bool, default True
        Take the patches' sums from integral images, in the arithmetic of the research code, which
        repeats its results. Where a cluster hardly occurs in a patch, rounding error is all that
        such a difference leaves of it, and is then normalised to full length. False sums up the
        cells of each patch directly: faster, with less memory, and accurate.
    """

    def __init__(
        self,
        num_clusters: int = 64,
        dim: int = 128,
        normalize_input: bool = True,
        vladv2: bool = False,
        use_faiss: bool = True,
        patch_sizes: str | Sequence[int] = "4",
        strides: str | Sequence[int] = "1",
    ) -> None:
        super().__init__(num_clusters, dim, normalize_input, vladv2, use_faiss)
        self.padding_size = 0
        self.integral = True
        self.patch_sizes = _numbers(patch_sizes)
        self.strides = _numbers(strides)
        if len(self.patch_sizes) != len(self.strides):
            raise ConfigError(
                f"{len(self.patch_sizes)} patch sizes but {len(self.strides)} strides; "
                "give one stride a size"
            )

    def patches(self, x: Tensor, assignment: Tensor) -> Callable[[int, int], Iterator[Tensor]]:
        """Prepare the VLAD vectors of the patches of one image.

        Parameters
        ----------
        x : Tensor [D, h, w]
            Normalised feature map.
        assignment : Tensor [K, h, w]
            Its soft assignments.

        Returns
        -------
        callable
            Takes a patch size and a stride, in cells, and gives the vectors of all patches,
            row-major, in bounded chunks [n, K * D]. It raises ConfigError if the patch is
            larger than the map.
        """
        if not self.integral:
            return partial(self._direct_patches, x, assignment)
        residuals = (x - self.centroids[:, :, None, None]) * assignment[:, None]  # [K, D, h, w]
        return partial(self._integral_patches, get_integral_feature(residuals.flatten(0, 1)[None]))

    def _direct_patches(
        self, x: Tensor, assignment: Tensor, size: int, stride: int
    ) -> Iterator[Tensor]:
        rows, columns = grid_shape(x.shape[1:], size, stride)
        cells = _windows(x, size, stride)  # [rows, columns, D, s * s] without a copy
        weights = _windows(assignment, size, stride)
        step = self._rows_a_chunk(columns, size**2 * self.dim)
        for row in range(0, rows, step):
            yield self.vlad(
                cells[row : row + step].flatten(0, 1).flatten(2),
                weights[row : row + step].flatten(0, 1).flatten(2),
            )

    def _integral_patches(self, integral: Tensor, size: int, stride: int) -> Iterator[Tensor]:
        height, width = integral.shape[-2:]
        rows, columns = grid_shape((height - 1, width - 1), size, stride)
        step = self._rows_a_chunk(columns)
        for row in range(0, rows, step):
            last = min(row + step, rows) - 1
            part = integral[:, :, row * stride : last * stride + size + 1]
            means = get_square_regions_from_integral(part, size, stride)[0]  # [K * D, rows, cols]
            yield normalise_vlad(means.flatten(1).T.unflatten(1, self.centroids.shape))

    def _rows_a_chunk(self, columns: int, extra: int = 0) -> int:
        """Count the rows of patches that a chunk holds, with ``extra`` numbers a patch beside."""
        return max(1, CHUNK_BYTES // (4 * columns * (self.num_clusters * self.dim + extra)))

    def forward(  # type: ignore[override]
        self, x: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Pool a feature map [N, D, h, w].

        Returns
        -------
        local : list of Tensor [N, K * D, n_s]
            One a patch size, patches row-major. For large vocabularies these are large:
            :func:`patchnetvlad.features.extract.describe` whitens them chunk by chunk instead.
        vlad : Tensor [N, K * D]
            Global descriptor.
        """
        x, assignment = self.assign(x)
        vlad = self.vlad(x.flatten(2), assignment.flatten(2))
        local = []
        prepared = [self.patches(x[i], assignment[i]) for i in range(len(x))]
        for size, stride in zip(self.patch_sizes, self.strides, strict=True):
            images = [torch.cat(list(patches(size, stride))).T for patches in prepared]
            local.append(torch.stack(images))  # [N, K * D, n_s]
        return local, vlad


def get_integral_feature(feat_in: Tensor) -> Tensor:
    """Integrate a map over both image axes.

    Parameters
    ----------
    feat_in : Tensor [N, C, h, w]

    Returns
    -------
    Tensor [N, C, h + 1, w + 1]
        Entry (i, j) is the sum over rows before i and columns before j (paper, section 3.5).
    """
    integral = torch.cumsum(torch.cumsum(feat_in, dim=-1), dim=-2)
    return torch.nn.functional.pad(integral, (1, 0, 1, 0))


def get_square_regions_from_integral(
    feat_integral: Tensor, patch_size: int, patch_stride: int
) -> Tensor:
    """Average over square regions, from an integrated map.

    Parameters
    ----------
    feat_integral : Tensor [N, C, h + 1, w + 1]
        As :func:`get_integral_feature` returns it.
    patch_size, patch_stride : int
        In cells.

    Returns
    -------
    Tensor [N, C, rows, columns]
        Mean of each region.
    """
    s, t = patch_size, patch_stride
    height, width = feat_integral.shape[-2] - s, feat_integral.shape[-1] - s
    total = (
        feat_integral[..., :height, :width]
        - feat_integral[..., :height, s:]
        - feat_integral[..., s:, :width]
        + feat_integral[..., s:, s:]
    )
    return total[..., ::t, ::t] / (s * s)


def _windows(x: Tensor, size: int, stride: int) -> Tensor:
    """View [C, h, w] as [rows, columns, C, size, size]."""
    return x.unfold(1, size, stride).unfold(2, size, stride).permute(1, 2, 0, 3, 4)


def _numbers(values: str | Sequence[int]) -> list[int]:
    words = values.split(",") if isinstance(values, str) else values
    return [int(word) for word in words]
