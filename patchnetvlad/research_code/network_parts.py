# SPDX-License-Identifier: MIT
"""The network's parts under the names and signatures of the research code."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from patchnetvlad.assets.catalog import SHIPPED_CHECKPOINT
from patchnetvlad.config import Config
from patchnetvlad.errors import ConfigError
from patchnetvlad.models.checkpoint import load_state
from patchnetvlad.models.encoder import build_encoder
from patchnetvlad.models.grid import ENCODER_DIM
from patchnetvlad.models.model import build_model

FIRST_TRAINABLE_LAYER = 24  # conv5_1: the block that is fine-tuned in training


def get_backend(weights: str | None = "shipped") -> tuple[int, nn.Sequential]:
    """Return the encoder and its output dimension.

    Layers before conv5_1 are frozen (``requires_grad`` is False), as for training.

    Parameters
    ----------
    weights : {"shipped", "torchvision"} or None
        ImageNet features from the checkpoint inside this package (default, nothing is
        downloaded); torchvision's own, which torchvision downloads on first use; or None for
        random weights.

    Returns
    -------
    dim : int
        512.
    encoder : nn.Sequential
        Maps normalised images [N, 3, H, W] to [N, 512, H // 16, W // 16].

    Raises
    ------
    ConfigError
        ``weights`` is none of these.
    AssetError
        The shipped checkpoint is missing.
    """
    encoder = build_encoder()
    if weights == "shipped":
        encoder.load_state_dict(load_state(SHIPPED_CHECKPOINT, prefix="encoder."))
    elif weights == "torchvision":
        from torchvision.models import VGG16_Weights, vgg16

        source: dict[str, Tensor] = vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features.state_dict()
        encoder.load_state_dict({key: source[key] for key in encoder.state_dict()})
    elif weights is not None:
        raise ConfigError(
            f"get_backend(weights={weights!r}): give 'shipped', 'torchvision' or None"
        )
    for layer in encoder[:FIRST_TRAINABLE_LAYER]:
        layer.requires_grad_(False)
    return ENCODER_DIM, encoder


def get_model(
    encoder: nn.Module,
    encoder_dim: int,
    config: Mapping[str, str] | Config,
    append_pca_layer: bool = False,
) -> nn.Module:
    """Build the network that a ``[global_params]`` section describes.

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
