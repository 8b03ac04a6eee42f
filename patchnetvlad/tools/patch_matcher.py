# SPDX-License-Identifier: MIT
"""Door: the original import path of patch matching."""

from patchnetvlad.research_code.patch_matcher import PatchMatcher, torch_nn

__all__ = ["PatchMatcher", "torch_nn"]
