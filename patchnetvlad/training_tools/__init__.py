# SPDX-License-Identifier: MIT
"""Doors: the original import paths of training."""
