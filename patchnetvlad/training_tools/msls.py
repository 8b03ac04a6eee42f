# SPDX-License-Identifier: MIT
"""Door: the original import path of the data set of training."""

from patchnetvlad.research_code.msls import MSLS, ImagesFromList, default_cities

__all__ = ["MSLS", "ImagesFromList", "default_cities"]
