# SPDX-License-Identifier: MIT
"""Door: the original import path of the training data set."""

from patchnetvlad.research_code.msls import MSLS, ImagesFromList, default_cities

__all__ = ["MSLS", "ImagesFromList", "default_cities"]
