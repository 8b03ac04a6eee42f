# SPDX-License-Identifier: MIT
"""Door: the original import path of PCA and of saving checkpoints."""

from patchnetvlad.models.whitening import pca
from patchnetvlad.research_code.training import humanbytes, save_checkpoint

__all__ = ["humanbytes", "pca", "save_checkpoint"]
