# SPDX-License-Identifier: MIT
"""Spatial verification by a homography (paper, section 3.4)."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from patchnetvlad.models.backbone import STRIDE

TOLERANCE = 1.5
"""Reprojection error of an inlier, in patch strides."""

MIN_MATCHES = 4
"""Matches that a homography needs."""


def homography_inliers(
    query_keypoints: NDArray[np.int64], candidate_keypoints: NDArray[np.int64], stride: int
) -> tuple[NDArray[np.float64] | None, NDArray[np.bool_]]:
    """Fit a homography from candidate to query keypoints by RANSAC.

    Parameters
    ----------
    query_keypoints, candidate_keypoints : ndarray [m, 2] of int
        Matched patch centres (x, y), px.
    stride : int
        Patch stride t in cells; the inlier threshold is 16 t * 1.5 px.

    Returns
    -------
    homography : ndarray [3, 3] of float64, or None
        None when there are fewer than four matches, or when OpenCV finds none. Four matches on
        a line fix no proper homography; OpenCV may give a degenerate one for them.
    inliers : ndarray [m] of bool
    """
    nobody = np.zeros(len(query_keypoints), dtype=bool)
    if len(query_keypoints) < MIN_MATCHES:
        return None, nobody
    homography, mask = cv2.findHomography(
        candidate_keypoints.astype(np.float32),
        query_keypoints.astype(np.float32),
        cv2.RANSAC,
        STRIDE * stride * TOLERANCE,
    )
    if homography is None or mask is None or not np.isfinite(homography).all():
        return None, nobody
    return homography, mask.ravel().astype(bool)
