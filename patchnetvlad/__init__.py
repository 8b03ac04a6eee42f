# SPDX-License-Identifier: MIT
"""Visual place recognition with Patch-NetVLAD.

Retrieval by NetVLAD, re-ranking by locally-global patch descriptors (Hausler et al., CVPR
2021). Names are imported when they are first used, so that ``import patchnetvlad`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchnetvlad.config import Config as Config
    from patchnetvlad.errors import PatchNetVLADError as PatchNetVLADError
    from patchnetvlad.evaluation.plots import plot_pair as plot_pair
    from patchnetvlad.evaluation.recall import recall_at_n as recall_at_n
    from patchnetvlad.features.describe import describe as describe
    from patchnetvlad.features.extract import extract as extract
    from patchnetvlad.models.checkpoint import load_model as load_model
    from patchnetvlad.pipeline import match_images as match_images
    from patchnetvlad.pipeline import rerank as rerank

__version__ = "1.0.0"

_HOMES = {
    "Config": "config",
    "PatchNetVLADError": "errors",
    "describe": "features.describe",
    "extract": "features.extract",
    "load_model": "models.checkpoint",
    "rerank": "pipeline",
    "match_images": "pipeline",
    "plot_pair": "evaluation.plots",
    "recall_at_n": "evaluation.recall",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'patchnetvlad' has no attribute {name!r}")
    return getattr(import_module(f"patchnetvlad.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
