# SPDX-License-Identifier: MIT
"""Spatial verification of one pair of images by a homography (paper, section 3.4)."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config_ini import RANSACS
from patchnetvlad.errors import ConfigError
from patchnetvlad.matching.batched_ransac import (
    MIN_MATCHES,
    TOLERANCE,
    Solution,
    batched_homographies,
)
from patchnetvlad.models.grid import STRIDE


def homography_inliers(
    query_keypoints: NDArray[np.int64],
    candidate_keypoints: NDArray[np.int64],
    stride: float,
    method: str = "opencv",
) -> Solution:
    """Fit a homography from candidate to query keypoints by RANSAC.

    Parameters
    ----------
    query_keypoints, candidate_keypoints : ndarray [m, 2] of int
        Matched patch centres (x, y), px.
    stride : float
        Patch stride t in cells of 16 px; the inlier threshold is 16 t * 1.5 px.
    method : {"opencv", "fast", "batched"}, default "opencv"
        OpenCV's RANSAC, as in the research code; its USAC_FAST, many times faster where little
        matches; or :func:`batched_homographies` of this one problem.

    Returns
    -------
    homography : ndarray [3, 3] of float64, or None
        None when there are fewer than four matches, or when no homography is found. Four matches
        on a line fix no proper homography; ``opencv`` may give a degenerate one for them.
    inliers : ndarray [m] of bool
        Four or more, or none; ``opencv`` may give fewer than four where keypoints repeat.

    Raises
    ------
    ConfigError
        The method is unknown.

    Examples
    --------
    Five matches move by 32 px to the right; the sixth does not:

    >>> ours = np.array([[7, 7], [71, 7], [7, 71], [71, 71], [39, 23], [200, 7]])
    >>> theirs = ours - [32, 0]
    >>> theirs[5] = [7, 200]
    >>> homography, inliers = homography_inliers(ours, theirs, stride=1)
    >>> inliers.tolist()
    [True, True, True, True, True, False]
    >>> (homography @ [0, 0, 1]).round().tolist()
    [32.0, 0.0, 1.0]
    """
    if method not in RANSACS:
        raise ConfigError(f"unknown ransac {method!r}; one of {', '.join(RANSACS)}")
    nobody = np.zeros(len(query_keypoints), dtype=bool)
    if len(query_keypoints) < MIN_MATCHES:
        return None, nobody
    if method == "batched":
        return batched_homographies([(query_keypoints, candidate_keypoints, stride)])[0]
    homography, mask = cv2.findHomography(
        candidate_keypoints.astype(np.float32),
        query_keypoints.astype(np.float32),
        cv2.RANSAC if method == "opencv" else cv2.USAC_FAST,
        STRIDE * stride * TOLERANCE,
    )
    if homography is None or mask is None or not np.isfinite(homography).all():
        return None, nobody
    inliers = mask.ravel().astype(bool)
    if method == "fast" and inliers.sum() < MIN_MATCHES:  # happens where keypoints repeat
        return None, nobody
    return homography, inliers
