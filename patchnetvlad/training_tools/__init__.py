# SPDX-License-Identifier: MIT
"""Doors: the original import paths of what training uses."""
