# SPDX-License-Identifier: MIT
"""Door: the original import path of data sets."""

from patchnetvlad.datasets.images import input_transform
from patchnetvlad.research_code.place_dataset import PlaceDataset

__all__ = ["PlaceDataset", "input_transform"]
