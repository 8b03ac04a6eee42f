# SPDX-License-Identifier: MIT
"""What several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
"""Golden vectors, a real data set and its reference results; not part of the repository."""

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the reference data beside the repository is absent"
)
