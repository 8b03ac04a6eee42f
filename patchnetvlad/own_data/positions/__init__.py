# SPDX-License-Identifier: MIT
"""Positions of images: one reader per source."""
