# SPDX-License-Identifier: MIT
"""Door: the original import path of the network's parts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from patchnetvlad.config import Config
from patchnetvlad.models.backbone import get_backend
from patchnetvlad.models.model import Flatten, L2Norm, build_model, get_pca_encoding
from patchnetvlad.models.netvlad import NetVLAD
from patchnetvlad.models.patchnetvlad import PatchNetVLAD

__all__ = [
    "Flatten",
    "L2Norm",
    "NetVLAD",
    "PatchNetVLAD",
    "get_backend",
    "get_model",
    "get_pca_encoding",
]


def get_model(
    encoder: nn.Module,
    encoder_dim: int,
    config: Mapping[str, str] | Config,
    append_pca_layer: bool = False,
) -> nn.Module:
    """Put the network together as a ``[global_params]`` section says.

    Parameters
    ----------
    encoder : nn.Module
    encoder_dim : int
        As :func:`get_backend` returns them.
    config : mapping or Config
        A section of a ``ConfigParser``, or any mapping, with ``pooling``, ``num_clusters``
        (default 64), ``num_pcs``, ``patch_sizes``, ``strides`` and ``vladv2``.
    append_pca_layer : bool, default False
        Add the child ``WPCA`` with ``num_pcs`` components.

    Returns
    -------
    nn.Module
        With the children ``encoder``, ``pool`` and, if asked for, ``WPCA``.

    Raises
    ------
    ConfigError
        The pooling is unknown, or sizes and strides do not pair.
    """
    section = Config.global_params(config)
    return build_model(
        encoder,
        encoder_dim,
        pooling=section["pooling"].lower(),
        num_clusters=int(section.get("num_clusters", "64")),
        num_pcs=int(section["num_pcs"]) if append_pca_layer else 0,
        vladv2=section.get("vladv2", "False").lower() in ("1", "yes", "true", "on"),
        patch_sizes=section.get("patch_sizes", ""),
        strides=section.get("strides", ""),
        patch_vlad=section.get("patch_vlad", "integral").lower(),
    )
