# SPDX-License-Identifier: MIT
"""Door: the original import path of geometry, fusion and re-ranking."""

from patchnetvlad.research_code.local_matcher import (
    calc_keypoint_centers_from_patches,
    calc_receptive_boxes,
    local_matcher,
    normalise_func,
)

__all__ = [
    "calc_keypoint_centers_from_patches",
    "calc_receptive_boxes",
    "local_matcher",
    "normalise_func",
]
