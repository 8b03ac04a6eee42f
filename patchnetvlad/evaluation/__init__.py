# SPDX-License-Identifier: MIT
"""Judging results: recall, metrics, and files for other programs."""
