# SPDX-License-Identifier: MIT
"""Door: the original import path of an epoch of training."""

from patchnetvlad.research_code.training import train_epoch

__all__ = ["train_epoch"]
