# SPDX-License-Identifier: MIT
"""Whole data sets: extract, match, evaluate."""
