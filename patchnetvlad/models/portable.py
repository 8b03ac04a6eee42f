# SPDX-License-Identifier: MIT
"""The network and the matcher in operations that ONNX and ``torch.export`` know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchnetvlad.config import Config
from patchnetvlad.models.grid import PatchGrid
from patchnetvlad.models.model import get_pca_encoding


class PortableNetwork(nn.Module):
    """From images to global descriptors, patch descriptors and key points.

    Parameters
    ----------
    network : nn.Module
        With the children ``encoder``, ``pool`` and, optionally, ``WPCA``. Its patches must be
        summed up directly (``patch_vlad = direct``): differences of integral images depend on the
        order in which a runtime adds.
    config : Config
        Whose patch sizes and strides are those of ``network``.
    mean, std : sequence of 3 float, optional
        Take images [N, H, W, 3] of uint8, RGB, and normalise them with these; without them,
        images are normalised ones.
    size : (int, int), optional
        (height, width) in px that images of uint8 are resized to, as in extraction.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.size = size
        self.from_uint8 = mean is not None and std is not None
        self.grids = _first_patches(config) if config.uses_patches else []
        for name, values in (("mean", mean or (0.0,) * 3), ("std", std or (1.0,) * 3)):
            scale = torch.tensor(values, device="cpu")[:, None, None]
            self.register_buffer(name, scale, persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Describe images.

        Parameters
        ----------
        image : Tensor [N, 3, H, W] of float32, or [N, H, W, 3] of uint8

        Returns
        -------
        descriptor : Tensor [N, P] of float32
        *patches : Tensor [N, n_s, P] of float32
            One per patch size, row-major; L2-normalised, as ``descriptor``.
        *keypoints : Tensor [n_s, 2] of int64
            Centres (x, y) in px of the image, resized if it is; likewise.
        """
        if self.from_uint8:
            image = image.permute(0, 3, 1, 2)
            if self.size is not None:
                image = F.interpolate(image, self.size, mode="bilinear", antialias=True)
            image = (image.float() / 255 - self.mean) / self.std
        maps = self.network.get_submodule("encoder")(image)
        pooled: Any = self.network.get_submodule("pool")(maps)
        if not self.grids:
            return (self._whitened(pooled),)
        local, vlad = pooled
        patches = []
        for vectors in local:  # [N, K * D, n_s]
            count, dim, n = vectors.shape
            flat = vectors.transpose(1, 2).reshape(count * n, dim)
            patches.append(self._whitened(flat).reshape(count, n, -1))
        keypoints = [_keypoints(maps, grid) for grid in self.grids]
        return (self._whitened(vlad), *patches, *keypoints)

    def _whitened(self, vectors: Tensor) -> Tensor:
        return get_pca_encoding(self.network, vectors) if hasattr(self.network, "WPCA") else vectors


class PortableMatcher(nn.Module):
    """Mutual nearest neighbours and rapid spatial scoring (paper, section 3.4) of two images.

    Parameters
    ----------
    config : Config
        Of which patch sizes, strides and weights are used.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weights = tuple(config.patch_weights)
        self.steps = [grid.step for grid in _first_patches(config)]

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        """Match two images.

        Parameters
        ----------
        *features : Tensor
            For each patch size: descriptors [n, P] and key points [n, 2] of the query, then those
            [m, P] and [m, 2] of the candidate, as :class:`PortableNetwork` returns them for one
            image.

        Returns
        -------
        score : Tensor [] of float32
            Similarity; larger is more similar.
        *matches : Tensor [n] of int64
            For each patch size: the candidate's patch that each patch of the query is matched
            with; -1 for none.
        """
        score = features[0].new_zeros((), dtype=torch.float64)
        matches = []
        for s, (weight, step) in enumerate(zip(self.weights, self.steps, strict=True)):
            query, at, candidate, to = features[4 * s : 4 * s + 4]
            similarity = query @ candidate.T  # [n, m]
            best = similarity.argmax(dim=1)
            rows = torch.arange(query.shape[0], device=query.device)
            mutual = similarity.argmax(dim=0)[best] == rows
            score = score + weight * _spatial_score(at, to[best], mutual, step)
            matches.append(torch.where(mutual, best, -1))
        return (score.float(), *matches)


def output_names(sizes: Sequence[int]) -> list[str]:
    """Return the names of what :class:`PortableNetwork` returns.

    Examples
    --------
    >>> output_names([5])
    ['descriptor', 'patches_5', 'keypoints_5']
    """
    return [
        "descriptor",
        *(f"{what}_{size}" for what in ("patches", "keypoints") for size in sizes),
    ]


def matcher_names(sizes: Sequence[int]) -> tuple[list[str], list[str]]:
    """Return the names of what :class:`PortableMatcher` takes and returns.

    Examples
    --------
    >>> matcher_names([5])[1]
    ['score', 'matches_5']
    """
    taken = [
        f"{side}_{what}_{size}"
        for size in sizes
        for side in ("query", "candidate")
        for what in ("patches", "keypoints")
    ]
    return taken, ["score", *(f"matches_{size}" for size in sizes)]


def _first_patches(config: Config) -> list[PatchGrid]:
    """Return, for each size, the grid of a map on which one patch fits."""
    pairs = zip(config.patch_sizes, config.strides, strict=True)
    return [PatchGrid.of_map((size, size), size, t, config.geometry) for size, t in pairs]


def _keypoints(maps: Tensor, grid: PatchGrid) -> Tensor:
    """Return the key points [n, 2] of a grid like this one on the whole of some maps."""
    rows, columns = ((side - grid.patch_size) // grid.stride + 1 for side in maps.shape[2:])
    x, y = (
        first + grid.step * torch.arange(count, device=maps.device)
        for first, count in zip(grid.keypoints[0].tolist(), (columns, rows), strict=True)
    )
    # Exporters know broadcasting better than meshgrid and repeat_interleave.
    along, down = x + 0 * y[:, None], y[:, None] + 0 * x
    return torch.stack([along.flatten(), down.flatten()], dim=1)


def _spatial_score(at: Tensor, to: Tensor, mutual: Tensor, step: int) -> Tensor:
    """Return minus what ``matching.spatial`` returns: larger is better."""
    displacement = (to - at).double() / step  # [n, 2]
    weight = mutual.double()[:, None]
    mean = (displacement * weight).sum(dim=0) / weight.sum().clamp_min(1)
    residual = (displacement - mean).abs()
    largest = (at.amax(dim=0) - at.amin(dim=0)).double() / step
    return (((largest - residual) ** 2) * weight).sum() / at.shape[0]
