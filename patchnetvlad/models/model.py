# SPDX-License-Identifier: MIT
"""The whole network: encoder, pooling and whitening, as configured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from patchnetvlad.config_ini import PATCH_VLADS, POOLINGS
from patchnetvlad.errors import ConfigError
from patchnetvlad.models.netvlad import NetVLAD
from patchnetvlad.models.patchnetvlad import PatchNetVLAD


class Flatten(nn.Module):
    """Flatten all axes after the first: [N, ...] to [N, M]."""

    def forward(self, input_data: Tensor) -> Tensor:
        """Flatten ``input_data``."""
        return input_data.flatten(1)


class L2Norm(nn.Module):
    """L2-normalise along one axis.

    Parameters
    ----------
    dim : int, default 1
        The axis.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input_data: Tensor) -> Tensor:
        """Normalise ``input_data``."""
        return F.normalize(input_data, p=2, dim=self.dim)


def build_model(
    encoder: nn.Module,
    encoder_dim: int,
    *,
    pooling: str,
    num_clusters: int = 64,
    num_pcs: int = 0,
    vladv2: bool = False,
    patch_sizes: str | Sequence[int] = (),
    strides: str | Sequence[int] = (),
    patch_vlad: str = "integral",
) -> nn.Module:
    """Assemble the network.

    Parameters
    ----------
    encoder : nn.Module
        Maps images [N, 3, H, W] to features [N, D, h, w].
    encoder_dim : int
        D.
    pooling : {"patchnetvlad", "netvlad", "max", "avg"}
    num_clusters : int, default 64
        K, for the two VLAD poolings.
    num_pcs : int, default 0
        P of the whitening layer; 0 leaves it out.
    vladv2 : bool, default False
    patch_sizes, strides : sequence of int or str
        For ``patchnetvlad``.
    patch_vlad : {"integral", "direct"}, default "integral"
        For ``patchnetvlad``; see :class:`~patchnetvlad.models.patchnetvlad.PatchNetVLAD`.

    Returns
    -------
    nn.Module
        With the children ``encoder``, ``pool`` and, if ``num_pcs``, ``WPCA``. It is called
        child by child and has no ``forward`` of its own.

    Raises
    ------
    ConfigError
        The pooling is unknown.
    """
    pool: nn.Module
    if patch_vlad not in PATCH_VLADS:
        raise ConfigError(f"patch_vlad {patch_vlad!r} is unknown; one of {', '.join(PATCH_VLADS)}")
    if pooling == "patchnetvlad":
        if not patch_sizes:
            raise ConfigError("pooling patchnetvlad needs patch_sizes and strides")
        pool = PatchNetVLAD(
            num_clusters=num_clusters,
            dim=encoder_dim,
            vladv2=vladv2,
            patch_sizes=patch_sizes,
            strides=strides,
        )
        pool.integral = patch_vlad == "integral"
    elif pooling == "netvlad":
        pool = NetVLAD(num_clusters=num_clusters, dim=encoder_dim, vladv2=vladv2)
    elif pooling in ("max", "avg"):
        layer = nn.AdaptiveMaxPool2d if pooling == "max" else nn.AdaptiveAvgPool2d
        pool = nn.Sequential(layer((1, 1)), Flatten(), L2Norm())
    else:
        raise ConfigError(f"pooling {pooling!r} is unknown; one of {', '.join(POOLINGS)}")
    model = nn.Module()
    model.add_module("encoder", encoder)
    model.add_module("pool", pool)
    if num_pcs:
        pooled_dim = encoder_dim * (num_clusters if isinstance(pool, NetVLAD) else 1)
        model.add_module(
            "WPCA", nn.Sequential(nn.Conv2d(pooled_dim, num_pcs, 1), Flatten(), L2Norm(dim=-1))
        )
    return model


class GlobalDescriptor(nn.Module):
    """The first stage alone: from images to global descriptors, as evaluation frameworks call it.

    Parameters
    ----------
    network : nn.Module
        From :func:`build_model`, with any pooling but ``patchnetvlad``. Its children, ``encoder``,
        ``pool`` and, if there is one, ``WPCA``, become those of this module.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the global descriptors [N, P] of normalised images [N, 3, H, W]."""
        encoder, pool = self.get_submodule("encoder"), self.get_submodule("pool")
        pooled: Tensor = pool(encoder(images))  # [N, K * D]
        return get_pca_encoding(self, pooled) if hasattr(self, "WPCA") else pooled


def get_pca_encoding(model: nn.Module, vlad_encoding: Tensor) -> Tensor:
    """Whiten descriptors with the model's PCA layer, and L2-normalise them.

    It is one matrix product: a 1x1 convolution over thousands of one-pixel images computes the
    same, many times more slowly.

    Parameters
    ----------
    model : nn.Module
        From :func:`build_model`; may be wrapped in ``DataParallel``.
    vlad_encoding : Tensor [M, K * D]

    Returns
    -------
    Tensor [M, P]
    """
    layer = pca_layer(model)
    flat = vlad_encoding.flatten(1)
    return F.normalize(F.linear(flat, layer.weight.flatten(1), layer.bias), dim=-1)


def pca_layer(model: nn.Module) -> nn.Conv2d:
    """Return the model's PCA layer, weight [P, K * D, 1, 1]; AttributeError if it has none."""
    layer: nn.Conv2d = _unwrap(_unwrap(model).WPCA)[0]
    return layer


def _unwrap(module: Any) -> Any:
    return module.module if isinstance(module, nn.DataParallel) else module
