# SPDX-License-Identifier: MIT
"""Door: the original import path of vocabularies."""

from patchnetvlad.research_code.training import get_clusters

__all__ = ["get_clusters"]
