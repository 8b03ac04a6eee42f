# SPDX-License-Identifier: MIT
"""Door: the original import path of PCA."""

from patchnetvlad.models.whitening import pca

__all__ = ["pca"]
