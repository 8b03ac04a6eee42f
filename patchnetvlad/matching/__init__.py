# SPDX-License-Identifier: MIT
"""Matching of patch descriptors: neighbours, spatial consistency, fusion, re-ranking."""
