# SPDX-License-Identifier: MIT
"""Evaluation: recall, metrics, and files for other programs."""
