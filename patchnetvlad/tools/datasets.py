# SPDX-License-Identifier: MIT
"""Door: the original import path of data sets."""

from patchnetvlad.datasets.place_dataset import PlaceDataset
from patchnetvlad.datasets.transforms import input_transform

__all__ = ["PlaceDataset", "input_transform"]
