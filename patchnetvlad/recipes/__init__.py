# SPDX-License-Identifier: MIT
"""Whole jobs in one call."""
