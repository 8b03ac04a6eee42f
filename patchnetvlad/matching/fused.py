# SPDX-License-Identifier: MIT
"""Access to the Triton kernels, if they can be compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from patchnetvlad.base.device import out_of_memory

T = TypeVar("T")
logger = logging.getLogger(__name__)


def fused_kernels(device: torch.device) -> Any:
    """Return the module of Triton kernels, or None if plain PyTorch has to do the work.

    Its functions are called through :func:`attempt_fused`.
    """
    if _fused_failed or device.type != "cuda" or not torch.cuda.is_available():
        return None
    try:
        from patchnetvlad.matching import kernels
    except ImportError:  # no Triton here
        return None
    return kernels


def attempt_fused(work: Callable[[], T]) -> T | None:
    """Run a Triton kernel; if it cannot be compiled, return None from then on, for all kernels.

    Errors of memory and of the GPU itself are raised: plain PyTorch would meet them too.
    """
    global _fused_failed
    try:
        return work()
    except Exception as error:
        if out_of_memory(error) or isinstance(error, _GPU_ERRORS):
            raise
        _fused_failed = True
        logger.warning(
            "Triton cannot compile for this GPU (%s: %s); computing with PyTorch alone",
            type(error).__name__,
            str(error).strip().partition("\n")[0],
        )
        return None


_fused_failed = False
_GPU_ERRORS: Any = getattr(torch, "AcceleratorError", ())  # since PyTorch 2.8
