# SPDX-License-Identifier: MIT
"""Entries for ``torch.hub.load("OWNER/patchnetvlad", ENTRY, ...)``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchnetvlad.models.model import GlobalDescriptor
    from patchnetvlad.places.model import PlaceModel

dependencies = [
    "PIL", "cv2", "faiss", "filelock", "huggingface_hub", "lazy_loader", "matplotlib", "numpy",
    "pyproj", "safetensors", "scipy", "sklearn", "torch", "torchvision", "tqdm",
]  # fmt: skip


def patchnetvlad(config: str = "performance", **options: Any) -> PlaceModel:
    """Load a model that describes images for retrieval and re-ranking.

    Parameters
    ----------
    config : str, default "performance"
        ``performance``, ``speed``, ``storage``, ``demo``, or an INI file.
    **options
        ``weights`` and ``device``, as for :func:`patchnetvlad.load_model`.

    Returns
    -------
    patchnetvlad.PlaceModel
    """
    from patchnetvlad.places.model import load_model

    return load_model(config, **options)


def netvlad(config: str = "performance", device: str = "auto") -> GlobalDescriptor:
    """Load the first stage alone, a module from images to global descriptors.

    Parameters
    ----------
    config : str, default "performance"
        As for :func:`patchnetvlad`; its pooling, where it is ``patchnetvlad``, becomes
        ``netvlad``.
    device : str, default "auto"
        ``auto`` (CUDA, else Apple's MPS, else the CPU), ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Returns
    -------
    torch.nn.Module
        Maps images [N, 3, H, W] of float32, normalised by ImageNet's mean and standard deviation,
        to descriptors [N, P] of unit length.
    """
    from patchnetvlad.config import Config
    from patchnetvlad.models.checkpoint import load_network
    from patchnetvlad.models.model import GlobalDescriptor

    settings = Config.load(config)
    if settings.uses_patches:
        settings = replace(settings, pooling="netvlad")
    return GlobalDescriptor(load_network(settings, device)).eval()
