# SPDX-License-Identifier: MIT
"""Patch-NetVLAD pooling (Hausler et al., CVPR 2021, section 3.2): VLAD over square patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from patchnetvlad.base.device import run_parallel
from patchnetvlad.errors import ConfigError
from patchnetvlad.models.grid import grid_shape
from patchnetvlad.models.int8 import add_int8_product
from patchnetvlad.models.netvlad import EPSILON, NetVLAD, normalise_vlad


class PatchNetVLAD(NetVLAD):
    """Pool a feature map into one VLAD vector for the image and one for every square patch.

    Parameters
    ----------
    num_clusters, dim, normalize_input, vladv2, use_faiss
        As for :class:`~patchnetvlad.models.netvlad.NetVLAD`.
    patch_sizes : str or sequence of int, default "4"
        Side s of the patches in cells, one value per size; a string is split at commas.
    strides : str or sequence of int, default "1"
        Distance t between patches in cells, one value per size.

    Attributes
    ----------
    integral : bool, default True
        Take the patches' sums from integral images, in the arithmetic of the research code, which
        repeats its results. Where a cluster hardly occurs in a patch, rounding error is all that
        such a difference leaves of it, and is then normalised to full length. False adds up the
        cells of each patch: as fast, and accurate.
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
                "give one stride per size"
            )

    @torch.no_grad()
    def whitened(
        self,
        x: Tensor,
        assignment: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        scales: Tensor | None = None,
        *,
        block_bytes: int = 32 * 2**20,
    ) -> list[Tensor]:
        """Compute the patch descriptors of one image, in bounded memory.

        The vectors of all patches, [n, K * D], are never held: a block of clusters at a time is
        summed up, normalised, and multiplied with its part of the whitening matrix. Only the
        length of the whole vector is not known until the last block, so it is divided by then.

        Parameters
        ----------
        x : Tensor [D, h, w]
            Normalised feature map.
        assignment : Tensor [K, h, w]
            Its soft assignments.
        weight : Tensor [P, K * D], optional
            Whitening matrix; without it, the vectors themselves are returned, and P is K * D. With
            one of float16 or int8, vectors are rounded so, too; sums are of float32, or exact.
        bias : Tensor [P], optional
        scales : Tensor [P], optional
            By which the rows of a matrix of int8 are to be multiplied.
        block_bytes : int, default 32 MiB
            What a block of vectors may take.

        Returns
        -------
        list of Tensor [n_s, P] of float32
            L2-normalised, one per patch size, patches row-major.

        Raises
        ------
        ConfigError
            A patch size is larger than the map.
        """
        grids = [
            grid_shape(x.shape[1:], size, stride)
            for size, stride in zip(self.patch_sizes, self.strides, strict=True)
        ]
        counts = [rows * columns for rows, columns in grids]
        num_clusters, dim, n = self.num_clusters, self.dim, sum(counts)
        step = max(1, min(num_clusters, block_bytes // (4 * dim * n)))
        block = x.new_empty((step, dim, n))
        square_norm = x.new_zeros(n)
        described = x.new_zeros((n, len(weight) if weight is not None else num_clusters * dim))
        for first in range(0, num_clusters, step):
            last = min(first + step, num_clusters)
            some = block[: last - first]
            square_norm += self._fill(some, x, assignment, first, grids)
            vectors = some.flatten(0, 1).T  # [n, clusters * D]
            columns = slice(first * dim, last * dim)
            if weight is None:
                described[:, columns] = vectors
            else:
                _add_product(described, vectors, weight[:, columns].T)
        if scales is not None:
            described *= scales
        described /= square_norm.sqrt().clamp_min(EPSILON)[:, None]
        if bias is not None:
            described += bias
        if weight is not None:
            norms = torch.linalg.vector_norm(described, dim=1, keepdim=True)
            described /= norms.clamp_min(EPSILON)  # in place: this is large
        return list(described.split(counts))

    def _fill(
        self,
        block: Tensor,
        x: Tensor,
        assignment: Tensor,
        first: int,
        grids: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Compute vectors [c, D, n] of clusters from the ``first`` on; return their square norms.

        Each is normalised within its cluster, so these are shares [n] of the whole's.
        """
        centroids = self.centroids[first : first + len(block), :, None, None]
        weights = assignment[first : first + len(block), None]
        counts = [rows * columns for rows, columns in grids]
        areas = torch.cat(
            [x.new_full((c,), s * s) for c, s in zip(counts, self.patch_sizes, strict=True)]
        )
        shares = x.new_empty((len(block), len(areas)))

        def fill(part: slice) -> None:
            with torch.inference_mode():  # which holds for one thread alone
                residuals = x - centroids[part]  # [c, D, h, w]
                residuals *= weights[part]
                views = [
                    view.unflatten(-1, grid)  # [c, D, rows, columns]
                    for view, grid in zip(block[part].split(counts, -1), grids, strict=True)
                ]
                sum_up = _integral_sums if self.integral else _direct_sums
                sum_up(residuals, self.patch_sizes, self.strides, views)
                # Sums, not means: that only matters where a norm is too small to divide by.
                norms = torch.linalg.vector_norm(block[part], dim=1)  # [c, n]
                scales = 1 / torch.maximum(norms, EPSILON * areas)
                block[part] *= scales[:, None]
                shares[part] = (norms * scales) ** 2

        if x.device.type == "cpu":  # one cluster at a time stays in the cache
            run_parallel(lambda k: fill(slice(k, k + 1)), len(block))
        else:
            fill(slice(None))
        return shares.sum(dim=0)

    def forward(  # type: ignore[override]
        self, x: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Pool a feature map [N, D, h, w].

        Returns
        -------
        local : list of Tensor [N, K * D, n_s]
            One per patch size, patches row-major. These are large: extraction uses
            :meth:`whitened`, which never holds them.
        vlad : Tensor [N, K * D]
            Global descriptor.
        """
        x, assignment = self.assign(x)
        vlad = self.vlad(x.flatten(2), assignment.flatten(2))
        residuals = (x[:, None] - self.centroids[:, :, None, None]) * assignment[:, :, None]
        residuals = residuals.flatten(1, 2)  # [N, K * D, h, w]
        local = []
        for size, stride in zip(self.patch_sizes, self.strides, strict=True):
            rows, columns = grid_shape(x.shape[2:], size, stride)
            if self.integral:
                integral = get_integral_feature(residuals)
                means = get_square_regions_from_integral(integral, size, stride)
            else:
                means = F.avg_pool2d(residuals, size, stride)
            vectors = means.flatten(2).transpose(1, 2)  # [N, n_s, K * D]
            shape = (-1, self.num_clusters, self.dim)
            vectors = normalise_vlad(vectors.reshape(shape)).view(x.shape[0], rows * columns, -1)
            local.append(vectors.transpose(1, 2))  # [N, K * D, n_s]
        return local, vlad


def _add_product(total: Tensor, vectors: Tensor, weight: Tensor) -> None:
    """Add the product of [n, d] and [d, P] to [n, P] of float32; ``weight`` may be rounded."""
    if weight.dtype == total.dtype:
        total.addmm_(vectors, weight)
    elif weight.dtype == torch.int8:
        add_int8_product(total, vectors, weight)
    elif total.device.type == "cuda" and torch.__version__ >= "2.8":
        total += torch.mm(vectors.to(weight.dtype), weight, out_dtype=total.dtype)
    else:
        total += torch.mm(vectors.to(weight.dtype), weight)


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
    return _corner_sums(feat_integral, patch_size, patch_stride) / patch_size**2


def _corner_sums(integral: Tensor, size: int, stride: int, out: Tensor | None = None) -> Tensor:
    """Sum over squares [..., rows, columns] from an integrated map [..., h + 1, w + 1]."""
    above, below = integral[..., :-size:stride, :], integral[..., size::stride, :]
    left, right = slice(None, -size, stride), slice(size, None, stride)
    sums = torch.sub(above[..., left], above[..., right], out=out)
    sums -= below[..., left]
    sums += below[..., right]
    return sums


def _integral_sums(
    x: Tensor, sizes: Sequence[int], strides: Sequence[int], out: Sequence[Tensor]
) -> None:
    """Sum a map [c, D, h, w] over squares by differences of its integral."""
    integral = get_integral_feature(x)
    for size, stride, sums in zip(sizes, strides, out, strict=True):
        _corner_sums(integral, size, stride, sums)


def _direct_sums(
    x: Tensor, sizes: Sequence[int], strides: Sequence[int], out: Sequence[Tensor]
) -> None:
    """Sum a map [c, D, h, w] over squares by adding alone, so that nothing cancels out.

    A window of 2 n cells is the sum of two of n, so few additions are needed, and most of them
    serve several sizes.
    """
    rows_of: dict[int, Tensor] = {1: x}
    for size, stride, sums in zip(sizes, strides, out, strict=True):
        in_rows = _window_sums(rows_of, size, -1)[..., ::stride]
        sums.copy_(_window_sums({1: in_rows}, size, -2)[..., ::stride, :])


def _window_sums(known: dict[int, Tensor], size: int, dim: int) -> Tensor:
    """Sum over windows of ``size`` along one axis; ``known`` holds those of other sizes."""
    if size not in known:
        half = 1 << ((size - 1).bit_length() - 1)  # the largest power of two below size
        first, second = (_window_sums(known, part, dim) for part in (half, size - half))
        count = known[1].shape[dim] - size + 1
        known[size] = first.narrow(dim, 0, count) + second.narrow(dim, half, count)
    return known[size]


def _numbers(values: str | Sequence[int]) -> list[int]:
    words = values.split(",") if isinstance(values, str) else values
    return [int(word) for word in words]
