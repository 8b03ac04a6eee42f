# SPDX-License-Identifier: MIT
"""What several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
"""Golden vectors, a real data set and its reference results; not part of the repository."""

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the reference data beside the repository is absent"
)

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
"""Where tests of values compute: ``@pytest.mark.parametrize("device", DEVICES)``."""
