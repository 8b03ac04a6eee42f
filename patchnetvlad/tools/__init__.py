# SPDX-License-Identifier: MIT
"""Doors: the original import paths of data sets and matching."""

from patchnetvlad.assets.folders import PACKAGE_DIR

PATCHNETVLAD_ROOT_DIR = str(PACKAGE_DIR)

__all__ = ["PATCHNETVLAD_ROOT_DIR"]
