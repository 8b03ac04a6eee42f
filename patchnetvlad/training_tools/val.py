# SPDX-License-Identifier: MIT
"""Door: the original import path of validation."""

from patchnetvlad.research_code.training import val

__all__ = ["val"]
