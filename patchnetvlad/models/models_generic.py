# SPDX-License-Identifier: MIT
"""Door: the original import path of the network's parts."""

from patchnetvlad.models.model import Flatten, L2Norm, get_pca_encoding
from patchnetvlad.models.netvlad import NetVLAD
from patchnetvlad.models.patchnetvlad import PatchNetVLAD
from patchnetvlad.research_code.network_parts import get_backend, get_model

__all__ = [
    "Flatten",
    "L2Norm",
    "NetVLAD",
    "PatchNetVLAD",
    "get_backend",
    "get_model",
    "get_pca_encoding",
]
